"""Runs of one group differ in the seed alone."""

import pytest

from sophia_train.compare.runs import leaves
from sophia_train.config import compose, run_config, to_json
from sophia_train.state import may_change
from sophia_train.trackers.labels import COMPARED, group_name, labels


def test_what_is_compared_is_every_setting_that_changes_the_result_but_the_seed():
    settings = leaves(to_json(run_config(compose())))
    assert {key.split(".")[0] for key in settings if not may_change(key)} - {"seed"} == set(COMPARED)
    assert not any(may_change(key) for key in COMPARED)


@pytest.mark.parametrize(
    "same", ["seed=2", "name=other", "run_dir=elsewhere", "log_interval=3", "stop_at_step=5", "tracker=jsonl"]
)
def test_the_group_is_the_same_for_every_seed_and_name(same, run_of):
    assert group_name(run_of(same)) == group_name(run_of())


@pytest.mark.parametrize(
    "other", ["optimizer.lr=1e-3", "optimizer=adamw", "model=gpt2_355m", "batch_size=240", "max_steps=9999"]
)
def test_the_group_is_another_for_other_settings(other, run_of):
    assert group_name(run_of(other)) != group_name(run_of())


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
    assert found.keys() == {"optimizer", "model", "data", "experiment"}
    assert {kind: found[kind] for kind in expected} == expected


def test_a_name_of_a_sweep_is_labelled_without_what_the_sweep_adds(run_info):
    for name in ("demo", "demo-seed=1", "demo-optimizer=adamw-seed=1", "demo-optimizer.lr=1e-3"):
        assert labels(run_info(name=name))["experiment"] == "demo"


def test_settings_that_are_not_there_have_no_label(run_info):
    assert labels(run_info(config={"seed": 1})) == {"experiment": "trial"}
