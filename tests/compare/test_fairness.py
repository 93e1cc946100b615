"""The linter: every planted unfairness is named, and a fair pair passes."""

import dataclasses

import pytest
from synthetic_runs import DATA, ENVIRONMENT, LOSSES, SOPHIA

from sophia_train.compare.fairness import unequal
from sophia_train.compare.groups import Group, group_runs
from sophia_train.compare.runs import read_run


def found(*folders):
    return {finding.what: finding.values for finding in unequal(group_runs(map(read_run, folders)))}


@pytest.fixture
def pair(make_run):
    """Findings of AdamW against Sophia, two seeds each; what is given is planted in Sophia's runs."""

    def make(**planted):
        folders = [make_run(f"a{seed}", seed=seed) for seed in (1, 2)]
        folders += [make_run(f"s{seed}", seed=seed, **{**SOPHIA, **planted}) for seed in (1, 2)]
        return found(*folders)

    return make


def test_a_fair_pair_passes(pair):
    assert pair() == {}


def test_rates_names_and_places_are_free(pair):
    optimizer = {**SOPHIA["optimizer"], "lr": 7e-3, "weight_decay": 0.01, "betas": [0.9, 0.95]}
    places = {"data.path": "/elsewhere", "log_interval": 3, "tracker": {"console": {"_target_": "x"}}}
    assert pair(optimizer=optimizer, **places) == {}


@pytest.mark.parametrize(
    "key, value, what",
    [
        ("batch_size", 8, "batch, sequences"),
        ("gradient_clip", None, "gradient clip"),
        ("schedule._target_", "sophia_train.optim.schedules.WSD", "schedule's shape"),
        ("schedule.final_lr_fraction", 0.0, "schedule's end"),
        ("schedule.decay_fraction", 0.1, "schedule.decay_fraction"),
        ("schedule.warmup_steps", 20, "warm-up, steps"),
        ("eval_tokens", None, "validation tokens"),
        ("eval_interval", 50, "eval_interval"),
        ("model.n_layer", 3, "model.n_layer"),
        ("precision", "bf16", "precision"),
        ("init_from", "gpt2/", "starting weights"),
        ("data.tokenizer", "bytes", "data.tokenizer"),
        ("compile", True, "compile (seconds only)"),
        ("data", {**DATA, "train": "d" * 64}, "training data"),
        ("data", {**DATA, "validation": "d" * 64}, "validation data"),
        ("environment", {**ENVIRONMENT, "device": "NVIDIA H200"}, "device"),
        ("environment", {**ENVIRONMENT, "commit": "0ther"}, "commit"),
        ("a_setting_of_the_future", 1, "a_setting_of_the_future"),
    ],
)
def test_each_planted_unfairness_is_named_with_both_values(pair, key, value, what):
    findings = pair(**{key: value})
    assert what in findings
    first, second = findings[what].values()
    assert first != second
    assert set(findings) <= {what, "tokens"}


def test_a_longer_run_is_unequal_in_steps_and_tokens(pair):
    findings = pair(max_steps=125, losses=(*LOSSES, 2.9))
    assert set(findings) == {"steps", "tokens"}
    assert list(findings["tokens"].values()) == [["6400"], ["8000"]]


def test_the_same_length_by_another_key_is_equal(pair):
    assert pair(max_steps=None, max_tokens=6400) == {}


def test_a_run_cut_mid_decay_is_named(make_run):
    folders = [make_run("a1", seed=1), make_run("s1", seed=1, losses=LOSSES[:3], **SOPHIA)]
    assert found(*folders) == {"schedule cut": {"AdamW": [], "Sophia GNB": ["s1 at step 50 of 100"]}}


def test_seeds_and_their_number_are_compared(make_run):
    folders = [make_run(f"a{seed}", seed=seed) for seed in (1, 2)]
    findings = found(*folders, make_run("s3", seed=3, **SOPHIA))
    assert set(findings) == {"seeds (weights, order of the data)", "number of seeds"}
    findings = found(*folders, *(make_run(f"t{seed}", seed=seed, **SOPHIA) for seed in (2, 3)))
    assert set(findings) == {"seeds (weights, order of the data)"}


def test_data_that_nobody_can_compare_is_named(pair):
    assert set(pair(data=None)) == {"training data", "validation data"}


def test_data_unknown_on_both_sides_is_no_agreement(make_run):
    folders = [make_run("a1", data=None), make_run("s1", data=None, **SOPHIA)]
    assert set(found(*folders)) == {"training data", "validation data"}


def test_machines_within_a_group_are_compared(make_run):
    other = {**ENVIRONMENT, "device": "NVIDIA H200"}
    findings = found(make_run("a1", seed=1), make_run("a2", seed=2, environment=other))
    assert findings == {"device": {"AdamW": ["NVIDIA H200", "x86_64"]}}


ADAMW = {"_target_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.1}


@pytest.mark.parametrize(
    "optimizer, fair",
    [
        ({**ADAMW, "weight_decay": 0.0}, False),
        ({"_target_": "torch.optim.AdamW", "lr": 1e-3}, False),  # decays by a default of its own
        ({**ADAMW, "others": {"x": {**ADAMW, "parameters": ["embeddings"], "weight_decay": 0.0}}}, True),
        ({**ADAMW, "others": {"x": {**ADAMW, "parameters": ["matrices"], "weight_decay": 0.0}}}, False),
        ({**ADAMW, "others": {"x": {**ADAMW, "parameters": ["*.0.*"], "weight_decay": 0.0}}}, False),
        ({**ADAMW, "others": {"x": {**ADAMW, "parameters": ["*.0.*"], "weight_decay": 0.3}}}, True),
    ],
    ids=["none", "default", "embeddings", "matrices", "a pattern", "a pattern, decayed"],
)
def test_which_parameters_are_decayed_is_compared(pair, optimizer, fair):
    assert set(pair(optimizer=optimizer)) == (set() if fair else {"decayed parameters"})


FREE = {"dry_run", "keep_checkpoints", "log_interval", "max_seconds", "max_skipped_steps", "name", "profile"}
FREE |= {"resume", "run_dir", "sample_interval", "sample_prompt", "sample_tokens", "save_interval"}
FREE |= {"stop_at_step", "data.path", "max_steps", "max_tokens"}  # these show as tokens, steps, fingerprints


def test_every_setting_of_a_real_run_is_judged(tiny, tmp_path):
    """Whatever differs is found, but for the optimizer's own and what no loss and no time depends on."""
    assert tiny(tmp_path / "a").code == 0
    assert tiny(tmp_path / "b", "optimizer=sophia_h", "optimizer.lr=1e-4").code == 0
    assert found(tmp_path / "a", tmp_path / "b") == {}
    run = read_run(tmp_path / "a")
    assert run.is_comparable and run.hessian_share > 0 and 0 <= run.unclipped_fraction <= 1
    for key in run.settings:
        other = dataclasses.replace(run, settings={**run.settings, key: 999})
        free = key in FREE or key.startswith(("optimizer.", "hessian.", "gamma.", "tracker."))
        assert bool(unequal([Group("a", (run,)), Group("b", (other,))])) is not free, key


def test_seeds_of_a_real_run_are_one_group(tiny, tmp_path):
    for seed in (1, 2):
        assert tiny(tmp_path / str(seed), f"seed={seed}", f"micro_batch_size={seed}").code == 0
    (group,) = group_runs(read_run(tmp_path / str(seed)) for seed in (2, 1))
    assert sorted(group.complete) == [1, 2]
    assert group.runs[0].final_loss != group.runs[1].final_loss
