"""The numbers of a comparison: each group of runs against the baseline of its size."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from sophia_train.compare.fairness import Finding, unequal
from sophia_train.compare.groups import Group, by_size, counterpart, size_name
from sophia_train.compare.reference import NO_REFERENCE, Reference
from sophia_train.compare.runs import Run
from sophia_train.compare.statistics import (
    Cost,
    Difference,
    Interval,
    SpeedUp,
    cost_to_reach,
    paired_difference,
    speed_up,
    t_interval,
)
from sophia_train.compare.tuning import Study
from sophia_train.errors import ConfigError
from sophia_train.trackers.base import AXES

NAMED = 8
"""Most groups that are all named in figures."""


@dataclass(frozen=True)
class Row:
    """The numbers of one group.

    Attributes:
        group: whose.
        final: validation loss where it is compared, over seeds; None if no run got there.
        difference: of that to the baseline, by seed; None for the baseline and where no seed is shared.
        reached: number of runs that reached the target.
        speed_ups: over the baseline, by axis; empty for the baseline, and where there is none.
        win_rate: mean `optim/unclipped_fraction` over steps and runs; NaN where it is not logged.
        hessian_share: mean share of the time for Hessian passes.
    """

    group: Group
    final: Interval | None
    difference: Difference | None
    reached: int
    speed_ups: Mapping[str, SpeedUp]
    win_rate: float
    hessian_share: float


@dataclass(frozen=True)
class Comparison:
    """Groups of one model size, and one of them as the baseline.

    Attributes:
        size: of the models, such as 124M.
        parameters: the same, exactly, of the first group.
        baseline: label of the group that others are compared with; None if none has its optimizer.
        target: loss of the speed-ups, nats a token; NaN without a baseline.
        rows: a row for each group.
        findings: what is unequal.
    """

    size: str
    parameters: int
    baseline: str | None
    target: float
    rows: Sequence[Row]
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Report:
    """Everything that is shown.

    Attributes:
        comparisons: one for each model size, the smallest first.
        at_step: where the runs are compared, mid-schedule; None for the end of the schedule.
        studies: tuning on record.
        reference: published results beside the runs.
    """

    comparisons: Sequence[Comparison]
    at_step: int | None = None
    studies: Sequence[Study] = ()
    reference: Reference = NO_REFERENCE

    @property
    def rows(self) -> list[Row]:
        """Those of all sizes."""
        return [row for comparison in self.comparisons for row in comparison.rows]

    @property
    def optimizers(self) -> list[str]:
        """Those of all groups, in their order."""
        return list(dict.fromkeys(row.group.optimizer for row in self.rows))

    @property
    def where(self) -> str:
        """Words for a title about where the runs are compared; none for the end of the schedule."""
        return "" if self.at_step is None else f" at step {self.at_step:,}, mid-schedule"

    @property
    def until(self) -> str:
        """The same behind the title of a figure."""
        return "" if self.at_step is None else f", until step {self.at_step:,}: mid-schedule"

    @property
    def remark(self) -> str:
        """The same as a sentence that ends a caption."""
        return "" if self.at_step is None else f" Until step {self.at_step:,}, mid-schedule."

    @property
    def runs(self) -> list[Run]:
        """Those of all groups."""
        return [run for row in self.rows for run in row.group.runs]


def compare_sizes(
    groups: Sequence[Group],
    baseline: Group,
    target: float | None = None,
    studies: Sequence[Study] = (),
) -> list[Comparison]:
    """Compare groups size by size.

    At a size that is not the baseline's, its `counterpart` is in its place.

    Raises:
        ConfigError: a baseline has no finite loss where it is compared, or the target is not below where a
            run starts, or is one number for several sizes.
    """
    sizes = by_size(groups)
    if len(sizes) > 1 and target is not None:
        named = ", ".join(size_name(each[0].parameters) for each in sizes)
        raise ConfigError(
            f"--target {target} is one loss for models of {named}; leave it out, or give runs of one size"
        )
    return [compare_groups(each, counterpart(baseline, each), target, studies) for each in sizes]


def compare_groups(
    groups: Sequence[Group],
    baseline: Group | None,
    target: float | None = None,
    studies: Sequence[Study] = (),
) -> Comparison:
    """Compare groups of one size with one of them.

    Args:
        groups: all of them, the baseline with them.
        baseline: has a run with a finite loss where it is compared; None to give losses only.
        target: loss in nats a token to measure speed-ups to; None for the baseline's mean final loss.
        studies: the tuning that is on record.

    Raises:
        ConfigError: the baseline has no such run, or the target is not below where a run starts.
    """
    reference: dict[str, Cost] = {}
    if baseline is None:
        target = math.nan
    else:
        target = _target(groups, baseline, target)
        curve = mean_curve(list(baseline.complete.values()))
        reference = {axis: _cost(target, curve, axis) for axis in AXES}
    theirs = {} if baseline is None else _finals(baseline)
    rows = []
    for group in groups:
        mine = _finals(group)
        others = {} if group is baseline else reference
        costs = {axis: [_cost(target, run.curve, axis) for run in group.runs] for axis in AXES}
        rows.append(
            Row(
                group,
                t_interval(list(mine.values())) if mine else None,
                paired_difference(mine, theirs) if others else None,
                sum(not cost.censored for cost in costs["step"]),
                {axis: speed_up(cost, costs[axis]) for axis, cost in others.items()},
                _mean(group, lambda run: run.unclipped_fraction),
                _mean(group, lambda run: run.hessian_share),
            )
        )
    parameters = groups[0].parameters
    label = None if baseline is None else baseline.label
    return Comparison(size_name(parameters), parameters, label, target, rows, unequal(groups, studies))


def best_by_optimizer(rows: Sequence[Row]) -> dict[str, Row]:
    """The row of the lowest final loss of each optimizer, which is what its tuning found.

    Args:
        rows: of one size.
    """
    found: dict[str, Row] = {}
    for row in rows:
        best = found.get(row.group.optimizer)
        if row.final and (best is None or best.final is None or row.final.mean < best.final.mean):
            found[row.group.optimizer] = row
    return found


def named_rows(comparison: Comparison) -> list[Row]:
    """The rows that figures name: all, or if there are more than `NAMED`, the best of each optimizer."""
    if len(comparison.rows) <= NAMED:
        return list(comparison.rows)
    return list(best_by_optimizer(comparison.rows).values())


def mean_curve(runs: Sequence[Run]) -> list[dict[str, float]]:
    """Average loss and costs over runs, at the steps where all of them were evaluated.

    Args:
        runs: at least one, and all with an evaluation at the same last step.

    Returns:
        The means by axis and of `val/loss`, and its `lowest` and `highest` over runs.
    """
    by_step = [{int(point["step"]): point for point in run.curve} for run in runs]
    shared = sorted(set.intersection(*(set(each) for each in by_step)))
    curve = []
    for step in shared:
        points = [each[step] for each in by_step]
        mean = {key: fmean(point[key] for point in points) for key in (*AXES, "val/loss")}
        losses = [point["val/loss"] for point in points]
        curve.append({**mean, "lowest": min(losses), "highest": max(losses)})
    return curve


def _finals(group: Group) -> dict[int, float]:
    return {seed: run.final_loss for seed, run in group.complete.items()}


def _target(groups: Sequence[Group], baseline: Group, target: float | None) -> float:
    """Check the baseline and the loss of the speed-ups; the baseline's mean final loss if there is none."""
    if baseline.final_loss is None:
        raise ConfigError(
            f"the baseline, {baseline.label}, has no run with a finite loss where it is compared; "
            "let one go on to its end, or choose another --baseline"
        )
    target = baseline.final_loss if target is None else target
    for group in groups:
        for run in group.runs:
            if not run.curve[0]["val/loss"] > target and math.isfinite(run.curve[0]["val/loss"]):
                raise ConfigError(
                    f"the target, {target:.4f}, is not below the first loss of {run.path}; "
                    "choose a lower --target"
                )
    return target


def _cost(target: float, curve: Sequence[Mapping[str, float]], axis: str) -> Cost:
    return cost_to_reach(target, [point["val/loss"] for point in curve], [point[axis] for point in curve])


def _mean(group: Group, value: Callable[[Run], float]) -> float:
    """Average over the runs that have it."""
    values = [value(run) for run in group.runs if math.isfinite(value(run))]
    return fmean(values) if values else math.nan
