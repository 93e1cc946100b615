"""The benchmark: that it compares equal work, and says what it measured."""

import json
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sophia_train.benchmarks import hessian, train

NAMES = ["sophia_train, AdamW", "transformers, AdamW", "sophia_train, Sophia-G"]
FLAGS = ["train", "--batch-size", "2", "--micro-batch-size", "1", "--repeats", "2"]


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)  # and back to what it was
        yield runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "benchmark.py"))["main"]


@pytest.fixture(scope="module")
def measured(benchmark, tmp_path_factory):
    """The exit code of a small benchmark and the JSON that it wrote."""
    file = tmp_path_factory.mktemp("benchmark") / "train.json"
    return benchmark([*FLAGS, "--json", str(file)]), json.loads(file.read_text())


def test_both_do_the_same_work(measured):
    code, report = measured
    assert code == 0
    losses = {row["name"]: row["losses"] for row in report["results"]}
    assert list(losses) == NAMES
    ours, theirs, sophia = losses.values()
    assert len(ours) == len(theirs) == len(sophia) == 22  # 2 to warm up, 2 repeats of 10
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert report["largest_loss_difference"] == max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert sophia[0] == pytest.approx(ours[0], abs=1e-6)  # the same weights and words
    assert sophia[-1] != pytest.approx(ours[-1], abs=1e-4)  # another optimizer


def test_figures_follow_from_the_times(measured):
    _, report = measured
    tokens, steps = report["settings"]["tokens_per_step"], report["settings"]["steps"]
    assert tokens == 2 * 256
    theirs = report["results"][1]["seconds"]
    for row in report["results"]:
        assert len(row["seconds"]) == report["settings"]["repeats"] == 2
        assert all(second > 0 for second in row["seconds"])
        assert row["step_ms"] == pytest.approx(1000 * statistics.median(row["seconds"]) / steps)
        assert row["tokens_per_second"] == pytest.approx(1000 * tokens / row["step_ms"])
        ratios = [other / own for own, other in zip(row["seconds"], theirs, strict=True)]
        assert row["ratio"] == pytest.approx(statistics.median(ratios))
    assert report["results"][1]["ratio"] == 1


def test_it_says_what_it_ran_on(measured):
    environment = measured[1]["environment"]
    assert environment["threads"] >= 1
    assert {"python", "torch", "transformers", "device", "cpus", "platform"} <= environment.keys()


def test_the_table_fits_a_narrow_terminal(benchmark, measured, capsys):
    Console(width=80).print(train.table(measured[1]))
    print(train.notes(measured[1]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in NAMES:
        assert (
            sum(bool(re.match(rf"{name} +[\d,]+ +[\d.,]+ +\d+\.\d\d +5\.\d+ *$", line)) for line in lines)
            == 1
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "command"),
        (["fly"], "fly"),
        (["train", "--model", "gpt2_micro"], "gpt2_micro"),
        (["train", "--batch-size", "3", "--micro-batch-size", "2"], "micro_batch_size = 2"),
        (["train", "--steps", "5"], "multiple of 10"),
        (["train", "--repeats", "0"], "--repeats"),
        (["train", "--precision", "fp16"], "--precision"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, benchmark, capsys):
    assert benchmark(flags) == 64
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.fixture(scope="module")
def cost(benchmark, tmp_path_factory):
    """The JSON of a small `hessian` benchmark."""
    file = tmp_path_factory.mktemp("benchmark") / "hessian.json"
    runs = ["optimizer=sophia_g hessian.batch_size=1", "optimizer=sophia_empirical_fisher"]
    flags = ["hessian", "--batch-size", "2", "--repeats", "2", "--runs", *runs, "--json", str(file)]
    assert benchmark(flags) == 0
    return json.loads(file.read_text())


def test_the_cost_of_a_hessian_is_that_of_its_passes(cost):
    rows = {row["name"]: row for row in cost["results"]}
    assert list(rows)[0] == "optimizer=adamw" and rows["optimizer=adamw"]["overhead"] == 0
    flops = [row["hessian_flops_share"] for row in rows.values()]
    assert flops == pytest.approx([0, 1 / 21, 0])  # one of 2 sequences, every tenth step
    adamw = rows["optimizer=adamw"]["seconds"]
    for row in rows.values():
        assert len(row["seconds"]) == 2
        ratios = [own / theirs for own, theirs in zip(row["seconds"], adamw, strict=True)]
        assert 1 / (1 + row["overhead"]) == pytest.approx(statistics.median(1 / ratio for ratio in ratios))


def test_the_table_of_costs_fits_a_narrow_terminal(cost, capsys):
    Console(width=80).print(hessian.table(cost))
    print(hessian.notes(cost))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("sophia_g batch_size=1 ") and " 4.8%" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "15"], "multiple of 10"),
        (["--runs", "optimizer=sofia_g"], "sophia_g?"),
        (["--runs", "optimizer=sophia_lite", "--steps", "10"], "multiple of 20"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(flags, message, benchmark, capsys):
    assert benchmark(["hessian", *flags]) == 64
    assert message in capsys.readouterr().err
