"""Comparing runs on the command line: grouping, the tables, and files that are not of a run."""

import json
import math
import sys

import pytest
from synthetic_runs import LOSSES, SOPHIA

from sophia_train.compare.groups import group_runs, optimizer_name
from sophia_train.compare.report import compare_groups
from sophia_train.compare.runs import read_run
from sophia_train.compare.statistics import t_interval
from sophia_train.errors import ConfigError


def cells(text, heading):
    """The table under a heading, by the first cell of each row."""
    lines = text.partition(f"## {heading}")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_tables(compare, two_groups):
    adamw, sophia = two_groups
    code, out, _ = compare(*adamw, *sophia)
    assert code == 0
    final = cells(out, "Final validation loss")
    assert final["AdamW"][:5] == ["baseline", "-", "3.1000", "2.8516 to 3.3484", "3 of 3"]
    assert final["Sophia GNB"][:3] == ["-0.2000", "-0.4484 to +0.0484", "2.9000"]
    assert final["Sophia GNB"][4] == "3 of 3"
    # by seed the targets are 3.0, 3.1, 3.2, where Sophia is at steps 87.5, 75, 66.7, the baseline at 100
    speed = cells(out, "Speed-up on the way to the final loss of AdamW")
    found = t_interval([math.log(100 / step) for step in (87.5, 75, 200 / 3)])
    mean, low, high = (math.exp(value) for value in (found.mean, found.low, found.high))
    assert speed["Sophia GNB"] == ["3 of 3", *[f"{mean:.2f} ({low:.2f} to {high:.2f})"] * 4]
    assert speed["AdamW"][:2] == ["3 of 3", "baseline"]
    assert out.partition("## Unequal beyond")[2].split("\n\n")[2] == "Nothing."


def lengths(make_run, ends, **settings):
    """Runs of 50 and of 100 steps, by their final losses for each seed."""
    folders = []
    for steps, losses in ends.items():
        for seed, loss in enumerate(losses, 1):
            curve = {"max_steps": steps, "interval": steps, "losses": (5.0, loss)}
            name = f"{'s' if settings else 'a'}{steps}_{seed}"
            folders.append(make_run(name, seed=seed, **curve, **settings))
    return folders


@pytest.mark.parametrize(
    ("half", "words"),
    [
        ((3.1, 3.2, 3.35), "does not match"),
        ((2.9, 3.0, 3.15), "wins"),
        ((2.98, 3.12, 3.21), "no difference shown with 0.50 of the steps; one of 0.0"),
    ],
)
def test_half_the_steps_are_said_in_the_same_breath(half, words, compare, make_run):
    adamw = lengths(make_run, {100: (3.0, 3.1, 3.2)})
    _, out, _ = compare(*adamw, *lengths(make_run, {50: half}, **SOPHIA))
    (verdict,) = [line for line in out.splitlines() if line.startswith("- **Sophia GNB 50 steps**")]
    assert words in verdict and "of the steps" in verdict and "AdamW 100 steps" in verdict


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        # on the line between 50 steps and 100, loss against log tokens: at 100 / 2 ** 0.5
        ({50: (3.1, 3.2, 3.3), 100: (2.9, 3.0, 3.1)}, "1.41 (1.41 to 1.41)"),
        ({50: (3.3, 3.4, 3.5), 100: (3.1, 3.2, 3.3)}, "< 1.00"),
        ({50: (2.9, 3.0, 3.1), 100: (2.8, 2.9, 3.0)}, "> 2.00"),
        ({50: (2.9, 3.2, 3.3), 100: (2.8, 3.2, 3.3)}, "-"),  # bounds of both sides
    ],
)
def test_the_speed_up_by_ends_of_schedules(ends, expected, compare, make_run):
    adamw = lengths(make_run, {50: (3.4, 3.5, 3.6), 100: (3.0, 3.1, 3.2)})
    _, out, _ = compare(*adamw, *lengths(make_run, ends, **SOPHIA), "--baseline", adamw[-1])
    rows = cells(out, "Length of the schedule")
    assert rows["AdamW"] == ["-", "50: 3.5000, 100: 3.1000"]
    assert rows["Sophia GNB"][0] == expected
    assert (f"by the ends of its schedules: {expected}." in out) == (expected != "-")


def test_settings_of_one_optimizer_are_compared_with_its_first(compare, make_run):
    adamw = [make_run(f"a{s}", seed=s) for s in (1, 2)]
    sophia = [make_run(f"s{s}", seed=s, losses=(5.0, 3.3), interval=100, **SOPHIA) for s in (1, 2)]
    other = {**SOPHIA, "gamma": {"_target_": "sophia_train.optim.gamma.GammaController"}}
    sophia += [make_run(f"c{s}", seed=s, losses=(5.0, 3.2 + s / 20), interval=100, **other) for s in (1, 2)]
    _, out, _ = compare(*adamw, *sophia)
    ((label, row),) = cells(out, "Settings of one optimizer").items()
    assert "GammaController" in label and row[0] == "-0.0250"


