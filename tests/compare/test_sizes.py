"""Runs of several model sizes, and runs that are compared before their end."""

import json

import pytest
import torch
from synthetic_runs import LOSSES, SOPHIA
from test_compare_script import cells

from sophia_train.compare.groups import group_runs, size_name
from sophia_train.compare.report import compare_sizes
from sophia_train.compare.runs import read_run
from sophia_train.errors import ConfigError
from sophia_train.models.gpt2 import GPT2, GPT2Config

SIZES = {
    1: {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 257},
    2: {"n_layer": 4, "n_head": 4, "n_embd": 64, "block_size": 16, "vocab_size": 257},
}


@pytest.fixture
def four_groups(make_run):
    """AdamW and Sophia at two sizes: Sophia at the loss of AdamW's end after 75 and after 50 steps of 100."""
    early = (5.0, 4.0, 2.8, 2.7, 2.6)
    losses = {("a", 1): LOSSES, ("a", 2): early, ("s", 1): (5.0, 4.0, 3.5, 3.0, 2.9)}
    losses["s", 2] = (5.0, 3.0, 2.6, 2.5, 2.4)
    return [
        make_run(f"{name}{size}", losses=each, model=SIZES[size], **(SOPHIA if name == "s" else {}))
        for (name, size), each in losses.items()
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_counted_as_the_model_has_them(make_run, bias):
    for number, sizes in SIZES.items():
        run = read_run(make_run(f"a{number}", model={**sizes, "bias": bias}))
        with torch.device("meta"):
            model = GPT2(GPT2Config(**sizes, bias=bias))
        assert run.parameters == sum(p.numel() for p in model.parameters())


def test_sizes_are_written_as_people_say_them():
    assert [size_name(n) for n in (999, 21_504, 124_373_760, 1_557_686_400)] == [
        "999",
        "21.5k",
        "124M",
        "1.56B",
    ]


def test_each_size_has_its_own_baseline_and_target(four_groups):
    groups = group_runs(map(read_run, four_groups))
    small, large = compare_sizes(groups, groups[0])
    assert (small.baseline, large.baseline) == (groups[0].label, groups[1].label)
    assert [each.baseline_row.loss for each in (small, large)] == [3.0, 2.6]
    ups = [
        row.speed_ups["tokens"].interval.mean
        for comparison in (small, large)
        for row in comparison.rows
        if row.speed_ups
    ]
    assert ups == pytest.approx([100 / 75, 2.0])
    assert small.findings == large.findings == []


def test_the_report_and_figures_of_several_sizes(compare, four_groups, tmp_path):
    code, out, _ = compare(*four_groups, "--out", tmp_path / "out")
    assert code == 0
    small, large = (size_name(read_run(four_groups[n]).parameters) for n in (0, 1))
    rows = cells(out, "Against model size")
    assert rows["AdamW"] == ["3.0000", "baseline", "2.6000", "baseline"]
    assert rows["Sophia GNB"] == ["2.9000", "1.33", "2.4000", "2.00"]
    assert f"## {small} parameters" in out and f"## {large} parameters" in out
    names = {path.name for path in (tmp_path / "out").glob("*.svg")}
    by_axis = {
        f"loss_{axis}_{size}" for axis in ("step", "tokens", "seconds", "flops") for size in (small, large)
    }
    by_axis |= {f"differences_{size}" for size in (small, large)}
    assert names == {f"{name}.svg" for name in (*by_axis, "loss_size", "speed_up_size")}


def test_a_size_without_the_baselines_optimizer_is_not_compared(compare, four_groups):
    code, out, _ = compare(four_groups[0], four_groups[2], four_groups[3])
    assert code == 0
    assert "nothing to compare with" in out
    assert cells(out, "Against model size")["Sophia GNB"] == ["2.9000", "1.33", "2.4000", "-"]


def test_of_several_candidates_the_nearest_in_settings_is_the_baseline(make_run):
    folders = [
        make_run("small", model=SIZES[1]),
        make_run("faster", model=SIZES[2], **{"optimizer.lr": 5e-3, "schedule.warmup_steps": 5}),
        make_run("same", model=SIZES[2]),
    ]
    groups = group_runs(map(read_run, folders))
    assert "lr=0.001" in compare_sizes(groups, groups[0])[1].baseline


def test_one_target_for_several_sizes_is_refused(four_groups, compare):
    code, _, err = compare(*four_groups, "--target", "2.9")
    assert code == 64 and "--target" in err
    groups = group_runs(map(read_run, four_groups))
    with pytest.raises(ConfigError, match="one loss"):
        compare_sizes(groups, groups[0], 2.9)


def test_at_a_step_nothing_of_what_came_after_is_seen(compare, two_groups):
    adamw, sophia = two_groups
    for folder in (*adamw, *sophia):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line["perf/hessian_share"] = 0.1 if line["step"] <= 50 else 0.9
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = compare(*adamw, *sophia, "--at-step", "50")
    assert code == 0
    losses = cells(out, "Validation loss at step 50, mid-schedule")
    assert losses["AdamW"][2] == "3.6000" and losses["AdamW"][4] == "3 of 3"
    assert losses["Sophia GNB"][2] == "3.4000"
    assert losses["AdamW"][-1] == "10.0 %"
    assert cells(out, "Speed-up on the way to the loss of AdamW at step 50")["Sophia GNB"][0] == "3 of 3"


def test_the_end_as_a_step_is_not_mid_schedule_for_a_run_that_ends_there(compare, make_run):
    half = make_run("half", max_steps=50, losses=LOSSES[:3])
    _, out, _ = compare(make_run("whole"), half, "--at-step", "50")
    assert "**mid-schedule**: step 50 of 100 (AdamW 100 steps); step 50 of 50 (AdamW 50 steps)" in out


def test_at_the_same_step_no_length_is_compared(compare, make_run):
    """What is not the end of a schedule says nothing of its length, and both have made as many steps."""
    adamw = [make_run(f"a{steps}", interval=10, max_steps=steps, losses=(5, 4, 3)) for steps in (100, 50)]
    sophia = [
        make_run(f"s{steps}", interval=10, max_steps=steps, losses=(5, 4, 2.9), **SOPHIA)
        for steps in (100, 50)
    ]
    _, out, _ = compare(*adamw, *sophia, "--at-step", "20")
    assert "Length of the schedule" not in out and "of the steps" not in out and "ends of its" not in out


def test_steps_that_a_run_does_not_have_are_named(compare, make_run):
    run = make_run("a1")
    code, _, err = compare(run, "--at-step", "101")
    assert code == 64 and "101" in err and str(run) in err
    assert compare(run, "--at-step", "0")[0] == 64
    late = make_run("late", losses=LOSSES)
    (late / "metrics.jsonl").write_text("".join((late / "metrics.jsonl").read_text().splitlines(True)[2:]))
    code, _, err = compare(late, "--at-step", "30")
    assert code == 64 and "not evaluated up to --at-step 30" in err
    code, out, _ = compare(run, make_run("s1", interval=20, max_steps=80, **SOPHIA), "--at-step", "75")
    assert code == 0
    assert "s1 (Sophia GNB 80 steps): not evaluated at step 75" in out
