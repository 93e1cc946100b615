"""A run that was interrupted and started again ends exactly as one that was left alone."""

import json
import signal

import pytest
from support import contents, records, result

from sophia_train import checkpoint
from sophia_train.models import convert
from sophia_train.models.gpt2 import GPT2Config

STEPS = 7
CASES = {
    "sophia": ["optimizer=sophia_g", "sample_interval=2", "sample_tokens=12"],
    "sophia in groups": ["optimizer=sophia_g", "hessian.groups=2", "hessian.interval=3", "batch_size=6"],
    "adamw": ["optimizer=adamw", "~hessian.interval", "sample_interval=3", "sample_tokens=12"],
    "hutchinson": ["optimizer=sophia_h", "hessian.batch_size=2"],
    "mixed, gamma held": [
        "optimizer=sophia_robust",
        "gamma=auto",
        "gamma.interval=2",
        "optimizer.gamma=1e-6",
        "optimizer.bias_correction=both",
    ],
    "dropout": ["optimizer=sophia_g", "model.dropout=0.2", "log_interval=2"],
}
LENGTH = [f"max_steps={STEPS}", "save_interval=3", "eval_interval=2"]


def status(folder):
    return json.loads((folder / "status.json").read_text())


def saved_step(folder):
    return checkpoint.verify(checkpoint.latest(folder / "checkpoints"))["state"]["step"]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The overrides of each case, and what its run comes to when it is left alone."""
    made = {}

    def of(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            assert tiny(folder, *LENGTH, *CASES[case]).code == 0
            made[case] = result(folder)
        return [*LENGTH, *CASES[case]], made[case]

    return of


@pytest.mark.parametrize("case", CASES)
class TestInterrupted:
    def test_at_each_step(self, case, tiny, undisturbed, tmp_path):
        overrides, expected = undisturbed(case)
        for step in range(1, STEPS):
            folder = tmp_path / str(step)
            first = tiny(folder, *overrides, f"stop_at_step={step}")
            assert (first.code, len(first.errors)) == (75, 1)
            assert (status(folder)["code"], status(folder)["step"], saved_step(folder)) == (75, step, step)
            assert tiny(folder, *overrides).code == 0
            assert result(folder) == expected, step

    def test_after_every_step(self, case, tiny, undisturbed, tmp_path):
        overrides, expected = undisturbed(case)
        for step in range(1, STEPS):
            assert tiny(tmp_path, *overrides, f"stop_at_step={step}").code == 75
        assert tiny(tmp_path, *overrides).code == 0
        assert result(tmp_path) == expected


class TestSignals:
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
    def test_ends_the_step_saves_and_goes_on_later(self, name, tiny, undisturbed, tmp_path):
        overrides, expected = undisturbed("sophia")
        for step in (0, 2, STEPS - 2):
            folder = tmp_path / str(step)
            first = tiny(folder, *overrides, hooks=[["send_signal", step, name]])
            assert first.code == 75 and name in first.errors[0] and len(first.errors) == 1
            assert status(folder) == {"code": 75, "reason": first.errors[0][7:], "step": step + 1}
            assert saved_step(folder) == step + 1
            assert tiny(folder, *overrides).code == 0
            assert result(folder) == expected, step

    def test_during_the_last_step_is_late(self, tiny, undisturbed, tmp_path):
        overrides, expected = undisturbed("sophia")
        assert tiny(tmp_path, *overrides, hooks=[["send_signal", STEPS - 1, "SIGTERM"]]).code == 0
        assert result(tmp_path) == expected

    def test_inside_a_save_lets_it_finish(self, tiny, undisturbed, tmp_path):
        overrides, expected = undisturbed("sophia")
        first = tiny(tmp_path, *overrides, hooks=[["send_signal_inside_a_save", "SIGTERM"]])
        assert first.code == 75 and status(tmp_path)["step"] == 4
        assert tiny(tmp_path, *overrides).code == 0
        assert result(tmp_path) == expected

    def test_that_kills_leaves_what_can_be_continued(self, tiny, undisturbed, tmp_path):
        overrides, expected = undisturbed("sophia")
        for step in (0, 3, STEPS - 1):
            folder = tmp_path / str(step)
            assert tiny(folder, *overrides, hooks=[["send_signal", step, "SIGKILL"]]).code == -signal.SIGKILL
            assert tiny(folder, *overrides).code == 0
            assert result(folder) == expected, step


class TestFinished:
    def test_says_so_and_changes_nothing(self, tiny, tmp_path):
        assert tiny(tmp_path).code == 0
        before = contents(tmp_path)
        again = tiny(tmp_path)
        assert again.code == 0 and "finished" in again.err and "validation loss" in again.out
        after = contents(tmp_path)
        figure = str(tmp_path / "loss.png")
        assert before.pop(figure) and after.pop(figure)
        assert after == before

    def test_whatever_may_change(self, tiny, tmp_path):
        assert tiny(tmp_path).code == 0
        before = result(tmp_path)
        changes = (
            "log_interval=3 save_interval=1 keep_checkpoints=1 micro_batch_size=4 stop_at_step=2".split()
        )
        assert tiny(tmp_path, *changes).code == 0
        assert result(tmp_path) == before


class TestLength:
    def test_max_tokens_is_a_length(self, tiny, tmp_path):
        assert tiny(tmp_path / "tokens", "max_steps=null", f"max_tokens={5 * 32 + 31}").code == 0
        assert tiny(tmp_path / "steps", "max_steps=5").code == 0
        assert result(tmp_path / "tokens") == result(tmp_path / "steps")
        assert result(tmp_path / "steps")["state"]["tokens"] == 5 * 32

    def test_max_seconds_ends_after_a_step(self, tiny, tmp_path):
        assert tiny(tmp_path, "max_seconds=1e-9").code == 0
        assert status(tmp_path).items() >= {"code": 0, "reason": "finished", "step": 1}.items()
        assert records(tmp_path)[-1]["step"] == 1 and "val/loss" in records(tmp_path)[-1]
        again = tiny(tmp_path, "max_seconds=1e-9")
        assert again.code == 0 and "finished" in again.err

    def test_more_time_goes_on(self, tiny, tmp_path):
        assert tiny(tmp_path / "limited", "max_seconds=1e-9").code == 0
        assert tiny(tmp_path / "limited", "max_seconds=1000").code == 0
        assert tiny(tmp_path / "free").code == 0
        limited, free = result(tmp_path / "limited"), result(tmp_path / "free")
        metrics = limited.pop("metrics")
        assert (
            free.pop("metrics")[2:] == metrics[2:] and "val/loss" in metrics[1]
        )  # measured when time was up
        assert limited == free


class TestAnotherRun:
    def test_is_continued_in_a_new_folder(self, tiny, tmp_path):
        whole, source, branch = (tmp_path / name for name in ("whole", "source", "branch"))
        assert tiny(whole).code == 0
        assert tiny(source, "stop_at_step=3").code == 75
        before = contents(source)
        assert tiny(branch, f"resume={source}").code == 0
        expected, found = result(whole), result(branch)
        assert found.pop("metrics") == [each for each in expected.pop("metrics") if each["step"] > 3]
        assert found == expected
        assert contents(source) == before

    def test_is_continued_from_one_of_its_checkpoints(self, tiny, tmp_path):
        assert tiny(tmp_path / "whole").code == 0
        older = tmp_path / "whole" / "checkpoints" / "step_00000004"
        assert tiny(tmp_path / "branch", f"resume={older}").code == 0
        assert result(tmp_path / "branch")["files"] == result(tmp_path / "whole")["files"]

    def test_that_is_finished_leaves_nothing_to_do(self, tiny, tmp_path):
        assert tiny(tmp_path / "whole").code == 0
        done = tiny(tmp_path / "branch", f"resume={tmp_path / 'whole'}")
        assert done.code == 0 and "finished" in done.err
        assert not (tmp_path / "branch").exists()

    def test_the_same_command_again_goes_on_without_it(self, tiny, tmp_path):
        whole, source, branch = (tmp_path / name for name in ("whole", "source", "branch"))
        assert tiny(whole).code == 0
        assert tiny(source, "stop_at_step=3").code == 75
        resume = f"resume={source}"
        assert tiny(branch, resume, "stop_at_step=4").code == 75
        assert tiny(branch, resume, "stop_at_step=5").code == 75
        source.rename(tmp_path / "elsewhere")
        assert tiny(branch, resume).code == 0
        assert result(branch)["files"] == result(whole)["files"]
        before = contents(branch)
        refused = tiny(branch, f"resume={tmp_path / 'elsewhere'}")
        assert refused.code == 64 and "resume=" in refused.errors[0]
        gone = tiny(branch, f"resume={tmp_path / 'nowhere'}")
        assert gone.code == 66 and "nowhere" in gone.errors[0]
        assert contents(branch) == before

    def test_is_not_mixed_with_what_is_there(self, tiny, tmp_path):
        for name in ("one", "two"):
            assert tiny(tmp_path / name, "stop_at_step=3").code == 75
        before = contents(tmp_path)
        refused = tiny(tmp_path / "two", f"resume={tmp_path / 'one'}")
        assert refused.code == 64 and "resume=" in refused.errors[0]
        assert contents(tmp_path) == before


class TestWeightsOfAnotherRun:
    def test_are_its_weights(self, tiny, tmp_path):
        assert tiny(tmp_path / "source").code == 0
        start = [f"init_from={tmp_path / 'source'}", "max_steps=1", "schedule.warmup_steps=0"]
        still = ["optimizer=adamw", "~hessian.interval", "optimizer.lr=0", "optimizer.weight_decay=0"]
        assert tiny(tmp_path / "new", *start, *still).code == 0
        source, new = result(tmp_path / "source"), result(tmp_path / "new")
        assert new["files"]["model.safetensors"] == source["files"]["model.safetensors"]
        assert new["metrics"][0]["val/loss"] == source["validation_loss"]
        assert new["metrics"][0]["step"] == 0

    def test_are_needed_only_once(self, tiny, tmp_path):
        assert tiny(tmp_path / "source").code == 0
        start = f"init_from={tmp_path / 'source'}"
        assert tiny(tmp_path / "whole", start).code == 0
        assert tiny(tmp_path / "new", start, "stop_at_step=3").code == 75
        (tmp_path / "source").rename(tmp_path / "elsewhere")
        assert tiny(tmp_path / "new", start).code == 0
        assert result(tmp_path / "new") == result(tmp_path / "whole")


def test_a_hugging_face_folder_starts_a_run_at_its_own_loss(tiny, tmp_path):
    assert tiny(tmp_path / "source", "max_steps=4", "schedule.warmup_steps=1").code == 0
    weights, manifest = checkpoint.load_weights(tmp_path / "source")
    convert.export_folder(weights, tmp_path / "hf", GPT2Config(**manifest["config"]["model"]))
    start = [f"init_from={tmp_path / 'hf'}", "max_steps=2", "schedule.warmup_steps=0"]
    assert tiny(tmp_path / "run", *start).code == 0
    first = records(tmp_path / "run")[0]
    assert (first["step"], first["val/loss"]) == (0, manifest["validation_loss"])