def test_seconds_are_of_steady_training(make_run):
    """Neither the start nor an interruption is in them; refreshes of the Hessian count by their number."""
    folder = make_run("a")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [(1.0, 0.0), (64.0, 0.0), (64.0, 0.0), (32.0, 0.5)]  # tokens/s, and the Hessian's share
    for record, (speed, share) in zip(records[1:], logged, strict=True):
        record |= {"perf/tokens_per_second": speed, "perf/hessian_share": share, "seconds": 1e4}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    tokens = read_run(folder).curve[-1]["tokens"]
    assert read_run(folder).curve[-1]["seconds"] == pytest.approx(tokens * (1 / 64 + 1 / 64 / 4))


def test_another_baseline_and_runs_that_never_get_there(compare, two_groups):
    adamw, sophia = two_groups
    code, out, _ = compare(*adamw, *sophia, "--baseline", sophia[1])
    assert code == 0
    assert cells(out, "Final")["AdamW"][0] == "+0.2000"
    assert cells(out, "Speed-up on the way")["AdamW"] == ["0 of 3", *["< 1.00"] * 4]


def test_a_target_that_only_the_others_reach(compare, two_groups):
    adamw, sophia = two_groups
    _, out, _ = compare(*adamw, *sophia, "--target", "2.95")
    assert cells(out, "Speed-up on the way to a loss of 2.9500")["Sophia GNB"][1].startswith("> 1.")
    code, _, err = compare(*adamw, "--target", "5.05")
    assert code == 64 and "lower --target" in err
    assert compare(*adamw, "--target", "0")[0] == 64


def test_a_cut_run_and_a_diverged_one_are_listed_and_not_in_the_means(compare, make_run):
    folders = [make_run("a1", seed=1), make_run("a2", seed=2, losses=LOSSES[:3])]
    folders.append(make_run("a3", seed=3, losses=(*LOSSES[:4], float("nan"))))
    code, out, _ = compare(*folders)
    assert code == 0
    assert cells(out, "Final validation loss")["AdamW"][2:5] == ["3.0000", "-", "1 of 3"]
    assert cells(out, "Speed-up")["AdamW"][0] == "1 of 3"
    assert "a2 (AdamW): cut at step 50 of 100, loss 3.5000 mid-schedule (stopped)" in out
    assert "a3 (AdamW): its final loss is not finite" in out


def test_a_run_that_has_just_begun_bounds_nothing(compare, make_run):
    code, out, _ = compare(make_run("a1"), make_run("s1", losses=LOSSES[:1], **SOPHIA))
    assert code == 0
    assert cells(out, "Speed-up")["Sophia GNB"] == ["0 of 1", "-", "-", "-", "-"]
    assert cells(out, "Final")["Sophia GNB"][:5] == ["-", "-", "-", "-", "0 of 1"]


def test_a_baseline_without_an_end_is_refused(compare, make_run):
    code, out, err = compare(make_run("a1", losses=LOSSES[:3]), make_run("s1", **SOPHIA))
    assert (code, out) == (64, "") and "--baseline" in err


def test_runs_are_grouped_by_all_but_seed_name_and_machine(make_run):
    folders = [make_run(f"a{s}", seed=s, micro_batch_size=s, processes=s, save_interval=s) for s in (1, 2)]
    folders += [
        make_run("faster", **{"optimizer.lr": 2e-3}),
        make_run("half", max_steps=50, losses=LOSSES[:3]),
    ]
    groups = group_runs(read_run(folder) for folder in folders)
    assert [[run.path.name for run in group.runs] for group in groups] == [["a1", "a2"], ["faster"], ["half"]]
    labels = [group.label for group in groups]
    assert labels == ["AdamW 100 steps lr=0.001", "AdamW 100 steps lr=0.002", "AdamW 50 steps"]


def test_groups_stand_by_optimizer_and_length_however_runs_are_given(make_run):
    folders = [
        make_run("a_half", max_steps=50, losses=LOSSES[:3]),
        make_run("s", **SOPHIA),
        make_run("a"),
        make_run("s_half", max_steps=50, losses=LOSSES[:3], **SOPHIA),
    ]
    labels = [group.label for group in group_runs(map(read_run, folders))]
    assert labels == ["AdamW 100 steps", "AdamW 50 steps", "Sophia GNB 100 steps", "Sophia GNB 50 steps"]


def test_runs_on_other_tokens_are_another_group_and_moved_tokens_are_not(make_run):
    folders = [make_run("a1", seed=1), make_run("a2", seed=2, **{"data.path": "moved"})]
    folders.append(make_run("b", seed=3, data={"train": "e" * 64, "validation": "f" * 64}))
    groups = group_runs(read_run(folder) for folder in folders)
    assert [group.label for group in groups] == ["AdamW (a1)", "AdamW (b)"]


def test_the_same_run_twice_is_no_second_seed(compare, make_run):
    first, second = make_run("a1"), make_run("copy")
    code, _, err = compare(first, second)
    assert code == 64 and "seed=1" in err and str(second) in err
    assert compare(first, first)[0] == 0  # the same folder, named twice


