"""Traces of a few steps: what is in them, and that they change nothing else."""

import gzip
import json
import re

import pytest
from support import result

from sophia_train.profiler import traced

STEP = "Optimizer.step#Sophia.step"


def names(path):
    return [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """A run without a trace."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert tiny(folder, "max_steps=14").code == 0
    return folder


def test_a_trace_has_three_steps_and_a_refresh(tiny, plain, tmp_path):
    ended = tiny(tmp_path, "max_steps=14", "profile=true")
    assert ended.code == 0
    (trace,) = (tmp_path / "profile").glob("*.gz")
    assert trace.name == "steps_00000010-00000012.json.gz"
    (line,) = [line for line in ended.err.splitlines() if str(trace) in line]
    assert "ui.perfetto.dev" in line
    (budget,) = (tmp_path / "profile").glob("*.txt")
    assert budget.name == "steps_00000010-00000012.txt" and str(budget) in ended.err
    total, *lines = budget.read_text().splitlines()
    assert sum(float(each.split()[0]) for each in lines) == pytest.approx(float(total.split()[0]), rel=0.01)
    spent = [float(each.split()[0]) for each in lines]
    assert spent == sorted(spent, reverse=True)
    assert any(re.search(r" \d+\.\d x  aten::mm$", each) for each in lines)
    assert not any(each.endswith("x  hessian") for each in lines)  # it spans others
    assert {"aten::mm", "aten::embedding", "hessian"} <= set(names(trace))
    assert names(trace).count(STEP) == 3
    assert result(tmp_path) == result(plain)  # weights, optimizer state and metrics, bitwise


def test_it_says_between_which_steps_it_has_written(tmp_path):
    with traced(tmp_path, 0, None) as between_steps:
        written = [between_steps() for _ in range(20)]
    assert [step for step, has in enumerate(written, 1) if has] == [12]
    assert [path.name for path in tmp_path.glob("*.gz")] == ["steps_00000010-00000012.json.gz"]


def test_nothing_is_written_unless_asked_for(plain):
    assert not (plain / "profile").exists()


def test_a_resumed_run_counts_from_where_it_goes_on(tiny, tmp_path):
    overrides = ["max_steps=17", "hessian.interval=5"]
    assert tiny(tmp_path, *overrides, "stop_at_step=3").code == 75
    assert tiny(tmp_path, *overrides, "profile=true").code == 0
    (trace,) = (tmp_path / "profile").glob("*.gz")
    assert trace.name == "steps_00000015-00000017.json.gz"  # 3 + 10 steps, and on to a multiple of 5
    assert "hessian" in names(trace)


@pytest.mark.parametrize(("end", "code"), [("max_steps=11", 0), ("stop_at_step=11", 75)])
def test_a_run_that_ends_on_the_way_leaves_what_there_is(end, code, tiny, tmp_path):
    assert tiny(tmp_path, "max_steps=20", end, "profile=true").code == code
    (trace,) = (tmp_path / "profile").glob("*.gz")
    assert trace.name == "steps_00000010-00000011.json.gz"
    assert names(trace).count(STEP) == 2


@pytest.mark.parametrize("steps", [6, 8, 9])  # before the profiler warms up, and while it does
def test_a_run_too_short_for_a_trace_says_so(steps, tiny, tmp_path):
    ended = tiny(tmp_path, f"max_steps={steps}", "profile=true")
    assert ended.code == 0 and "Warning" not in ended.err
    assert "profile=true: the run ended before step 10" in ended.err
    assert not (tmp_path / "profile").exists()
