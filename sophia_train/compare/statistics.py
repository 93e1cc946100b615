"""Intervals over seeds, and the speed-up to a target loss with runs that never reach it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from sophia_train.errors import UnavailableError

LEVEL = 0.95
"""Confidence of all intervals."""

BOOTSTRAP_FROM = 10
"""Number of seeds below which a bootstrap is too narrow, so that Student's t is taken."""


@dataclass(frozen=True)
class Interval:
    """A mean and where the true one is, with confidence `LEVEL`; the ends are NaN for a single value."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """The mean difference of two groups over the seeds that both have.

    Attributes:
        interval: of the difference, ours less the baseline's.
        method: "t" or "bootstrap".
        detectable: see `detectable_difference`; NaN for a single seed.
    """

    interval: Interval
    method: Literal["t", "bootstrap"]
    detectable: float


@dataclass(frozen=True)
class Cost:
    """What a run spent until it reached a loss; censored, what it spent in all without reaching it."""

    value: float
    censored: bool


@dataclass(frozen=True)
class SpeedUp:
    """The baseline's cost over ours, a geometric mean over runs.

    Attributes:
        relation: "=" where all reached the target; "<" or ">" where `interval.mean` is only a bound, from
            runs that did not; "?" where they bound it on no side.
        interval: its ends are NaN for a bound and for one run.
    """

    relation: Literal["=", "<", ">", "?"]
    interval: Interval


def t_interval(values: Sequence[float]) -> Interval:
    """Student's interval of a mean: `mean +- t(n - 1) s / sqrt(n)`.

    Args:
        values: independent, at least one.
    """
    n, mean = len(values), fmean(values)
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(_scipy().t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of a mean (Efron 1987), of 9,999 fixed resamples.

    Args:
        values: independent, at least `BOOTSTRAP_FROM` for its coverage to be near nominal.
    """
    mean = fmean(values)
    if min(values) == max(values):  # no acceleration can be estimated
        return Interval(mean, mean, mean, len(values))
    found = _scipy().bootstrap((values,), _mean_along, confidence_level=LEVEL, rng=0).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(values))


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare two groups seed by seed: weights and order of the data are the same, and so cancel.

    Student's t below `BOOTSTRAP_FROM` shared seeds, else a bootstrap of the differences.

    Args:
        ours: a value for each seed.
        baseline: the same of the other group.

    Returns:
        The difference; None if they share no seed.
    """
    differences = [ours[seed] - baseline[seed] for seed in sorted(ours.keys() & baseline.keys())]
    if not differences:
        return None
    n = len(differences)
    detectable = detectable_difference(stdev(differences), n) if n > 1 else math.nan
    if n < BOOTSTRAP_FROM:
        return Difference(t_interval(differences), "t", detectable)
    return Difference(bootstrap_interval(differences), "bootstrap", detectable)


def detectable_difference(deviation: float, n: int, power: float = 0.8) -> float:
    """Find the smallest true difference that n pairs would show with probability `power`.

    That is the d with `P(abs(T) > t(n - 1)) = power`, where T is noncentral t with n - 1 degrees of freedom
    and noncentrality `d sqrt(n) / deviation`; two-sided at 1 - `LEVEL`.

    Args:
        deviation: standard deviation of one difference.
        n: number of pairs, at least 2.
        power: above 1 - `LEVEL`.
    """
    stats = _scipy()
    critical = float(stats.t.ppf((1 + LEVEL) / 2, n - 1))

    def shown(noncentrality: float) -> float:
        upper, lower = (
            stats.nct.sf(critical, n - 1, noncentrality),
            stats.nct.cdf(-critical, n - 1, noncentrality),
        )
        return float(upper + lower)

    low, high = 0.0, 1.0
    while shown(high) < power:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if shown(middle) < power else (low, middle)
    return high * deviation / math.sqrt(n)


def cost_to_reach(target: float, losses: Sequence[float], costs: Sequence[float]) -> Cost:
    """Find where a curve first is at or below a target, on the straight line between two evaluations.

    Args:
        target: in the unit of the losses.
        losses: of each evaluation in order; those that are not finite are passed over.
        costs: spent at each evaluation, increasing.
    """
    before: tuple[float, float] | None = None
    for loss, cost in zip(losses, costs, strict=True):
        if not math.isfinite(loss):
            continue
        if loss <= target:
            if before is None or loss == target:
                return Cost(cost, censored=False)
            share = (before[0] - target) / (before[0] - loss)
            return Cost(before[1] + share * (cost - before[1]), censored=False)
        before = (loss, cost)
    return Cost(costs[-1], censored=True)


def speed_up(pairs: Sequence[tuple[Cost, Cost]]) -> SpeedUp:
    """Compare costs: the geometric mean of `baseline / ours`, with Student's interval of its logarithm.

    A run of ours that never reached the target would have cost more, so that the mean over all is below the
    number found with what it did cost; the same from above for the baseline. Nothing is left out.

    Args:
        pairs: for each run the baseline's cost and ours, to the same target; one of ours that was censored at
            its start, at 0, bounds nothing.
    """
    if any(0 in (baseline.value, ours.value) for baseline, ours in pairs):
        return SpeedUp("?", Interval(math.nan, math.nan, math.nan, len(pairs)))
    logarithm = t_interval([math.log(baseline.value / ours.value) for baseline, ours in pairs])
    mean, low, high = (math.exp(value) for value in (logarithm.mean, logarithm.low, logarithm.high))
    theirs_censored = any(baseline.censored for baseline, _ in pairs)
    ours_censored = any(ours.censored for _, ours in pairs)
    if not theirs_censored and not ours_censored:
        return SpeedUp("=", Interval(mean, low, high, logarithm.n))
    bound = Interval(mean, math.nan, math.nan, logarithm.n)
    if theirs_censored and ours_censored:
        return SpeedUp("?", bound)
    return SpeedUp(">" if theirs_censored else "<", bound)


def _mean_along(values: Any, axis: int) -> Any:
    return values.mean(axis=axis)


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise UnavailableError(
            "the scipy package is not installed; run `pip install 'sophia_train[compare]'`"
        ) from error
    return stats