def replace_line(path, number, line):
    lines = path.read_text().splitlines(keepends=True)
    lines[number - 1] = line
    path.write_text("".join(lines))


@pytest.mark.parametrize(
    "number, line",
    [
        (3, "{\n"),
        (2, "not JSON\n"),
        (2, "[1, 2]\n"),
        (4, '{"loss": 3.0, "iter": 5}\n'),
        (2, '{"step": 25, "val/loss": 3.0}\n'),
        (2, '{"step": 25, "tokens": "many", "seconds": 1, "flops": 1, "val/loss": 3.0}\n'),
        (2, '{"step": 25, "tokens": "NaN", "seconds": 1, "flops": 1, "val/loss": 3.0}\n'),
        (2, '{"step": 25, "tokens": 1, "seconds": 1, "flops": 1, "val/loss": "low"}\n'),
        (2, f'{{"step": 25, "tokens": 1{"0" * 400}, "seconds": 1, "flops": 1}}\n'),
        (3, '{"step": 25, "tokens": 1, "seconds": 1, "flops": 1, "val/loss": 3.0}\n'),
        (4, '{"step": 25, "tokens": 1, "seconds": 1, "flops": 1, "val/loss": 3.0}\n'),
        (5, '{"step": 100, "tokens": 6400, "seconds": 50.0, "flo'),
    ],
)
def test_cut_and_foreign_metrics_name_file_and_line(compare, make_run, number, line):
    folder = make_run("a1")
    replace_line(folder / "metrics.jsonl", number, line)
    code, out, err = compare(folder)
    assert (code, out) == (65, "")
    assert f"{folder / 'metrics.jsonl'}, line {number}: " in err and err.count("\n") == 1


def test_other_things_than_runs_are_named(compare, make_run, tmp_path):
    code, _, err = compare(tmp_path / "nothing")
    assert code == 66 and str(tmp_path / "nothing") in err
    folder = make_run("a1")
    config = json.loads((folder / "config.json").read_text())
    for key, value in {"seed": "one", "max_steps": None, "batch_size": None, "optimizer": {}}.items():
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        code, _, err = compare(folder)
        assert code == 65 and str(folder / "config.json") in err
    (folder / "config.json").write_text('{\n"seed": 1,\n')
    assert "config.json, line 3: " in compare(folder)[2]
    (folder / "config.json").unlink()
    assert compare(folder)[0] == 66
    (folder / "metrics.jsonl").write_text('{"step": 0, "tokens": 0, "seconds": 0, "flops": 0}\n')
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err = compare(folder)
    assert code == 65 and "no val/loss" in err


def test_win_rate_and_overhead_are_means_over_steps_and_runs(make_run):
    folders = [make_run(f"s{seed}", seed=seed, **SOPHIA) for seed in (1, 2)]
    for folder, rate in zip(folders, (0.2, 0.4), strict=True):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for number, record in enumerate(records[1:]):
            record |= {"optim/unclipped_fraction": rate + 0.1 * (number % 2), "perf/hessian_share": 0.06}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    groups = group_runs(map(read_run, folders))
    (row,) = compare_groups(groups, groups[0]).rows
    assert row.win_rate == pytest.approx(0.35) and row.hessian_share == pytest.approx(0.06)


def test_a_baseline_that_diverged_is_refused(make_run):
    groups = group_runs([read_run(make_run("a1", losses=(*LOSSES[:4], float("nan"))))])
    with pytest.raises(ConfigError, match="finite"):
        compare_groups(groups, groups[0])


def test_a_missing_scipy_is_named_with_its_installation(compare, make_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    code, _, err = compare(make_run("a1", seed=1), make_run("a2", seed=2))
    assert code == 69 and "sophia_train[compare]" in err


def test_a_label_lists_few_settings_and_else_names_the_folder(make_run):
    many = {"lr": 5e-3, "betas": [0.9, 0.99], "eps": 1e-10, "fused": True}
    folders = [make_run("a1"), make_run("b1", **{f"optimizer.{key}": value for key, value in many.items()})]
    assert [group.label for group in group_runs(map(read_run, folders))] == ["AdamW (a1)", "AdamW (b1)"]


def test_optimizers_are_named_for_their_classes():
    names = {"optimizer._target_": "torch.optim.Muon", "optimizer.lr": 1e-3}
    others = {"optimizer.others.adamw._target_": "torch.optim.AdamW"}
    hessian = {"hessian._target_": "sophia_train.hessian.empirical_fisher.EmpiricalFisher"}
    assert optimizer_name({**names, "hessian._target_": "x.NoHessian"}) == "Muon"
    assert optimizer_name({**names, **others}) == "Muon + AdamW"
    sophia = {"optimizer._target_": "sophia_train.optim.sophia.Sophia", **hessian}
    assert optimizer_name({**sophia, **others}) == "Sophia EmpiricalFisher + AdamW"
