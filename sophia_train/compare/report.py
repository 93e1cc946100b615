"""A comparison of groups of runs: its numbers, and as Markdown."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from sophia_train.compare.fairness import Finding, unequal
from sophia_train.compare.runs import Group, Run
from sophia_train.compare.statistics import (
    LEVEL,
    Cost,
    Difference,
    Interval,
    SpeedUp,
    cost_to_reach,
    paired_difference,
    speed_up,
    t_interval,
)
from sophia_train.errors import ConfigError
from sophia_train.trackers.base import AXES

NOTHING = "-"


@dataclass(frozen=True)
class Row:
    """The numbers of one group.

    Attributes:
        group: whose.
        final: validation loss at the end of the schedule, over seeds; None if no run got there.
        difference: of that to the baseline, by seed; None for the baseline and where no seed is shared.
        reached: number of runs that reached the target.
        speed_ups: over the baseline, by axis; empty for the baseline.
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
class Report:
    """A comparison.

    Attributes:
        baseline: label of the group that others are compared with.
        target: loss of the speed-ups, nats a token.
        rows: a row for each group.
        findings: what is unequal.
    """

    baseline: str
    target: float
    rows: Sequence[Row]
    findings: Sequence[Finding]


def compare_groups(groups: Sequence[Group], baseline: Group, target: float | None = None) -> Report:
    """Compare groups with one of them.

    Args:
        groups: all of them, the baseline with them.
        baseline: has a run with a finite loss at the end of its schedule.
        target: loss in nats a token to measure speed-ups to; None for the baseline's mean final loss.

    Raises:
        ConfigError: the baseline has no such run, or the target is not below where a run starts.
    """
    finals = {group.label: {s: run.final_loss for s, run in group.complete.items()} for group in groups}
    if not finals[baseline.label]:
        raise ConfigError(
            f"the baseline, {baseline.label}, has no run with a finite loss at the end of its schedule; "
            "let one go on to its end, or choose another --baseline"
        )
    if target is None:
        target = fmean(finals[baseline.label].values())
    for group in groups:
        for run in group.runs:
            if not run.curve[0]["val/loss"] > target and math.isfinite(run.curve[0]["val/loss"]):
                raise ConfigError(
                    f"the target, {target:.4f}, is not below the first loss of {run.path}; "
                    "choose a lower --target"
                )
    curve = mean_curve(list(baseline.complete.values()))
    reference = {axis: _cost(target, curve, axis) for axis in AXES}
    rows = []
    for group in groups:
        mine = finals[group.label]
        is_baseline = group is baseline
        costs = {axis: [_cost(target, run.curve, axis) for run in group.runs] for axis in AXES}
        rows.append(
            Row(
                group,
                t_interval(list(mine.values())) if mine else None,
                None if is_baseline else paired_difference(mine, finals[baseline.label]),
                sum(not cost.censored for cost in costs["step"]),
                {} if is_baseline else {axis: speed_up(reference[axis], costs[axis]) for axis in AXES},
                _mean(group, lambda run: run.unclipped_fraction),
                _mean(group, lambda run: run.hessian_share),
            )
        )
    return Report(baseline.label, target, rows, unequal(groups))


def mean_curve(runs: Sequence[Run]) -> list[dict[str, float]]:
    """Average loss and costs over runs, at the steps where all of them were evaluated.

    Args:
        runs: at least one, and all with an evaluation at the same last step.
    """
    by_step = [{int(point["step"]): point for point in run.curve} for run in runs]
    shared = sorted(set.intersection(*(set(each) for each in by_step)))
    keys = (*AXES, "val/loss")
    return [{key: fmean(each[step][key] for each in by_step) for key in keys} for step in shared]


