"""The real program, from the command line to what it leaves, also when it is killed at any moment."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from support import ENVIRONMENT, TINY, records, result

from sophia_train import checkpoint


def program(*arguments, **options):
    command = [sys.executable, "-m", "sophia_train", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_run_from_text_to_sample(tmp_path):
    """Text is prepared, a model trained, and everything that the documentation names is there."""
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"the {number} quick brown foxes\n" * 40)
    run = tmp_path / "runs" / "first"
    overrides = "data=text data.tokenizer=bytes optimizer=sophia_g_short tracker=console sample_interval=20"
    sizes = "max_steps=40 log_interval=5 eval_interval=20 save_interval=20 schedule.warmup_steps=4"
    arguments = [*TINY, *overrides.split(), *sizes.split(), "optimizer.lr=1e-2", "sample_prompt=the"]
    started = program(*arguments, f"data.path={tmp_path / 'text'}", f"run_dir={run}", cwd=tmp_path)
    out, err = started.communicate(timeout=120)
    assert started.returncode == 0, err
    assert "validation loss" in out and "bigram" in out and str(run) in err

    assert {path.name for path in run.iterdir()} == {
        ".lock", "card.md", "checkpoints", "config.json", "environment.json", "loss.png", "metrics.jsonl",
        "samples", "status.json",
    }  # fmt: skip
    status = json.loads((run / "status.json").read_text())
    baselines = status.pop("baselines")
    assert status == {"code": 0, "reason": "finished", "step": 40}
    assert 0 < baselines["bigram"] < baselines["unigram"] < math.log(256)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    samples = sorted(path.name for path in (run / "samples").iterdir())
    assert samples == ["sample-0000020.txt", "sample-0000040.txt"]
    assert (run / "samples" / samples[0]).read_text().startswith("the")
    assert [path.name for path in (tmp_path / "data").iterdir()][0].startswith("text-bytes-")

    config = json.loads((run / "config.json").read_text())
    assert config["hessian"]["_target_"].endswith("GNB") and config["batch_size"] == 4
    assert checkpoint.verify(checkpoint.latest(run / "checkpoints"))["config"] == config

    metrics = records(run)
    assert [record["step"] for record in metrics] == [0, *range(5, 41, 5)]
    assert all(record["tokens"] == record["step"] * 4 * 8 for record in metrics)
    assert metrics[-1]["val/loss"] < metrics[0]["val/loss"] - 0.3
    assert math.isclose(metrics[0]["val/loss"], math.log(257), rel_tol=0.05)  # nothing known: uniform
    costs = [record["flops"] for record in metrics]
    assert costs == sorted(costs) and costs[0] == 0
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    names = "train/loss val/loss optim/lr optim/grad_norm optim/grad_clipped optim/unclipped_fraction "
    names += "optim/hessian_norm optim/hessian_negative_fraction optim/momentum_norm optim/param_norm "
    names += "perf/tokens_per_second perf/step_seconds perf/hessian_share"
    assert set(names.split()) < set(line)


def test_a_run_outlives_the_reader_of_its_output(token_files, tmp_path):
    """As with `python -m sophia_train ... | head -3`."""
    arguments = ["data=token_files", f"data.path={token_files}", "data.tokenizer=bytes", "tracker=console"]
    started = program(*TINY, *arguments, "max_steps=10", f"run_dir={tmp_path}", cwd=tmp_path)
    started.stdout.close()
    with started.stderr as pipe:
        err = pipe.read()
    assert started.wait(timeout=60) == 0 and "Error" not in err, err
    assert result(tmp_path)["status"]["reason"] == "finished"


def test_every_optimizer_writes_the_same_metrics(tiny, tmp_path):
    names = {}
    for optimizer in ("sophia_g", "adamw"):
        folder = tmp_path / optimizer
        arguments = [f"optimizer={optimizer}"] + ["~hessian.interval"] * (optimizer == "adamw")
        assert tiny(folder, *arguments).code == 0
        names[optimizer] = {name for record in records(folder) for name in record}
    only_sophia = "optim/hessian_norm optim/hessian_negative_fraction optim/hessian_zero_fraction "
    only_sophia += "optim/hessian_rejected optim/unclipped_fraction optim/gamma hessian/age "
    only_sophia += " ".join(f"hessian/quantile_{level}" for level in ("01", "10", "50", "90", "99")) + " "
    only_sophia += " ".join(f"hessian/unclipped_fraction/{layer}" for layer in ("wte", "wpe", "h.0", "ln_f"))
    assert names["sophia_g"] - names["adamw"] == set(only_sophia.split())
    assert names["adamw"] < names["sophia_g"]


def test_both_optimizers_see_the_same_first_loss_and_text(tiny, tmp_path):
    """The Hessian's pass leaves data order, weights at the start and the training loss alone."""
    first = {}
    for optimizer in ("sophia_g", "adamw"):
        folder = tmp_path / optimizer
        arguments = [f"optimizer={optimizer}"] + ["~hessian.interval"] * (optimizer == "adamw")
        assert tiny(folder, *arguments, "max_steps=3").code == 0
        first[optimizer] = [(r.get("train/loss"), r.get("val/loss")) for r in records(folder)[:2]]
    assert first["sophia_g"] == first["adamw"]


