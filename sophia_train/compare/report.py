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
        variation: of that to the first group of this optimizer and length, by seed; None for that group and
            where no seed is shared.
        reached: number of runs that reached the target on their way.
        speed_ups: over the baseline, by axis, to the target; empty for the baseline, and where there is none.
        win_rate: mean `optim/unclipped_fraction` over steps and runs; NaN where it is not logged.
        hessian_share: mean share of the time for Hessian passes.
    """

    group: Group
    final: Interval | None
    difference: Difference | None
    variation: Difference | None
    reached: int
    speed_ups: Mapping[str, SpeedUp]
    win_rate: float
    hessian_share: float

    @property
    def loss(self) -> float:
        """The mean of `final`; NaN if there is none."""
        return math.nan if self.final is None else self.final.mean


@dataclass(frozen=True)
class Lengths:
    """How the final loss of an optimizer depends on the length of its schedule, against the baseline's.

    Attributes:
        optimizer: whose.
        rows: the best of each length, by increasing length; two or more.
        speed_up: tokens of the baseline's schedule over those of the schedule that would end at its loss: on
            the line between two lengths, loss against the logarithm of tokens, by seed; a bound if that is
            not between any. None for the baseline's optimizer and where not all share a seed.
    """

    optimizer: str
    rows: Sequence[Row]
    speed_up: SpeedUp | None


@dataclass(frozen=True)
class Comparison:
    """Groups of one model size, and one of them as the baseline.

    Attributes:
        size: of the models, such as 124M.
        parameters: the same, exactly, of the first group.
        baseline: label of the group that others are compared with; None if none has its optimizer.
        target: loss of the speed-ups, nats a token; None for the baseline's final one.
        rows: a row for each group.
        lengths: of each optimizer that has runs of several.
        findings: what is unequal.
    """

    size: str
    parameters: int
    baseline: str | None
    target: float | None
    rows: Sequence[Row]
    lengths: Sequence[Lengths]
    findings: Sequence[Finding]

    @property
    def baseline_row(self) -> Row | None:
        """That of the baseline, if there is one."""
        return next((row for row in self.rows if row.group.label == self.baseline), None)


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
        target: loss in nats a token to measure speed-ups to; None for the baseline's own final loss, seed by
            seed, or its mean where a group shares no seed with it.
        studies: the tuning that is on record.

    Raises:
        ConfigError: the baseline has no such run, or the target is not below where a run starts.
    """
    if baseline is not None:
        _check_target(groups, baseline, target)
    theirs = {} if baseline is None else _finals(baseline)
    firsts: dict[tuple[str, int], Group] = {}
    rows = []
    for group in groups:
        mine = _finals(group)
        first = firsts.setdefault((group.optimizer, group.total_steps), group)
        pairs = [] if baseline is None else _pairs(group, baseline, target)
        compared = baseline is not None and group is not baseline
        rows.append(
            Row(
                group,
                t_interval(list(mine.values())) if mine else None,
                paired_difference(mine, theirs) if compared else None,
                paired_difference(mine, _finals(first)) if group is not first else None,
                sum(not ours["step"].censored for _, ours in pairs),
                {axis: speed_up([(one[axis], ours[axis]) for one, ours in pairs]) for axis in AXES}
                if compared
                else {},
                _mean(group, lambda run: run.unclipped_fraction),
                _mean(group, lambda run: run.hessian_share),
            )
        )
    parameters = groups[0].parameters
    return Comparison(
        size_name(parameters),
        parameters,
        None if baseline is None else baseline.label,
        target,
        rows,
        _lengths(rows, baseline),
        unequal(groups, studies),
    )


def best_by_length(rows: Sequence[Row]) -> list[Row]:
    """The row of the lowest final loss of each optimizer and length, in the order of the rows."""
    lengths = dict.fromkeys(row.group.total_steps for row in rows)
    best = [
        best_by_optimizer([row for row in rows if row.group.total_steps == length]).values()
        for length in lengths
    ]
    chosen = {row.group.label for each in best for row in each}
    return [row for row in rows if row.group.label in chosen]


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


def _check_target(groups: Sequence[Group], baseline: Group, target: float | None) -> None:
    """Check the baseline, and that the loss of the speed-ups is below where runs start."""
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


def _pairs(
    group: Group, baseline: Group, target: float | None
) -> list[tuple[dict[str, Cost], dict[str, Cost]]]:
    """What the baseline and each run of a group spent until a loss, by axis: by seed, if they share any."""
    theirs = baseline.complete
    if shared := [run for run in group.runs if run.seed in theirs]:
        pairs = [(theirs[run.seed].curve, run.curve) for run in shared]
    else:
        mean = mean_curve(list(theirs.values()))
        pairs = [(mean, run.curve) for run in group.runs]
    targets = [target or one[-1]["val/loss"] for one, _ in pairs]
    return [(_costs(loss, one), _costs(loss, ours)) for loss, (one, ours) in zip(targets, pairs, strict=True)]


def _costs(target: float, curve: Sequence[Mapping[str, float]]) -> dict[str, Cost]:
    losses = [point["val/loss"] for point in curve]
    return {axis: cost_to_reach(target, losses, [point[axis] for point in curve]) for axis in AXES}


def _lengths(rows: Sequence[Row], baseline: Group | None) -> list[Lengths]:
    """Put the best rows of each optimizer and length together, where there are ends of several lengths."""
    found: dict[str, list[Row]] = {}
    ends = [row for row in rows if row.group.compared_step == row.group.total_steps]
    for row in reversed(best_by_length(ends)):  # by increasing length
        found.setdefault(row.group.optimizer, []).append(row)
    return [
        Lengths(
            optimizer,
            each,
            None
            if baseline is None or optimizer == baseline.optimizer
            else _speed_up_of_schedules([row.group for row in each], baseline),
        )
        for optimizer, each in reversed(found.items())
        if len(each) > 1
    ]


def _speed_up_of_schedules(groups: Sequence[Group], baseline: Group) -> SpeedUp | None:
    """See `Lengths.speed_up`; groups by increasing length."""
    runs = [group.complete for group in groups]
    shared = set(baseline.complete).intersection(*runs)
    pairs = []
    for seed in sorted(shared):
        end = baseline.complete[seed].curve[-1]
        ends = [each[seed].curve[-1] for each in runs]
        logarithm = cost_to_reach(
            end["val/loss"],
            [each["val/loss"] for each in ends],
            [math.log(each["tokens"]) for each in ends],
        )
        shortest_is_enough = ends[0]["val/loss"] <= end["val/loss"]
        tokens = Cost(math.exp(logarithm.value), logarithm.censored)
        # a shorter one might have been enough, too: as if the baseline had not reached its own loss
        pairs.append((Cost(end["tokens"], censored=shortest_is_enough), tokens))
    return speed_up(pairs) if pairs else None


def _mean(group: Group, value: Callable[[Run], float]) -> float:
    """Average over the runs that have it."""
    values = [value(run) for run in group.runs if math.isfinite(value(run))]
    return fmean(values) if values else math.nan
