"""Gamma's rules: the controller, the decay, and a run that is left alone."""

import math

import pytest
import torch

from sophia_train.optim import Sophia
from sophia_train.optim.gamma import AutoGamma, DecayingGamma, FixedGamma
from sophia_train.optim.mixed import MixedOptimizer


def stepped(gamma, seed=0, n=10_000):
    """A Sophia after one step, whose unclipped fraction is about min(1, gamma / 2)."""
    param = torch.nn.Parameter(torch.zeros(n))
    optimizer = Sophia([param], betas=(0.0, 0.0), gamma=gamma)
    optimizer.update_hessian({param: torch.ones(n)})
    param.grad = torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 4 - 2
    optimizer.step()
    return optimizer


def settle(optimizer, rule, steps=400):
    for step in range(steps):
        rule.adjust(optimizer, step, steps)
    return optimizer.param_groups[0]["gamma"]


@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.95])
def test_a_fraction_inside_the_band_changes_nothing(gamma):
    assert settle(stepped(gamma), AutoGamma()) == gamma


@pytest.mark.parametrize("off", [100.0, 0.01, 1e-6])
def test_a_gamma_that_is_far_off_is_brought_into_the_band(off):
    optimizer = stepped(0.5 * off)
    settle(optimizer, AutoGamma())
    assert 0.1 <= optimizer.unclipped_fraction().item() <= 0.5


def test_a_hundredfold_error_takes_six_looks():
    optimizer, rule = stepped(0.5 / 100), AutoGamma(interval=3)
    for step in range(3 * 5 + 1):
        rule.adjust(optimizer, step, 100)
    assert optimizer.param_groups[0]["gamma"] == 0.005 * 2**5  # a fraction of 0.08, still too few
    settle(optimizer, rule)
    assert optimizer.param_groups[0]["gamma"] == 0.005 * 2**6


def test_it_looks_at_its_interval_only_and_stops_when_frozen():
    rule = AutoGamma(interval=10, freeze_after=30)
    seen = []
    optimizer = stepped(1e-12)
    for step in range(60):
        before = optimizer.param_groups[0]["gamma"]
        rule.adjust(optimizer, step, 60)
        if optimizer.param_groups[0]["gamma"] != before:
            seen.append(step)
    assert seen == [10, 20]


def test_before_the_first_step_there_is_nothing_to_see():
    optimizer = Sophia([torch.nn.Parameter(torch.zeros(3))], gamma=7.0)
    AutoGamma(interval=1).adjust(optimizer, 5, 10)
    assert optimizer.param_groups[0]["gamma"] == 7.0


def test_groups_keep_their_ratio_and_others_their_gamma():
    sophia = stepped(1e-3)
    sophia.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "gamma": 5e-3})
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    other.param_groups[0]["gamma"] = 0.025  # as MARS has one
    mixed = MixedOptimizer([sophia, other])
    AutoGamma().adjust(mixed, 10, 100)
    assert [group["gamma"] for group in mixed.param_groups] == [2e-3, 1e-2, 0.025]


def test_the_state_is_in_the_optimizer():
    """A resumed run goes on as the one that was not interrupted, with a new rule object."""
    whole, halves = stepped(1e-4), stepped(1e-4)
    for step in range(50):
        AutoGamma().adjust(whole, step, 100)
        if step == 20:
            saved = halves.state_dict()
            halves = stepped(1e-4)
            halves.load_state_dict(saved)
        AutoGamma().adjust(halves, step, 100)
    assert halves.param_groups[0]["gamma"] == whole.param_groups[0]["gamma"] > 1e-4


def test_the_decay_is_a_pure_function_of_the_step():
    rule, optimizer = DecayingGamma(start_fraction=0.5), stepped(0.04)
    for step in (90, 10, 50, 75, 100):
        rule.adjust(optimizer, step, 100)
        expected = 0.04 if step <= 50 else 0.04 * (1 + math.cos(math.pi * (step - 50) / 50)) / 2
        assert optimizer.param_groups[0]["gamma"] == pytest.approx(expected, abs=1e-12)


def test_a_fixed_gamma_is_fixed():
    assert settle(stepped(1e-9), FixedGamma()) == 1e-9


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"low": 0.5, "high": 0.5}, "low"),
        ({"high": 1.1}, "low"),
        ({"interval": 0}, "interval"),
        ({"factor": 1.0}, "factor"),
        ({"factor": 6.0}, "factor"),
        ({"factor": math.inf}, "factor"),
        ({"freeze_after": -1}, "freeze_after"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        AutoGamma(**settings)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_a_decay_that_never_ends_is_refused(fraction):
    with pytest.raises(ValueError, match="start_fraction"):
        DecayingGamma(start_fraction=fraction)
