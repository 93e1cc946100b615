"""Intervals against scipy, hand-made cases and their nominal coverage; censored speed-ups."""

import math

import numpy as np
import pytest
from scipy import stats

from sophia_train.compare.statistics import (
    Cost,
    bootstrap_interval,
    cost_to_reach,
    detectable_difference,
    paired_difference,
    speed_up,
    t_interval,
)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_t_interval_is_that_of_scipy(n):
    values = np.random.default_rng(n).normal(3.0, 0.1, n)
    mine = t_interval(values.tolist())
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (mine.mean, mine.low, mine.high) == pytest.approx(
        (values.mean(), theirs.low, theirs.high), rel=1e-12
    )
    assert mine.n == n


def test_the_t_interval_by_hand():
    interval = t_interval([1.0, 2.0, 3.0])  # s = 1, t(2) = 4.3027
    assert interval.mean == 2.0
    assert interval.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_seed_has_no_interval():
    interval = t_interval([3.25])
    assert interval.mean == 3.25 and interval.n == 1
    assert math.isnan(interval.low) and math.isnan(interval.high)
    difference = paired_difference({1: 3.0}, {1: 3.5})
    assert difference.interval.mean == -0.5 and math.isnan(difference.interval.low)
    assert math.isnan(difference.detectable)


def within(covered, trials, nominal, errors=4):
    """Whether a count is that of a binomial of `nominal`, within so many standard errors."""
    return abs(covered / trials - nominal) < errors * math.sqrt(nominal * (1 - nominal) / trials)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_t_interval_covers_at_its_nominal_rate(n):
    trials = 2000
    draws = np.random.default_rng(n).normal(0.3, 2.0, (trials, n)).tolist()
    intervals = [t_interval(each) for each in draws]
    assert within(sum(each.low <= 0.3 <= each.high for each in intervals), trials, 0.95)


def test_the_paired_interval_covers_where_seeds_are_alike_and_is_the_narrower_for_it():
    generator, trials, n = np.random.default_rng(0), 1000, 4
    covered, narrower = 0, 0
    for _ in range(trials):
        shared = generator.normal(3.0, 0.5, n)
        ours = dict(enumerate(shared - 0.1 + generator.normal(0, 0.05, n)))
        theirs = dict(enumerate(shared + generator.normal(0, 0.05, n)))
        interval = paired_difference(ours, theirs).interval
        covered += interval.low <= -0.1 <= interval.high
        apart = t_interval(list(ours.values()))
        narrower += interval.high - interval.low < apart.high - apart.low
    assert within(covered, trials, 0.95)
    assert narrower > 0.95 * trials


