"""Tuning: equal budgets, a record that no interruption changes, trials that are given up, bad input."""

import json
import math
import signal
import sys
from collections import Counter

import pytest
from log_pipe import strike
from support import ENVIRONMENT, TINY, contents, load_script, result

from sophia_train.compare.runs import read_run
from sophia_train.compare.tuning import read_studies
from sophia_train.errors import ConfigError
from sophia_train.tuning.record import TUNING, Budget, trial_folder, write_trials
from sophia_train.tuning.search import STARTUP_TRIALS, Trial, is_hopeless, propose
from sophia_train.tuning.space import override, parameters, parse_spaces
from sophia_train.tuning.study import OptimizerStudy, StudySettings

SETTINGS = [word for word in TINY if not word.startswith("hessian.")]
LR = "optimizer.lr=log:1e-4..5e-3"
SPACES = [LR, "schedule.warmup_steps=1,2,3", "sophia_g:optimizer.gamma=log:0.005..0.5"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "study"


@pytest.fixture
def settings(token_files):
    return [*SETTINGS, f"data.path={token_files}"]


@pytest.fixture
def tune(out, settings):
    """Runs the script in this process."""
    script = load_script("tune")

    def run(*arguments, spaces=SPACES, optimizers="adamw,sophia_g", overrides=()):
        return script.main(words(out, arguments, spaces, optimizers, [*settings, *overrides]))

    return run


def words(out, arguments, spaces, optimizers, overrides):
    spaces = [word for space in spaces for word in ("--space", space)]
    return ["--out", str(out), "--optimizers", optimizers, *spaces, *arguments, "--", *overrides]


def record(out, optimizer):
    return json.loads((out / optimizer / TUNING).read_text())


def without_clocks(record):
    history = [{key: entry[key] for key in entry if key != "seconds"} for entry in record["history"]]
    return {**record, "history": history}


@pytest.mark.slow
class TestStudy:
    def test_equal_budget_and_the_record_of_it(self, tune, out, settings, capfd):
        assert tune("--trials", "2") == 0
        found = {name: record(out, name) for name in ("adamw", "sophia_g")}
        for name, each in found.items():
            assert each["format_version"] == 1 and each["optimizer"] == name and each["trials"] == 2
            assert [entry["trial"] for entry in each["history"]] == [0, 1]
            assert [entry["state"] for entry in each["history"]] == ["complete"] * 2
            for entry in each["history"]:
                run = result(trial_folder(out / name, entry["trial"]))
                assert entry["loss"] == run["validation_loss"]
                assert entry["flops"] == run["state"]["flops"]
            assert each["flops"] == sum(entry["flops"] for entry in each["history"])
            assert each["budget"] == {"trials": 2, "flops": None}
            assert each["trial_flops"] == pytest.approx(each["flops"] / 2, rel=0.1)
            best = min(each["history"], key=lambda entry: entry["loss"])
            assert each["best"]["loss"] == best["loss"] and each["best"]["overrides"] == best["overrides"]
            assert each["best"]["run"] == f"trial_{best['trial']:03d}"
        for first, second in zip(found["adamw"]["history"], found["sophia_g"]["history"], strict=True):
            assert first["overrides"] == second["overrides"][:2]  # the same first trials
        assert "adamw" in capfd.readouterr().out

        before = contents(out)
        assert tune("--trials", "2") == 0  # nothing is left to do
        assert contents(out) == before
        assert tune("--trials", "3", "--seconds", "1e-6") == 75  # there is, and no time for it
        wanted = {"trials": 3, "flops": None}
        assert {name: record(out, name) for name in found} == {
            name: {**each, "budget": wanted} for name, each in found.items()
        }
        assert tune("--trials", "1") == 0  # less than was spent is no budget of this search
        assert [record(out, name)["budget"] for name in found] == [wanted] * 2

        # Half as much again as Sophia's two: one more of each, since AdamW's are cheaper, but not by so much.
        flops = 1.5 * found["sophia_g"]["flops"]
        assert tune("--flops", str(flops), "--discard-weights") == 0
        assert [record(out, name)["trials"] for name in found] == [3, 3]
        assert all(record(out, name)["flops"] <= flops for name in found)
        assert [record(out, name)["budget"] for name in found] == [{"trials": None, "flops": flops}] * 2
        assert not list((out / "adamw" / "trial_002").rglob("*.safetensors"))
        assert read_run(out / "adamw" / "trial_002").fingerprints  # by which its data are compared
        for study, name in zip(read_studies(out), found, strict=True):
            assert (study.path.name, study.trials, study.budget_flops) == (name, 3, flops)
            assert study.effort == ("FLOPs", flops, 0)
            best = read_run(out / name / record(out, name)["best"]["run"])
            assert not study.departures(best) and not study.differences(best)
            assert len(set(study.tried["optimizer.lr"])) == 3

    def test_stopped_and_killed_and_begun_again_is_the_same_record(self, tune, out, settings, tmp_path):
        long = ["max_steps=400", "eval_interval=100", "save_interval=1000", "tracker=console"]
        arguments = ["--trials", "2"], SPACES, "sophia_g", [*settings, *long]
        for trial, how in enumerate([signal.SIGTERM, signal.SIGKILL]):
            folder = trial_folder(out / "sophia_g", trial)
            code = strike("tune", words(out, *arguments), folder, 20, how)
            assert code == (75 if how == signal.SIGTERM else -how)
            status = json.loads((folder / "status.json").read_text())
            assert status["code"] == 75 and status["step"] >= 20
        assert record(out, "sophia_g")["trials"] == 1
        assert tune("--trials", "2", optimizers="sophia_g", overrides=long) == 0

        assert load_script("tune").main(words(tmp_path / "alone", *arguments)) == 0
        expected = record(tmp_path / "alone", "sophia_g")
        assert without_clocks(record(out, "sophia_g")) == without_clocks(expected)
        assert len({tuple(entry["overrides"]) for entry in expected["history"]}) == 2

    def test_a_hopeless_trial_is_stopped_and_counts_what_it_spent(self, tune, out, settings):
        long = ["max_steps=3000", "eval_interval=100", "save_interval=3000", "log_interval=100"]
        study = adamw_study(out, [*settings, *long])
        good = [trial(lr, 0.1, {step: 0.1 for step in range(0, 3001, 100)}) for lr in (1, 2, 3, 4)]
        for number, each in enumerate(good):
            folder = trial_folder(study.folder, number)
            folder.mkdir(parents=True)
            lines = [json.dumps({"step": step, "val/loss": loss}) for step, loss in each.curve.items()]
            tokens = ', "tokens": 0, "flops": 0.0, "seconds": 0.0}\n'
            (folder / "metrics.jsonl").write_text("".join(line[:-1] + tokens for line in lines))
        write_trials(study.folder, "adamw", study.identity, good, Budget(trials=4), study.trial_flops)
        assert tune("--trials", "5", spaces=[LR], optimizers="adamw", overrides=long) == 0
        found = record(out, "adamw")
        last, run = found["history"][-1], result(trial_folder(study.folder, 4))
        assert last["state"] == "pruned" and 1500 <= run["state"]["step"] < 3000
        assert last["flops"] == run["state"]["flops"] < study.trial_flops
        assert found["flops"] == last["flops"] + sum(each.flops for each in good)
        assert last["loss"] > 0.1 == found["best"]["loss"]

    def test_a_diverged_trial_counts_and_is_not_the_end(self, tune, out):
        space = ["optimizer.lr=log:1e29..1e30"]
        long = ["max_steps=60", "max_skipped_steps=0"]
        assert tune("--trials", "2", spaces=space, optimizers="sgd", overrides=long) == 0
        found = record(out, "sgd")
        assert [entry["state"] for entry in found["history"]] == ["failed"] * 2
        assert [entry["loss"] for entry in found["history"]] == [None, None] and found["best"] is None
        assert found["flops"] > 0

    def test_another_failure_is_the_end(self, tune, out, capfd):
        assert tune("--trials", "2", overrides=["batch_size=1000", "micro_batch_size=1"]) == 65
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and "batch_size=1000" in lines[0] and "trial_000" in lines[0]
        assert not (out / "adamw" / TUNING).exists()


def adamw_study(out, settings):
    return OptimizerStudy(
        StudySettings(folder=out, overrides=settings), "adamw", parse_spaces([LR], ["adamw"])["adamw"]
    )


def trial(lr, loss, curve=None, state="complete"):
    overrides = [f"optimizer.lr={lr * 1e-3}"]
    return Trial(overrides=overrides, loss=loss, flops=1e6, seconds=0.1, state=state, curve=curve or {})


class TestSearch:
    SPACE = parse_spaces([LR, "schedule.warmup_steps=50,100,200"], ["adamw"])["adamw"]

    def propose_all(self, n, losses):
        trials = []
        for _ in range(n):
            overrides = propose(self.SPACE, trials, seed=3)
            loss = losses(float(overrides[0].split("=")[1]))
            trials.append(Trial(overrides=overrides, loss=loss, flops=1, seconds=1, state="complete"))
        return trials

    def test_is_a_function_of_what_was_tried(self):
        first, again = (self.propose_all(8, lambda lr: abs(math.log(lr / 1e-3))) for _ in range(2))
        assert first == again and len({tuple(each.overrides) for each in first}) == 8

    def test_comes_near_the_best(self):
        trials = self.propose_all(24, lambda lr: abs(math.log(lr / 1e-3)))
        assert min(each.loss for each in trials) < 0.1
        late = [each.loss for each in trials[12:]]
        assert sum(late) / len(late) < math.log(5e-3 / 1e-4) / 4  # what drawing at random would come to

    def test_a_failed_trial_is_learned_from(self):
        trials = self.propose_all(16, lambda lr: math.inf if lr > 1e-3 else 1.0)
        assert sum(math.isinf(each.loss) for each in trials[8:]) < 4

    def test_all_values_are_in_their_range_and_short(self):
        for each in self.propose_all(12, lambda lr: lr):
            lr, warmup = each.overrides
            assert 1e-4 <= float(lr.split("=")[1]) <= 5e-3 and len(lr) < 26
            assert warmup in (
                "schedule.warmup_steps=50",
                "schedule.warmup_steps=100",
                "schedule.warmup_steps=200",
            )


def share(value, distribution):
    """Where a value is in its range: 0 is its low end and 1 its high one."""
    scale = math.log if distribution.log else float
    low, high = scale(distribution.low), scale(distribution.high)
    return (scale(value) - low) / (high - low)


class TestFirstTrials:
    SPACE = parse_spaces(
        [
            LR,
            "optimizer.weight_decay=0.0..0.3",
            "schedule.warmup_steps=50..2000",
            "hessian.interval=log:1..1000",
            "hessian.groups=1,2",
            "model.n_layer=2,4,6",
            "model.n_head=1,2,4,8",
            "model.n_embd=64,128,192,256,320",
            "batch_size=2..4",
        ],
        ["adamw"],
    )["adamw"]
    SEEDS = range(200)

    def first(self, space, seed, loss=lambda number: 3.0):
        """The tuned values of the first trials, by key."""
        trials = []
        for number in range(STARTUP_TRIALS):
            overrides = propose(space, trials, seed)
            trials.append(Trial(overrides=overrides, loss=loss(number), flops=1, seconds=1, state="complete"))
        values = [parameters(each.overrides, space) for each in trials]
        return {key: [each[key] for each in values] for key in space}

    @pytest.mark.parametrize(
        "key, slack",
        [
            ("optimizer.lr", 1e-3),  # values are rounded
            ("optimizer.weight_decay", 1e-3),
            ("schedule.warmup_steps", 1e-3),
            ("hessian.interval", 0.26),  # where there are few whole numbers
        ],
    )
    def test_each_quarter_of_a_range_has_one(self, key, slack):
        for seed in self.SEEDS:
            shares = sorted(share(value, self.SPACE[key]) for value in self.first(self.SPACE, seed)[key])
            for quarter, each in enumerate(shares):
                assert quarter / 4 - slack <= each <= (quarter + 1) / 4 + slack

    def test_the_highest_learning_rates_are_tried_whatever_the_seed(self):
        highest = [max(self.first(self.SPACE, seed)["optimizer.lr"]) for seed in self.SEEDS]
        assert min(highest) > 1e-4 * 50**0.75 * 0.999
        assert max(highest) > 0.95 * 5e-3

    @pytest.mark.parametrize(
        "key", ["hessian.groups", "model.n_layer", "model.n_head", "model.n_embd", "batch_size"]
    )
    def test_choices_are_as_even_as_can_be(self, key):
        choices = getattr(self.SPACE[key], "choices", (2, 3, 4))
        fair = STARTUP_TRIALS / len(choices)
        total = Counter()
        for seed in self.SEEDS:
            counts = Counter(self.first(self.SPACE, seed)[key])
            assert {counts[choice] for choice in choices} <= {math.floor(fair), math.ceil(fair)}
            total += counts
        assert all(abs(total[choice] / len(self.SEEDS) - fair) < 0.2 for choice in choices)

    def test_settings_are_spread_independently(self):
        """Every order of one beside that of another, and every offset."""
        pairs = Counter()
        for seed in self.SEEDS:
            values = self.first(self.SPACE, seed)
            orders = [sorted(range(4), key=values[key].__getitem__) for key in list(self.SPACE)[:2]]
            pairs[orders[0].index(3), orders[1].index(3)] += 1
        assert len(pairs) == 16 and max(pairs.values()) < 30

    def test_they_come_from_seed_key_and_number_alone(self):
        for seed in range(20):
            expected = self.first(self.SPACE, seed)
            assert self.first(self.SPACE, seed, loss=lambda number: math.inf if number else 1.0) == expected
            backwards = dict(reversed(self.SPACE.items()))
            assert self.first(backwards, seed) == expected
            for key, distribution in self.SPACE.items():
                assert self.first({key: distribution}, seed) == {key: expected[key]}
        assert len({tuple(self.first(self.SPACE, seed)["optimizer.lr"]) for seed in self.SEEDS}) == 200

    def test_another_range_of_the_same_setting_has_the_same_places(self):
        wide = parse_spaces(["optimizer.lr=log:1e-5..1e-1"], ["lion"])["lion"]
        for seed in range(20):
            first, second = (self.first(space, seed)["optimizer.lr"] for space in (self.SPACE, wide))
            places = [share(value, self.SPACE["optimizer.lr"]) for value in first]
            assert [share(value, wide["optimizer.lr"]) for value in second] == pytest.approx(places, abs=1e-3)

    def test_trials_that_were_drawn_otherwise_stay_and_the_rest_is_as_ever(self):
        mine = parse_spaces([LR], ["adamw"])["adamw"]
        expected = [f"optimizer.lr={value}" for value in self.first(mine, 5)["optimizer.lr"]]
        old = [trial(1, 3.0), trial(2, 3.1)]
        assert propose(mine, old, 5) == [expected[2]]
        assert propose(mine, [*old, trial(3, 3.0)], 5) == [expected[3]]


class TestPruning:
    SPACE = parse_spaces([LR], ["adamw"])["adamw"]
    OTHERS = [trial(lr, 2.0, {0: 5.0, 50: 3.0, 100: 2.0}) for lr in (1, 2, 3, 4)]

    def is_hopeless(self, curve, others=OTHERS, first_step=50):
        return is_hopeless(self.SPACE, others, ["optimizer.lr=0.001"], curve, first_step)

    def test_what_is_above_the_median_is_given_up(self):
        assert self.is_hopeless({0: 5.0, 50: 3.1})
        assert not self.is_hopeless({0: 5.0, 50: 2.9})

    def test_not_before_the_first_step(self):
        assert not self.is_hopeless({0: 9.0, 25: 9.0})

    def test_not_before_there_are_four_to_compare_with(self):
        assert not self.is_hopeless({0: 5.0, 50: 9.0}, self.OTHERS[:3])

    def test_what_is_not_a_number_is_given_up(self):
        assert self.is_hopeless({0: 5.0, 50: math.nan})


class TestSpace:
    @pytest.mark.parametrize(
        ("text", "value", "expected"),
        [
            (LR, 0.00123456, "optimizer.lr=0.001235"),
            ("optimizer.lr=1e-3..1.2345678e-3", 1.2345678e-3, "optimizer.lr=0.0012345678"),
            ("hessian.interval=5..20", 7, "hessian.interval=7"),
            ("optimizer.betas=[0.9,0.95],[0.96,0.99]", "[0.96,0.99]", "optimizer.betas=[0.96,0.99]"),
        ],
    )
    def test_a_value_is_written_and_read_back(self, text, value, expected):
        ((key, distribution),) = parse_spaces([text], ["adamw"])["adamw"].items()
        written = override(key, value, distribution)
        assert written == expected
        assert parameters([written], {key: distribution})[key] == (
            pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
        )

    def test_what_is_one_optimizers_own_comes_in_the_place_of_what_is_for_all(self):
        spaces = parse_spaces([LR, "adamw:optimizer.lr=log:1e-4..1e-2"], ["adamw", "lion"])
        assert [spaces[name]["optimizer.lr"].high for name in ("adamw", "lion")] == [1e-2, 5e-3]

    @pytest.mark.parametrize(
        ("text", "fragments"),
        [
            ("optimizer.lr", ["KEY=VALUES"]),
            ("=1,2", ["KEY=VALUES"]),
            ("optimizer.lr=", ["KEY=VALUES"]),
            ("optimizer.lr=1e-3", ["no range", "LOW..HIGH"]),
            ("optimizer.lr=1e-3,1e-3", ["no choice"]),
            ("optimizer.lr=[0.9,0.95", ["no choice"]),
            ("optimizer.lr=5e-3..1e-4", ["nothing between 0.005 and 0.0001"]),
            ("optimizer.lr=1e-4..1e-4", ["nothing between"]),
            ("optimizer.lr=log:0..1", ["above 0"]),
            ("optimizer.lr=1e-4..5e-3x", ["5e-3x is not a number"]),
            ("optimizer.lr=1e-4..inf", ["inf is not a number"]),
            ("adam:optimizer.lr=1..2", ["adam is none of --optimizers", "adamw"]),
            ("seed=1,2", ["seed is the same for all trials"]),
            ("run_dir=a,b", ["run_dir"]),
            ("optimizer=adamw,lion", ["optimizer is the same"]),
        ],
    )
    def test_bad_spaces(self, text, fragments):
        with pytest.raises(ConfigError) as caught:
            parse_spaces([text], ["adamw", "lion"])
        assert text in str(caught.value)
        for fragment in fragments:
            assert fragment in str(caught.value)

    def test_one_without_an_optimizer_or_twice(self):
        with pytest.raises(ConfigError, match="nothing for lion"):
            parse_spaces([f"adamw:{LR}"], ["adamw", "lion"])
        with pytest.raises(ConfigError, match="twice"):
            parse_spaces([LR, "optimizer.lr=1e-3,2e-3"], ["adamw"])


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "fragments"),
        [
            ([], ["--trials", "--flops"]),
            (["--trials", "2", "--flops", "1e9"], ["--flops", "--trials"]),
            (["--trials", "0"], ["--trials"]),
            (["--trials", "two"], ["--trials"]),
            (["--flops", "-1"], ["--flops"]),
            (["--flops", "1e3"], ["--flops=1000", "one trial of adamw"]),
            (["--trials", "2", "--seconds", "0"], ["--seconds"]),
            (["--trials", "2", "--space", "optimizer.gama=1,2"], ["--space optimizer.gama for adamw"]),
            (["--trials", "2", "--space", "optimizer.gamma=1,2"], ["--space optimizer.gamma for adamw"]),
            (["--trials", "2", "--space", "optimizer.eps=-1..1"], ["--space optimizer.eps", "-1"]),
            (["--trials", "2", "--space", LR], ["twice"]),
            (["--trials", "2", "--optimizers", "adamw,adamw"], ["--optimizers"]),
            (["--trials", "2", "--optimizers", "adamx,sophia_g"], ["optimizer=adamx"]),
            (["--trial", "2"], ["--trial"]),
        ],
        ids=" ".join,
    )
    def test_is_one_line_before_anything_starts(self, arguments, fragments, tune, out, capfd):
        assert tune(*arguments) == 64
        err = capfd.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        for fragment in fragments:
            assert fragment in err
        assert not out.exists()

    @pytest.mark.parametrize(
        "override", ["max_stepz=3", "optimizer=lion", "run_dir=x", "name=x", "resume=never"]
    )
    def test_bad_settings(self, override, tune, out, capfd):
        assert tune("--trials", "2", overrides=[override]) == 64
        assert override in capfd.readouterr().err
        assert not out.exists()

    @pytest.mark.parametrize(
        ("change", "fragment"),
        [
            ({"overrides": ["max_steps=7"]}, "max_steps=7"),
            ({"overrides": ["seed=5"]}, "seed=5"),
            ({"spaces": ["optimizer.lr=log:1e-4..1e-3"]}, "0.001"),
            ({"arguments": ["--seed", "1"]}, "seed"),
            ({"arguments": ["--no-pruning"]}, "pruning"),
        ],
        ids=lambda value: str(value),
    )
    def test_a_folder_of_another_study(self, change, fragment, tune, out, settings, capfd):
        study = adamw_study(out, settings)
        budget = Budget(trials=1)
        write_trials(study.folder, "adamw", study.identity, [trial(1, 2.5)], budget, study.trial_flops)
        study.settings.write()
        before = contents(out)
        usual = {"spaces": [LR], "optimizers": "adamw"}
        assert tune("--trials", "1", **usual) == 0  # nothing is left to do
        assert tune("--trials", "2", *change.pop("arguments", []), **{**usual, **change}) == 64
        err = capfd.readouterr().err
        assert fragment in err and "--out" in err
        assert contents(out) == {**before, str(out / ".lock"): b""}

    def test_a_record_without_a_budget_is_gone_on_with(self, tune, out, settings):
        study = adamw_study(out, settings)
        write_trials(study.folder, "adamw", study.identity, [trial(1, 2.5)], None, study.trial_flops)
        old = {
            key: value for key, value in record(out, "adamw").items() if key not in ("budget", "trial_flops")
        }
        (study.folder / TUNING).write_text(json.dumps(old))
        assert adamw_study(out, settings).trials == [trial(1, 2.5)]
        assert tune("--trials", "1", spaces=[LR], optimizers="adamw") == 0
        budget = {"trials": 1, "flops": None}
        assert record(out, "adamw") == {**old, "budget": budget, "trial_flops": study.trial_flops}

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"history": [1]}'])
    def test_a_damaged_record(self, content, tune, out, capfd):
        (out / "adamw").mkdir(parents=True)
        (out / "adamw" / TUNING).write_text(content)
        assert tune("--trials", "2", spaces=[LR], optimizers="adamw") == 65
        assert str(out / "adamw" / TUNING) in capfd.readouterr().err

    def test_without_optuna(self, tune, monkeypatch, capfd):
        for name in ("space", "study"):
            monkeypatch.setitem(sys.modules, f"sophia_train.tuning.{name}", None)
        assert tune("--trials", "2") == 69
        assert "sophia_train[tune]" in capfd.readouterr().err
