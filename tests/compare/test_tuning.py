"""The record of tuning: read from study folders, compared by the linter, and damaged ones named."""

import json
import math

import pytest
from synthetic_runs import CONFIG, DATA, SOPHIA, write_run, write_study

from sophia_train.compare.fairness import unequal
from sophia_train.compare.groups import group_runs
from sophia_train.compare.runs import read_run
from sophia_train.compare.tuning import read_studies
from sophia_train.tuning.record import Budget, best_of, trial_folder, write_trials
from sophia_train.tuning.search import Trial

LR = {"optimizer.lr": "log:0.0001..0.005"}


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


def test_two_groups_without_a_record_do_not_agree(budgets):
    lion = {"optimizer": {"_target_": "pytorch_optimizer.Lion", "lr": 1e-4}}
    assert budgets(lion=(4, lion)) == {"AdamW": ["not recorded"], "Sophia GNB": ["not recorded"]}


def test_without_any_record_nothing_is_compared_and_the_report_says_so(budgets, compare, make_run):
    assert budgets() is None
    assert "With how many trials the settings were found is not known" in compare(make_run("x"))[1]


def test_of_two_studies_the_one_that_found_the_settings_counts(budgets):
    found = {"best": ["optimizer.lr=0.001"]}
    other = {"best": ["optimizer.lr=0.005"], "optimizer.lr": 5e-3}
    assert budgets(a=(4, found), b=(9, other), s=(4, SOPHIA)) is None


def write_tuning(folder, tried, losses, *, budget=None, space=LR, data=DATA, trial_flops=1e12, **settings):
    """Write the tuning of one optimizer by the code of `scripts/tune.py`, and its best run.

    Args:
        folder: of the optimizer.
        tried: the overrides of each trial.
        losses: of each trial; infinite for one that diverged.
        budget: trials if there is none.
        space: in words, by key.
        data: digests of the best run.
        trial_flops: of each trial.
        settings: of the best run, its tuned ones with them.
    """
    trials = [
        Trial(
            overrides=overrides.split(),
            loss=loss,
            flops=trial_flops,
            seconds=1.0,
            state="complete" if math.isfinite(loss) else "failed",
        )
        for overrides, loss in zip(tried, losses, strict=True)
    ]
    budget = budget or Budget(trials=len(trials))
    write_trials(folder, folder.name, {"space": space}, trials, budget, trial_flops)
    write_run(trial_folder(folder, best_of(trials) or 0), data=data, **settings)


@pytest.fixture
def found(make_run, tmp_path):
    """What is said of AdamW at lr=1e-3 against Sophia at 2e-3, by the tuning of each: rates and losses.

    What is given is of AdamW: `write_tuning`'s arguments, and of its run as `ran`.
    """

    def find(tried=(5e-4, 1e-3, 2e-3), losses=(3.3, 3.2, 3.4), sophia=None, ran=None, **adamw):
        folder = tmp_path / "tuning"
        tried = [each if isinstance(each, str) else f"optimizer.lr={each}" for each in tried]
        write_tuning(folder / "adamw", tried, losses, **adamw)
        rates = ["optimizer.lr=0.001", "optimizer.lr=0.002", "optimizer.lr=0.005"]
        write_tuning(folder / "sophia_g", rates, (3.3, 3.2, 3.4), **{**SOPHIA, **(sophia or {})})
        runs = [read_run(make_run("a1", **(ran or {}))), read_run(make_run("s1", **SOPHIA))]
        findings = unequal(group_runs(runs), read_studies(folder))
        return {finding.what: dict(finding.values) for finding in findings}

    return find


ADAMW = CONFIG["optimizer"]
EDGE = "best of tuning at an edge of what was tried"
OTHERWISE = "tuning with other settings than the runs have"


