"""The queue of runs: skips what is finished, goes on with what is not, begins nothing that cannot end."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
from log_pipe import strike
from support import ENVIRONMENT, ROOT, TINY, contents, load_script, result

from sophia_train import config, run_queue
from sophia_train.processes import OUTPUT

SETTINGS = [word for word in TINY if not word.startswith("hessian.")]
LONG = "max_steps=400 eval_interval=100 save_interval=1000 log_interval=1 tracker=console"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def queue(token_files, tmp_path):
    """Runs the script in this process: `queue(runs, *arguments)`, with lines of runs or the whole file."""
    script = load_script("run_queue")

    def run(runs, *arguments):
        file = tmp_path / "queue.yaml"
        file.write_text(runs if isinstance(runs, str) else queue_of(runs))
        return script.main([str(file), "--out", str(tmp_path / "out"), *arguments, *extra(token_files)])

    return run


def queue_of(runs, common=""):
    return "".join([f"common: {' '.join(SETTINGS)} {common}\nruns:\n", *(f"  {line}\n" for line in runs)])


def extra(token_files):
    return ["--", f"data.path={token_files}"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def rows(out):
    return [json.loads(line) for line in (out / run_queue.RESULTS).read_text().splitlines()]


@pytest.mark.slow
class TestRuns:
    def test_every_combination_runs_and_has_a_row(self, queue, out, capfd):
        runs = ["adamw: optimizer=adamw seed=1,2", "sophia: optimizer=sophia_g optimizer.betas=[0.9,0.95]"]
        assert queue(runs, "--parallel", "2") == 0
        assert [row["name"] for row in sorted(rows(out), key=lambda row: row["name"])] == [
            "adamw-seed=1",
            "adamw-seed=2",
            "sophia",
        ]
        by_name = {row["name"]: row for row in rows(out)}
        assert by_name["adamw-seed=1"]["config"] == by_name["adamw-seed=2"]["config"]
        assert by_name["adamw-seed=1"]["config"] != by_name["sophia"]["config"]
        for name, row in by_name.items():
            found = result(out / name)
            assert row["state"] == "finished" and row["val_loss"] == found["validation_loss"]
            assert row["tokens"] == found["state"]["tokens"] and row["flops"] == found["state"]["flops"]
            assert row["wall_seconds"] >= row["seconds"] > 0 and row["parallel"] == 2
            environment = json.loads((out / name / "environment.json").read_text())
            assert (row["commit"], row["device"]) == (environment["commit"], environment["device"])
        assert capfd.readouterr().out.count("finished") == 3

        before = contents(out)
        assert queue(runs) == 0  # nothing is left to do
        assert contents(out) == before

        (out / run_queue.RESULTS).unlink()  # as if it had been killed between a run's end and its row
        assert queue(runs, "--discard-weights") == 0
        assert {row["name"]: row["val_loss"] for row in rows(out)} == {
            name: row["val_loss"] for name, row in by_name.items()
        }
        assert not list(out.rglob("*.safetensors")) and list(out.rglob("manifest.json"))
        assert queue(runs) == 0

    def test_a_diverged_run_has_a_row_and_is_not_repeated(self, queue, out):
        runs = ["bad: optimizer=sgd optimizer.lr=1e30 max_skipped_steps=0 max_steps=60", "good: seed=1"]
        assert queue(runs) == 0
        bad, good = rows(out)
        assert (bad["name"], bad["state"], bad["val_loss"]) == ("bad", "diverged", None)
        assert good["state"] == "finished" and math.isfinite(good["val_loss"])
        before = contents(out)
        assert queue(runs) == 0
        assert contents(out) == before

    def test_another_failure_ends_the_queue_with_its_line_and_code(self, queue, out, capfd):
        assert queue(["a: batch_size=1000 micro_batch_size=1", "b: seed=1"]) == 65
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and "batch_size=1000" in lines[0] and str(out / "a") in lines[0]
        assert not (out / "b").exists()

    @pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
    def test_an_interrupted_run_goes_on_bitwise(self, how, queue, out, token_files, tmp_path):
        file = tmp_path / "queue.yaml"
        file.write_text(queue_of(["a: optimizer=adamw", "b: optimizer=adamw seed=2"], LONG))
        arguments = [str(file), "--out", str(out), *extra(token_files)]
        code = strike("run_queue", arguments, out / "a", 20, how)
        assert code == (75 if how == signal.SIGTERM else -how)
        assert json.loads((out / "a" / "status.json").read_text())["code"] == 75
        assert not (out / "b").exists()

        alone = queue_of(["a: optimizer=adamw"], LONG)
        assert queue(alone) == 0
        resumed = result(out / "a")
        assert "going on from" in (out / "a" / OUTPUT).read_text()
        shutil.rmtree(out)
        assert queue(alone) == 0
        assert result(out / "a") == resumed

    def test_what_is_in_progress_when_the_time_is_up_is_stopped(self, queue, out):
        assert queue(["a: max_steps=10000000", "b: seed=1"], "--seconds", "10") == 75
        assert (out / "a").exists() and not (out / "b").exists() and not (out / run_queue.RESULTS).exists()


class TestTime:
    def test_nothing_begins_that_would_not_end_in_time(self, queue, out, capfd, token_files, tmp_path):
        assert queue(["a: seed=1,2"], "--seconds", "1e-9") == 75
        assert "2 of 2 runs" in capfd.readouterr().err
        read = run_queue.read_queue(tmp_path / "queue.yaml", out, extra(token_files)[1:])
        row = {"name": "a-seed=1", "seed": 1, "config": read[0].digest, "state": "finished"}
        row |= {"wall_seconds": 1e6, "seconds": 1e6, "tokens": 192, "val_loss": 2.5}
        (out / run_queue.RESULTS).write_text(json.dumps(row) + "\n")
        assert queue(["a: seed=1,2"], "--seconds", "1000") == 75
        captured = capfd.readouterr()
        assert "1 of 2 runs" in captured.err and "a-seed=2" in captured.err
        assert not (out / "a-seed=1").exists() and not (out / "a-seed=2").exists()

    def test_the_time_for_composing_the_runs_counts(self, queue, out, monkeypatch):
        def slow(overrides, compose=run_queue.compose):
            time.sleep(2)
            return compose(overrides)

        def start(*_):
            pytest.fail("a run was begun after the end of the time")

        monkeypatch.setattr(run_queue, "compose", slow)
        monkeypatch.setattr(run_queue, "start_run", start)
        assert queue(["a: seed=1"], "--seconds", "2") == 75

    def test_so_does_the_time_for_loading_what_composes_them(self):
        loaded = "import sys, run_queue; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", loaded], cwd=ROOT / "scripts").returncode == 0

    def test_each_run_is_composed_once(self, token_files, out, tmp_path, monkeypatch):
        composed = []

        def count(name, overrides, compose=config.hydra_compose):
            composed.append(overrides)
            return compose(name, overrides)

        monkeypatch.setattr(config, "hydra_compose", count)
        (tmp_path / "queue.yaml").write_text(queue_of(["a: seed=1,2 optimizer=adamw,sophia_g", "b: seed=3"]))
        runs = run_queue.read_queue(tmp_path / "queue.yaml", out, extra(token_files)[1:])
        assert len(composed) == len(runs) == 5
        for run in runs:
            assert [word for word in run.overrides if word.startswith("name=")] == [
                f"name='{run.folder.name}'"
            ]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("[!w]*.yaml")), ids=lambda path: path.stem)
def test_the_queues_that_are_here_compose(path, token_files, tmp_path):
    runs = run_queue.read_queue(path, tmp_path, [f"data.path={token_files}"])
    assert len({run.folder for run in runs}) == len(runs) >= 3
    assert {run.folder.parent for run in runs} == {tmp_path}


class TestBadInput:
    @pytest.mark.parametrize(
        ("runs", "fragments"),
        [
            ("", ["queue.yaml", "no runs"]),
            ("runs: [a, b]", ["no runs"]),
            ("runs: {}", ["no runs"]),
            ("runs: {a: seed=1", ["queue.yaml", "YAML"]),
            ("run: {a: seed=1}", ["no runs"]),
            ("runs: {a: seed=1}\nshared: seed=2", ["shared", "common"]),
            ("runs: {a: {seed: 1}}", ["a:", "KEY=VALUE"]),
            ("runs: {../a: seed=1}", ["../a", "folder"]),
            ("runs: {a: 'x=\"1'}", ["a:", "quotes"]),
            (["a: seeds=1"], ["a: seeds=1", "seed?"]),
            (["good: seed=1", "a: optimizer=adamx"], ["a: optimizer=adamx", "adamw"]),
            ("common: max_stepz=5\nruns: {a: seed=1}", ["max_stepz=5"]),
        ],
    )
    def test_is_one_line_before_anything_starts(self, runs, fragments, queue, out, capfd):
        assert queue(runs) == 64
        err = capfd.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        for fragment in fragments:
            assert fragment in err
        assert not out.exists()

    def test_a_file_that_is_not_there(self, capfd, tmp_path):
        script = load_script("run_queue")
        assert script.main([str(tmp_path / "no.yaml"), "--out", str(tmp_path / "out")]) == 66
        assert "no.yaml" in capfd.readouterr().err

    @pytest.mark.parametrize("option", [["--seconds", "0"], ["--parallel", "0"], ["--second", "x"]])
    def test_an_option(self, option, queue, capfd):
        assert queue(["a: seed=1"], *option) == 64
        assert option[0] in capfd.readouterr().err

    def test_two_runs_of_one_name(self, queue, out, capfd):
        assert queue(["a-seed=1: seed=3", "a: seed=1,2"]) == 64
        assert "a-seed=1 is there already" in capfd.readouterr().err
        assert not out.exists()

    @pytest.mark.parametrize(
        ("runs", "names"),
        [
            (["a: optimizer=sophia_g seed=1,2", "b: seed=2"], ["a-seed=2", "b"]),
            (["a: seed=1", "b: seed=1 log_interval=3 micro_batch_size=1"], ["a", "b"]),
            (["a: seed=1,1"], ["a-seed=1", "a-seed=1"]),
        ],
    )
    def test_two_runs_of_the_same_settings_and_seed(self, runs, names, queue, out, capfd):
        assert queue(runs) == 64
        err = capfd.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        assert " and ".join(names) + " have the same settings and seed=" in err
        assert not out.exists()

    @pytest.mark.parametrize(
        "other", ["seed=2", "data.path=/", "init_from=gpt2", "eval_interval=7", "optimizer.lr=0.5"]
    )
    def test_runs_that_a_comparison_tells_apart_are_none_such(self, other, out, token_files, tmp_path):
        runs = [f"a: data.path={token_files}", f"b: data.path={token_files} {other}"]
        (tmp_path / "queue.yaml").write_text(queue_of(runs))
        assert len(run_queue.read_queue(tmp_path / "queue.yaml", out)) == 2

    def test_results_that_are_damaged(self, queue, out, capfd):
        out.mkdir()
        (out / run_queue.RESULTS).write_text('{"name": "a"}\n[1]\n')
        assert queue(["a: seed=1"]) == 65
        assert "results.jsonl, line 2" in capfd.readouterr().err

    def test_a_folder_of_other_settings(self, queue, out, capfd, tiny):
        assert tiny(out / "a", "seed=1", "hessian.interval=10").code == 0
        before = contents(out)
        assert queue(["b: seed=1", "a: seed=1 optimizer.lr=0.5"]) == 64
        assert "optimizer.lr=0.5" in capfd.readouterr().err
        assert contents(out) == before
