"""A device that is full ends a run with one line that names what would fit."""

import json

import pytest
from support import contents, result

from sophia_train import checkpoint

SETTING = 64  # exit code
HUTCHINSON = ("optimizer=sophia_h", "hessian.batch_size=4")


def full_at(step):
    return {"hooks": [["run_out_of_memory", step]]}


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (("micro_batch_size=2",), "use micro_batch_size=1, and"),
        (("batch_size=12", "micro_batch_size=12"), "use micro_batch_size=6, and"),
        (("batch_size=9", "micro_batch_size=9"), "use micro_batch_size=3, and"),
        (("micro_batch_size=1",), "use activation_checkpointing=blocks, and"),
        (("activation_checkpointing=blocks", "micro_batch_size=1"), "choose a smaller model="),
    ],
)
def test_the_line_names_what_fits(overrides, fix, tiny, tmp_path):
    ended = tiny(tmp_path, *overrides, **full_at(3))
    assert ended.code == SETTING and len(ended.errors) == 1 and "Traceback" not in ended.err
    assert f"{overrides[-1]} is too much" in ended.errors[0] and "after 3 steps" in ended.errors[0]
    assert fix in ended.errors[0]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status == {"code": SETTING, "reason": ended.errors[0][len("error: ") :], "step": 3}


def test_the_line_names_the_sequences_of_hutchinson_where_they_may_be_to_blame(tiny, tmp_path):
    arguments = [*HUTCHINSON, "hessian.micro_batch_size=4"]
    at_a_refresh = tiny(tmp_path / "at", *arguments, **full_at(2))
    between = tiny(tmp_path / "between", *arguments, **full_at(3))
    assert "use micro_batch_size=1 hessian.micro_batch_size=2, and" in at_a_refresh.errors[0]
    assert "use micro_batch_size=1, and" in between.errors[0]


@pytest.mark.parametrize("step", [0, 4])  # before anything is saved, and later
def test_the_run_goes_on_with_what_the_line_names(step, tiny, tmp_path):
    ended = tiny(tmp_path, *HUTCHINSON, "hessian.micro_batch_size=4", **full_at(step))
    assert ended.code == SETTING
    saved = contents(tmp_path / "checkpoints")
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is None if step == 0 else checkpoint.verify(newest)["step"] == step
    smaller = ["micro_batch_size=1", "hessian.micro_batch_size=2", "activation_checkpointing=blocks"]
    assert tiny(tmp_path, *HUTCHINSON, *smaller, "keep_checkpoints=9").code == 0
    assert saved.items() <= contents(tmp_path / "checkpoints").items()
    done = result(tmp_path)
    assert done["step"] == "step_00000006" and done["temporary"] == []
    assert [line["step"] for line in done["metrics"]] == list(range(7))