class TestSettings:
    def test_runs_that_are_what_an_equal_search_found_are_fair(self, found):
        assert found() == {}

    def test_a_run_that_is_not_what_tuning_found_is_said_and_has_no_budget(self, found):
        findings = found(ran={"optimizer": {**ADAMW, "lr": 0.09}})
        assert findings == {
            "tuning": {"AdamW": ["ran with optimizer.lr=0.09, its tuning found 0.001"]},
            "tuning budget": {
                "AdamW": ["none: not what its tuning found"],
                "Sophia GNB": ["3 trials, 3e+12 FLOPs"],
            },
        }

    def test_each_departure_is_in_it(self, found):
        tried = [
            "optimizer.lr=0.0005 optimizer.weight_decay=0.2",
            "optimizer.lr=0.001 optimizer.weight_decay=0.1",
        ]
        ran = {"optimizer": {**ADAMW, "lr": 0.09, "weight_decay": 0.3}}
        words = "ran with optimizer.lr=0.09 and optimizer.weight_decay=0.3, its tuning found 0.001 and 0.1"
        assert found(tried, (3.3, 3.2), ran=ran)["tuning"] == {"AdamW": [words]}

    def test_a_search_of_which_no_trial_came_to_its_end_found_nothing(self, found):
        findings = found(losses=[math.inf] * 3)
        assert findings["tuning"] == {"AdamW": ["its tuning found nothing: no trial came to its end"]}
        assert findings["tuning budget"]["AdamW"] == ["none: not what its tuning found"]

    def test_a_tuned_choice_of_a_group_is_all_that_is_in_it(self, found, tmp_path):
        wsd = {"_target_": "sophia_train.optim.schedules.WSD", "warmup_steps": 10, "decay_fraction": 0.1}
        tried = ["schedule=cosine", "schedule=wsd"]
        findings = found(tried, (3.3, 3.2), space={"schedule": "cosine,wsd"}, schedule=wsd)
        (words,) = findings["tuning"]["AdamW"]
        assert "ran with schedule._target_=sophia_train.optim.schedules.Cosine" in words
        assert read_studies(tmp_path / "tuning" / "adamw")[0].best == {"schedule": "wsd"}

    @pytest.mark.parametrize(
        "study, words",
        [
            ({"model": {"n_layer": 3, "block_size": 16}}, "model.n_layer=3 (runs: 2)"),
            ({"data": {**DATA, "train": "c" * 64}}, "training data=cccccccc (runs: aaaaaaaa)"),
            ({"data": {**DATA, "validation": "c" * 64}}, "validation data=cccccccc (runs: bbbbbbbb)"),
            ({"data": None}, "training data=unknown (runs: aaaaaaaa)"),
            ({"batch_size": 8}, "batch_size=8 (runs: 4)"),
            ({"max_steps": 50}, "steps=50 (runs: 100)"),
            ({"schedule.warmup_steps": 20}, "schedule.warmup_steps=20 (runs: 10)"),
            ({"optimizer": {**ADAMW, "weight_decay": 0.2}}, "optimizer.weight_decay=0.2 (runs: 0.1)"),
            ({"optimizer": {**ADAMW, "fused": True}}, "optimizer.fused=True (runs: not set)"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_a_search_on_something_else_than_the_runs_is_said(self, found, study, words):
        findings = found(**study)
        assert set(findings) == {OTHERWISE} and words in findings[OTHERWISE]["AdamW"]
        assert set(findings[OTHERWISE]) == {"AdamW"}

    @pytest.mark.parametrize("free", ["name", "seed", "micro_batch_size", "eval_interval", "max_seconds"])
    def test_what_no_loss_depends_on_is_not(self, found, free):
        assert found(**{free: 77}) == {}

    def test_of_two_searches_that_found_the_settings_the_one_on_the_runs_model_counts(self, found, tmp_path):
        other = {"model": {"n_layer": 3, "block_size": 16}, "budget": Budget(trials=9)}
        write_tuning(tmp_path / "tuning" / "a_3", ["optimizer.lr=0.001"], [3.0], **other)
        assert found() == {}


class TestBudget:
    def test_equal_trials_are_equal_whatever_they_cost(self, found):
        assert found(trial_flops=7e12) == {}

    def test_trials_that_are_left_are_said(self, found):
        """Two of eight are less than Sophia's three."""
        findings = found((1e-3, 2e-3), (3.2, 3.3), budget=Budget(trials=8))
        assert findings["tuning budget"] == {
            "AdamW": ["2 of 8 trials, 2e+12 FLOPs"],
            "Sophia GNB": ["3 trials, 3e+12 FLOPs"],
        }

    def test_equal_flops_are_equal(self, found):
        budget = Budget(flops=3.5e12)
        assert found(budget=budget, sophia={"budget": budget}) == {}

    def test_unequal_trials_within_equal_flops_are_a_fact_and_no_unequal_budget(self, found):
        """Sophia's trials are dearer: three are all that fits."""
        budget = Budget(flops=4.4e12)
        rates = [4e-4, 5e-4, 1e-3, 2e-3]
        findings = found(
            rates, (3.5, 3.3, 3.2, 3.4), budget=budget, sophia={"budget": budget, "trial_flops": 1.4e12}
        )
        assert findings == {
            "trials within the same budget": {
                "AdamW": ["4 trials, 4e+12 of 4.4e+12 FLOPs"],
                "Sophia GNB": ["3 trials, 4.2e+12 of 4.4e+12 FLOPs"],
            }
        }

    @pytest.mark.parametrize(
        "mine, theirs",
        [
            (Budget(flops=3e12), Budget(flops=3.5e12)),
            (Budget(flops=3e12), Budget(flops=9e12)),
            (Budget(flops=3e12), Budget(trials=3)),
        ],
        ids=str,
    )
    def test_as_many_trials_of_another_budget_are_unequal(self, found, mine, theirs):
        assert set(found(budget=mine, sophia={"budget": theirs})) == {"tuning budget"}

    def test_equal_flops_that_one_has_not_spent_are_unequal(self, found):
        budget = Budget(flops=3e12)
        findings = found((1e-3, 2e-3), (3.2, 3.3), budget=budget, sophia={"budget": budget})
        assert findings["tuning budget"] == {
            "AdamW": ["2 trials, 2e+12 of 3e+12 FLOPs"],
            "Sophia GNB": ["3 trials, 3e+12 of 3e+12 FLOPs"],
        }


class TestSpace:
    def test_another_range_of_the_same_setting_is_said(self, found):
        findings = found(space={"optimizer.lr": "log:1e-05..0.002"})
        assert findings == {
            "tuning searched optimizer.lr in": {
                "AdamW": ["log:1e-05..0.002"],
                "Sophia GNB": ["log:0.0001..0.005"],
            }
        }

    def test_settings_that_one_alone_tunes_count_by_their_number(self, found):
        gamma = {**LR, "optimizer.gamma": "log:0.005..0.5"}
        assert found(sophia={"space": gamma}) == {
            "number of tuned settings": {
                "AdamW": ["1: optimizer.lr"],
                "Sophia GNB": ["2: optimizer.lr, optimizer.gamma"],
            }
        }

    @pytest.mark.parametrize(
        "rates, losses, end",
        [
            ((1e-4, 5e-4, 1e-3), (3.4, 3.3, 3.2), "highest"),
            ((1e-3, 2e-3, 5e-3), (3.2, 3.3, 3.4), "lowest"),
            ((1e-4, 1e-3, 5e-3), (3.4, 3.2, 3.3), None),
            ((1e-4, 1e-3, 5e-3), (3.4, 3.2, math.inf), None),  # that one diverged beyond it is an answer
        ],
    )
    def test_a_best_value_at_an_end_of_what_was_tried_is_said(self, found, rates, losses, end):
        words = f"optimizer.lr=0.001 is the {end} that was tried of log:0.0001..0.005"
        assert found(rates, losses) == ({EDGE: {"AdamW": [words]}} if end else {})

    def test_a_choice_has_no_ends(self, found):
        space = {"optimizer.lr": "0.0005,0.00075,0.001"}
        assert EDGE not in found((5e-4, 7.5e-4, 1e-3), (3.4, 3.3, 3.2), space=space)


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


def test_the_report_says_what_was_not_found_by_tuning(compare, make_run, tmp_path):
    tried = ["optimizer.lr=0.0005", "optimizer.lr=0.001"]
    write_tuning(tmp_path / "adamw", tried, (3.3, 3.2))
    code, out, _ = compare(make_run("a1", optimizer={**ADAMW, "lr": 0.09}), "--tuning", tmp_path / "adamw")
    assert code == 0
    assert "**tuning**: ran with optimizer.lr=0.09, its tuning found 0.001 (AdamW)" in out
    assert f"**{EDGE}**: optimizer.lr=0.001 is the highest that was tried of log:0.0001..0.005 (AdamW)" in out


@pytest.mark.parametrize(
    "key, value, where",
    [
        ("budget", {"trials": 2}, "budget"),
        ("budget", {"trials": 2, "flops": 1e12}, "budget"),
        ("budget", {"trials": None, "flops": None}, "budget"),
        ("budget", {"trials": "two", "flops": None}, "budget"),
        ("trial_flops", -1, "trial_flops"),
        ("space", {"optimizer.lr": 1}, "space"),
        ("history", [{"trial": 0, "loss": 3.2, "overrides": ["optimizer.lr=low"]}], "trial"),
        ("history", [{"trial": 0, "loss": 3.2, "overrides": None}], "trial"),
    ],
)
def test_a_damaged_budget_or_space_is_named_with_its_line(compare, make_run, tmp_path, key, value, where):
    write_tuning(tmp_path / "adamw", ["optimizer.lr=0.0005", "optimizer.lr=0.001"], (3.3, 3.2))
    file = tmp_path / "adamw" / "tuning.json"
    text = json.dumps({**json.loads(file.read_text()), key: value}, indent=2)
    file.write_text(text)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if f'"{where}":' in line)
    code, out, err = compare(make_run("a1"), "--tuning", tmp_path / "adamw")
    assert (code, out) == (65, "") and err.count("\n") == 1
    assert f"{file}, line {line}: {where}=" in err
