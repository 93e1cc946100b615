"""Runs of one group differ in the seed alone."""

import itertools

import pytest
import yaml
from support import ROOT

from sophia_train.compare.runs import leaves
from sophia_train.config import compose, run_config, to_json
from sophia_train.state import MAY_CHANGE, may_change
from sophia_train.trackers.labels import COMPARED, NOT_COMPARED, TRIALS, group_name, labels
from sophia_train.tuning.record import trial_folder

ELSEWHERE = ["data=token_files", "data.path=/tmp", "optimizer=sophia_h"]


def test_what_is_compared_is_every_setting_that_changes_the_result_but_the_seed():
    settings = leaves(to_json(run_config(compose())))
    assert {key.split(".")[0] for key in settings if not may_change(key)} - {"seed"} == set(COMPARED)
    assert not any(may_change(key) for key in COMPARED)
    assert {key for key in MAY_CHANGE if key.split(".")[0] in COMPARED} == NOT_COMPARED


@pytest.mark.parametrize(
    "same", ["seed=2", "name=other", "run_dir=elsewhere", "log_interval=3", "stop_at_step=5", "tracker=jsonl"]
)
def test_the_group_is_the_same_for_every_seed_and_name(same, run_of):
    assert group_name(run_of(same)) == group_name(run_of())


@pytest.mark.parametrize("same", ["data.path=/", "hessian.micro_batch_size=3", "micro_batch_size=1 seed=2"])
def test_the_group_is_the_same_whatever_a_resumed_run_may_change(same, run_of):
    assert group_name(run_of(*ELSEWHERE, *same.split())) == group_name(run_of(*ELSEWHERE))


def test_the_group_is_another_for_other_tokens_wherever_they_are(run_of):
    books, web = {"train": "1f", "validation": "2e"}, {"train": "1f", "validation": "3d"}
    assert group_name(run_of(*ELSEWHERE, data=books)) == group_name(run_of(*ELSEWHERE, "seed=2", data=books))
    assert group_name(run_of(*ELSEWHERE, data=books)) != group_name(run_of(*ELSEWHERE, data=web))


@pytest.mark.parametrize(
    "other", ["optimizer.lr=1e-3", "optimizer=adamw", "model=gpt2_355m", "batch_size=240", "max_steps=9999"]
)
def test_the_group_is_another_for_other_settings(other, run_of):
    assert group_name(run_of(other)) != group_name(run_of())


def test_what_can_be_read_of_a_group_tells_optimizer_model_and_length(run_of):
    changes = ["optimizer=adamw", "model=gpt2_355m", "max_steps=50000"]
    every = [chosen for n in range(4) for chosen in itertools.combinations(changes, n)]
    read = {group_name(run_of(*chosen)).rpartition(" ")[0] for chosen in every}
    assert len(read) == 8 and {"Sophia GNB 12x768 100,000 steps", "AdamW 24x1024 50,000 steps"} <= read
    by_tokens = run_of("max_steps=null", f"max_tokens={480 * 1024 * 3000}")
    assert group_name(by_tokens).startswith("Sophia GNB 12x768 3,000 steps ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer=adamw", "model=gpt2_355m"], {"optimizer": "AdamW", "model": "24x1024"}),
        (["data=fineweb_edu"], {"optimizer": "Sophia GNB", "data": "fineweb-edu"}),
        (["optimizer=sophia_h", "name='gpt2-lr=3-seed=1'"], {"optimizer": "Sophia Hutchinson"}),
        (["optimizer=muon"], {"optimizer": "Muon + AdamW", "experiment": "gpt2"}),
        (["experiment=demo", "seed=4"], {"experiment": "demo", "data": "PythonStdlib", "model": "4x128"}),
    ],
)
def test_labels(overrides, expected, run_of):
    found = labels(run_of(*overrides))
    assert found.keys() == {"optimizer", "model", "setup", "data", "experiment"}
    assert {kind: found[kind] for kind in expected} == expected


def test_a_name_of_a_sweep_is_labelled_without_what_the_sweep_adds(run_info):
    for name in ("demo", "demo-seed=1", "demo-optimizer=adamw-seed=1", "demo-optimizer.lr=1e-3"):
        assert labels(run_info(name=name))["experiment"] == "demo"


def test_settings_that_are_not_there_have_no_label(run_info):
    assert labels(run_info(config={"seed": 1})) == {"setup": "100 steps", "experiment": "trial"}


@pytest.mark.parametrize("number", [0, 12, 1000])
def test_trials_are_labelled_by_the_name_that_a_search_gives_them(number, run_info, tmp_path):
    name = f"sophia_g_{trial_folder(tmp_path, number).name}"
    kind, label = TRIALS.split(":")
    assert labels(run_info(name=name))[kind] == label
    for other in ("trial", "demo", f"{name}-seed=1", "my_trial_2"):
        assert kind not in labels(run_info(name=other))


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("wandb_*.yaml")), ids=lambda path: path.stem)
def test_searches_of_weights_and_biases_have_the_tag_of_trials(path):
    sweep = yaml.safe_load(path.read_text())
    assert (f"tracker.wandb.tags=[{TRIALS}]" in sweep["command"]) == (sweep["method"] == "bayes")
