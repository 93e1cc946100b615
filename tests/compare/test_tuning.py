"""The record of tuning: read from study folders, compared by the linter, and damaged ones named."""

import math

import pytest
from synthetic_runs import SOPHIA, write_study

from sophia_train.compare.fairness import unequal
from sophia_train.compare.groups import group_runs
from sophia_train.compare.runs import read_run
from sophia_train.compare.tuning import read_studies


def test_a_study_has_its_trials_and_the_best_after_each(tmp_path):
    """A trial that was given up in the middle has a loss of the middle, which is none of the end."""
    folder = write_study(tmp_path / "adamw", losses=(None, 3.5, 2.9, 3.2, 3.3), pruned=[2])
    (study,) = read_studies(folder)
    assert (study.trials, study.flops, study.optimizer) == (5, 5e12, "AdamW")
    assert study.budget == "5 trials, 5e+12 FLOPs"
    assert [math.isnan(loss) for loss in study.best_losses] == [True, False, False, False, False]
    assert study.best_losses[1:] == [3.5, 3.5, 3.2, 3.2]


def test_the_folder_of_all_optimizers_is_read_and_each_is_named_for_its_classes(tmp_path):
    write_study(tmp_path / "adamw", best=["optimizer.lr=1e-3"])
    write_study(tmp_path / "sophia_g", best=["optimizer.lr=2e-3", "schedule.warmup_steps=10"], **SOPHIA)
    adamw, sophia = read_studies(tmp_path)
    assert (adamw.optimizer, sophia.optimizer) == ("AdamW", "Sophia GNB")
    assert sophia.best == {"optimizer.lr": 2e-3, "schedule.warmup_steps": 10}


def test_a_study_of_which_no_trial_came_to_its_end(tmp_path, compare, make_run):
    folder = write_study(tmp_path / "adamw", losses=(None,))
    (study,) = read_studies(folder)
    assert study.best == {} and math.isnan(study.best_losses[0]) and study.budget.startswith("1 trial,")
    code, out, _ = compare(make_run("a1"), "--tuning", folder, "--out", tmp_path / "out")
    assert code == 0 and "| adamw | AdamW | 1 | 1e+12 | - | - |" in out
    assert not (tmp_path / "out" / "tuning.svg").exists()


@pytest.fixture
def budgets(make_run, tmp_path):
    """The finding about tuning of AdamW against Sophia, from studies of so many trials each."""
    groups = group_runs([read_run(make_run("a1")), read_run(make_run("s1", **SOPHIA))])

    def find(**studies):
        for name, (trials, settings) in studies.items():
            write_study(tmp_path / "tuning" / name, losses=[3.0] * trials, **settings)
        read = read_studies(tmp_path / "tuning") if studies else []
        return {finding.what: finding.values for finding in unequal(groups, read)}.get("tuning budget")

    return find


def test_equal_budgets_are_no_finding(budgets):
    assert budgets(adamw=(8, {}), sophia_g=(8, SOPHIA)) is None


def test_unequal_budgets_are_named_with_both(budgets):
    assert budgets(adamw=(4, {}), sophia_g=(8, SOPHIA)) == {
        "AdamW": ["4 trials, 4e+12 FLOPs"],
        "Sophia GNB": ["8 trials, 8e+12 FLOPs"],
    }


def test_a_group_without_a_record_is_named(budgets):
    assert budgets(adamw=(4, {}))["Sophia GNB"] == ["not recorded"]


def test_without_any_record_nothing_is_compared_and_the_report_says_so(budgets, compare, make_run):
    assert budgets() is None
    assert "With how many trials the settings were found is not known" in compare(make_run("x"))[1]


def test_of_two_studies_the_one_that_found_the_settings_counts(budgets):
    found = {"best": ["optimizer.lr=0.001"]}
    other = {"best": ["optimizer.lr=0.005"], "optimizer.lr": 5e-3}
    assert budgets(a=(4, found), b=(9, other), s=(4, SOPHIA)) is None


def test_the_report_has_a_table_and_the_finding(compare, make_run, tmp_path):
    write_study(tmp_path / "tuning" / "adamw", best=["optimizer.lr=0.001"])
    write_study(tmp_path / "tuning" / "sophia_g", losses=[3.1], **SOPHIA)
    code, out, _ = compare(make_run("a1"), make_run("s1", **SOPHIA), "--tuning", tmp_path / "tuning")
    assert code == 0
    assert "| adamw | AdamW | 4 | 4e+12 | 3.2000 | optimizer.lr=0.001 |" in out
    assert "**tuning budget**: 4 trials, 4e+12 FLOPs (AdamW); 1 trial, 1e+12 FLOPs (Sophia GNB)" in out


@pytest.mark.parametrize(
    "damage, line",
    [
        (lambda text: text[: text.index('"best"')], 6),
        (lambda text: text.replace('"flops": 4', '"flops": -4'), 5),
        (lambda text: text.replace('"best": {', '"best": [], "x": {'), 6),
        (lambda text: text.replace('"overrides": []', '"overrides": 1', 1), 6),
        (lambda text: text.replace('"loss": 3.3', '"loss": "low"'), 37),
        (lambda text: text.replace('"history": [', '"history": [], "x": ['), 11),
        (lambda text: text.replace('"history"', '"trails"'), 1),
        (lambda text: "[]", 1),
        (lambda text: "{}", 1),
    ],
)
def test_a_damaged_record_is_named_with_its_line(compare, make_run, tmp_path, damage, line):
    file = write_study(tmp_path / "adamw") / "tuning.json"
    file.write_text(damage(file.read_text()))
    code, out, err = compare(make_run("a1"), "--tuning", tmp_path / "adamw")
    assert (code, out) == (65, "") and err.count("\n") == 1
    assert f"{file}, line {line}: " in err


def test_a_folder_that_is_no_study_and_a_run_that_is_gone_are_named(compare, make_run, tmp_path):
    run = make_run("a1")
    code, _, err = compare(run, "--tuning", tmp_path / "nothing")
    assert code == 66 and str(tmp_path / "nothing") in err and "tune.py" in err
    folder = write_study(tmp_path / "adamw")
    (folder / "trial_002" / "config.json").unlink()
    code, _, err = compare(run, "--tuning", folder)
    assert code == 66 and "trial_002" in err