def markdown(report: Report) -> str:
    """Write a comparison as Markdown."""
    lines = [
        "## Final validation loss",
        "",
        f"Nats a token at the end of the schedule; {100 * LEVEL:g} % intervals over seeds.",
        "",
        *_table(
            ["", "seeds", "loss", "interval", f"less {report.baseline}", "interval", "detectable", "win rate"]
            + ["time for Hessian"],
            [_final_cells(row, report.baseline) for row in report.rows],
        ),
        "",
        "Differences are paired by seed: Student's t below 10 seeds, bootstrap from there. Detectable is the "
        "true difference that would show at 5 % in 80 % of such comparisons.",
        "",
        f"## Speed-up to a loss of {report.target:.4f}",
        "",
        f"{report.baseline}'s mean curve over each run's own, a geometric mean with its interval over seeds; "
        "the baseline's own spread is not in it. A bound (<, >) where a run never reaches the loss.",
        "",
        *_table(
            ["", "reach it", "steps", "tokens", "FLOPs", "seconds"],
            [_speed_cells(row, report.baseline) for row in report.rows],
        ),
        "",
    ]
    left_out = [(row.group, run) for row in report.rows for run in row.group.runs if not run.is_comparable]
    if left_out:
        lines += ["## Not in the final losses", ""]
        lines += [f"- {run.path} ({group.label}): {_why(run)}" for group, run in left_out]
        lines.append("")
    lines += ["## Unequal beyond the optimizer and its rates", ""]
    for finding in report.findings:
        values = (f"{', '.join(each) or 'none'} ({label})" for label, each in finding.values.items())
        lines.append(f"- **{finding.what}**: {'; '.join(values)}")
    lines += [] if report.findings else ["Nothing."]
    return "\n".join(lines) + "\n"


def _cost(target: float, curve: Sequence[Mapping[str, float]], axis: str) -> Cost:
    return cost_to_reach(target, [point["val/loss"] for point in curve], [point[axis] for point in curve])


def _mean(group: Group, value: Callable[[Run], float]) -> float:
    """Average over the runs that have it."""
    values = [value(run) for run in group.runs if math.isfinite(value(run))]
    return fmean(values) if values else math.nan


def _why(run: Run) -> str:
    if run.is_complete:
        return "its final loss is not finite"
    at = f"cut at step {run.last_step:,} of {run.total_steps:,}, loss {run.final_loss:.4f} mid-schedule"
    return f"{at} ({run.reason})"


def _final_cells(row: Row, baseline: str) -> list[str]:
    cells = [row.group.label, f"{len(row.group.complete)} of {len(row.group.runs)}"]
    cells += [f"{row.final.mean:.4f}", _ends(row.final, ".4f")] if row.final else [NOTHING, NOTHING]
    if row.difference is not None:
        interval = row.difference.interval
        cells += [f"{interval.mean:+.4f}", f"{_ends(interval, '+.4f')}{_method(row.difference)}"]
        cells.append(_number(row.difference.detectable, ".4f"))
    else:
        cells += [_no_difference(row, baseline), NOTHING, NOTHING]
    return [*cells, _number(row.win_rate, ".2f"), _number(row.hessian_share, ".1%").replace("%", " %")]


def _no_difference(row: Row, baseline: str) -> str:
    if row.group.label == baseline:
        return "baseline"
    return NOTHING if row.final is None else "no shared seed"


def _speed_cells(row: Row, baseline: str) -> list[str]:
    cells = [row.group.label, f"{row.reached} of {len(row.group.runs)}"]
    if row.group.label == baseline:
        return [*cells, *["baseline"] * len(AXES)]
    return [*cells, *(_speed(row.speed_ups[axis]) for axis in ("step", "tokens", "flops", "seconds"))]


def _speed(found: SpeedUp) -> str:
    if found.relation == "?":
        return NOTHING
    if found.relation != "=":
        return f"{found.relation} {found.interval.mean:.2f}"
    ends = _ends(found.interval, ".2f")
    return f"{found.interval.mean:.2f}" + ("" if ends == NOTHING else f" ({ends})")


def _ends(interval: Interval, form: str) -> str:
    if math.isnan(interval.low):
        return NOTHING
    return f"{interval.low:{form}} to {interval.high:{form}}"


def _method(difference: Difference) -> str:
    return f", {difference.method}, n = {difference.interval.n}" if difference.interval.n > 1 else ""


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else NOTHING


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