def test_seeds_differ_and_repeat(tiny, tmp_path):
    found = {}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        assert tiny(tmp_path / name, f"seed={seed}").code == 0
        found[name] = result(tmp_path / name)
    assert found["one"] == found["again"]
    assert found["one"]["metrics"][0] != found["two"]["metrics"][0]


def test_dry_run_writes_nothing(tiny, tmp_path):
    done = tiny(tmp_path / "run", "dry_run=true")
    assert done.code == 0 and done.errors == []
    for word in ("parameters", "tokens", "FLOPs", "steps", "memory", str(tmp_path / "run")):
        assert word in "".join(done.out.split()), word  # long paths go over several lines
    assert list(tmp_path.iterdir()) == []


def test_dry_run_estimates_what_recomputed_blocks_need(tiny, tmp_path):
    overrides = [f"run_dir={tmp_path}/r", "model.n_layer=24", "batch_size=4000", "micro_batch_size=4000"]
    needed = {}
    for value in ("none", "blocks"):
        done = tiny(tmp_path / "r", *overrides, f"activation_checkpointing={value}", "dry_run=true")
        (words,) = re.findall(r"about ([\d.]+) GB", " ".join(done.out.split()))
        needed[value] = float(words)
        assert ("blocks recomputed" in " ".join(done.out.split())) is (value == "blocks")
    assert needed["blocks"] < needed["none"] / 3


@pytest.mark.parametrize("optimizer", ["sophia_g", "sophia_h"])
def test_recomputed_blocks_make_the_same_run_also_from_half_way(optimizer, tiny, tmp_path):
    overrides = ["model.dropout=0.2", "model.n_layer=2", f"optimizer={optimizer}", "hessian.batch_size=2"]
    blocks = "activation_checkpointing=blocks"
    assert tiny(tmp_path / "none", *overrides).code == 0
    assert tiny(tmp_path / "blocks", *overrides, blocks).code == 0
    assert tiny(tmp_path / "both", *overrides, "stop_at_step=3").code == 75
    assert tiny(tmp_path / "both", *overrides, blocks).code == 0
    expected = result(tmp_path / "none")
    assert result(tmp_path / "blocks") == expected and result(tmp_path / "both") == expected


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sophia_g", "adamw"])
def test_killed_at_random_moments(optimizer, tiny, runs, token_files, tmp_path):
    """Each of 20 runs is killed by the clock again and again until it gets through."""
    sizes = "max_steps=40 save_interval=2 log_interval=1 eval_interval=5 sample_interval=10 sample_tokens=20"
    arguments = [*TINY, *sizes.split(), f"optimizer={optimizer}", f"data.path={token_files}"]
    arguments += ["~hessian.interval"] * (optimizer == "adamw")
    assert runs(*arguments, f"run_dir={tmp_path / 'first'}").code == 0
    begin = time.monotonic()
    assert runs(*arguments, f"run_dir={tmp_path / 'second'}").code == 0
    seconds = time.monotonic() - begin  # without the start of what runs them
    expected, moments = result(tmp_path / "first"), random.Random(0)
    assert result(tmp_path / "second") == expected
    killed = 0
    for number in range(20):
        folder = tmp_path / str(number)
        for _ in range(3):
            started = runs.start(*arguments, f"run_dir={folder}")
            time.sleep(moments.uniform(0, seconds))  # the moment itself is what is tested, nothing is awaited
            os.kill(started[0], signal.SIGKILL)
            code = runs.wait(started).code
            assert code in (-signal.SIGKILL, 0)
            killed += code != 0
        assert runs(*arguments, f"run_dir={folder}").code == 0
        assert result(folder) == expected, number
    assert killed >= 20


@pytest.mark.slow
def test_the_program_killed_by_its_terminal(tmp_path, token_files):
    """A real interpreter gets the signal of Ctrl-C: it saves, says so in one line, and can be continued."""
    arguments = [
        *TINY,
        f"data.path={token_files}",
        "max_steps=3000",
        "eval_interval=3000",
        "save_interval=3000",
    ]
    started = program(*arguments, f"run_dir={tmp_path}")
    while (
        not (tmp_path / "metrics.jsonl").exists()
        or b'"step": 2' not in (tmp_path / "metrics.jsonl").read_bytes()
    ):
        assert started.poll() is None
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 75 and "SIGINT" in err and "Traceback" not in err
    assert out == "" and len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    step = json.loads((tmp_path / "status.json").read_text())["step"]
    assert checkpoint.latest(tmp_path / "checkpoints").name == f"step_{step:08d}"