def test_pairs_are_by_seed_and_not_by_order():
    difference = paired_difference({3: 1.3, 1: 1.1, 2: 1.2, 9: 50.0}, {1: 1.0, 2: 1.1, 3: 1.2, 4: 0.0})
    assert difference.interval.n == 3
    assert difference.interval.mean == pytest.approx(0.1)
    theirs = stats.ttest_rel([1.1, 1.25, 1.2], [1.0, 1.1, 1.2]).confidence_interval(0.95)
    mine = paired_difference({1: 1.1, 2: 1.25, 3: 1.2}, {1: 1.0, 2: 1.1, 3: 1.2}).interval
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high))
    assert paired_difference({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize("n, method", [(2, "t"), (9, "t"), (10, "bootstrap"), (12, "bootstrap")])
def test_the_bootstrap_is_for_ten_seeds_and_more(n, method):
    values = dict(enumerate(np.random.default_rng(0).normal(0, 1, n).tolist()))
    difference = paired_difference(values, dict.fromkeys(values, 0.0))
    assert difference.method == method
    expected = t_interval if method == "t" else bootstrap_interval
    assert difference.interval == expected(list(values.values()))


def test_the_bootstrap_is_reproducible_and_near_the_t_interval_for_normal_values():
    values = np.random.default_rng(1).normal(0, 1, 60).tolist()
    interval, by_t = bootstrap_interval(values), t_interval(values)
    assert interval == bootstrap_interval(values)
    assert interval.low == pytest.approx(by_t.low, abs=0.06)
    assert interval.high == pytest.approx(by_t.high, abs=0.06)


@pytest.mark.parametrize("values", [[0.5] * 12, [0.0] * 10], ids=["equal", "zero"])
def test_ties_give_an_interval_without_width(values):
    same = dict(enumerate(values))
    difference = paired_difference(same, dict.fromkeys(same, 0.0))
    assert (difference.interval.low, difference.interval.high) == (values[0], values[0])
    assert difference.detectable == 0
    assert t_interval(values[:3]).low == t_interval(values[:3]).high == values[0]


def test_some_ties_are_no_trouble_for_the_bootstrap():
    interval = bootstrap_interval([0.0] * 9 + [1.0])
    assert 0 <= interval.low <= 0.1 <= interval.high <= 1


@pytest.mark.parametrize("n", [3, 8])
def test_the_detectable_difference_is_detected_in_80_percent(n):
    trials, deviation = 4000, 0.3
    true = detectable_difference(deviation, n)
    draws = np.random.default_rng(n).normal(true, deviation, (trials, n))
    detected = int((stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05).sum())
    assert within(detected, trials, 0.8)


def test_the_detectable_difference_scales_with_the_deviation_and_shrinks_with_seeds():
    assert detectable_difference(2.0, 3) == pytest.approx(2 * detectable_difference(1.0, 3))
    sizes = [detectable_difference(1.0, n) for n in (2, 3, 5, 10, 100)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == pytest.approx((1.95996 + 0.84162) / 10, rel=0.02)  # of the normal distribution


def test_a_target_is_reached_on_the_line_between_two_evaluations():
    losses, costs = [5.0, 4.0, 3.0, 3.5, 2.0], [0, 10, 20, 30, 40]
    assert cost_to_reach(3.25, losses, costs) == Cost(17.5, censored=False)
    assert cost_to_reach(3.0, losses, costs) == Cost(20, censored=False)
    assert cost_to_reach(2.5, losses, costs).value == pytest.approx(30 + 10 * 1.0 / 1.5)
    assert cost_to_reach(1.9, losses, costs) == Cost(40, censored=True)


def test_losses_that_are_not_finite_are_passed_over():
    assert cost_to_reach(3.5, [5.0, math.nan, 3.0], [0, 10, 20]) == Cost(15, censored=False)
    assert cost_to_reach(3.5, [5.0, 4.0, math.nan, math.inf], [0, 10, 20, 30]) == Cost(30, censored=True)


def test_the_speed_up_is_a_geometric_mean():
    found = speed_up([(Cost(100, False), Cost(50, False)), (Cost(100, False), Cost(200, False))])
    assert found.relation == "=" and found.interval.mean == pytest.approx(1.0)
    logs = t_interval([math.log(2), math.log(0.5)])
    assert (found.interval.low, found.interval.high) == pytest.approx(
        (math.exp(logs.low), math.exp(logs.high))
    )
    assert math.isnan(speed_up([(Cost(100, False), Cost(50, False))]).interval.low)


def test_censored_runs_give_a_bound_and_are_never_dropped():
    never = Cost(100, censored=True)
    found = speed_up([(Cost(100, False), never)])
    assert found.relation == "<" and found.interval.mean == 1.0 and math.isnan(found.interval.low)
    some = speed_up([(Cost(100, False), Cost(25, False)), (Cost(100, False), never)])
    assert some.relation == "<" and some.interval.mean == pytest.approx(2.0) and some.interval.n == 2
    assert speed_up([(never, Cost(50, False))]).relation == ">"
    assert speed_up([(never, Cost(50, True))]).relation == "?"
    assert speed_up([(Cost(100, False), Cost(0, True))]).relation == "?"


def test_a_bound_bounds_what_longer_runs_would_have_shown():
    generator = np.random.default_rng(0)
    for _ in range(50):
        true = generator.lognormal(4.5, 0.5, 5)
        cut = [Cost(min(cost, 100.0), bool(cost > 100)) for cost in true]
        found = speed_up([(Cost(100, False), cost) for cost in cut])
        truth = speed_up([(Cost(100, False), Cost(cost, False)) for cost in true]).interval.mean
        assert truth <= found.interval.mean + 1e-12
        assert (found.relation == "=") == (not any(cost.censored for cost in cut))
