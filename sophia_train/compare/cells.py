"""The numbers of a comparison as the cells of its tables."""

import math

from sophia_train.compare.report import Lengths, Row
from sophia_train.compare.statistics import Difference, Interval, SpeedUp
from sophia_train.trackers.base import AXES

NOTHING = "-"


def loss_cells(row: Row, baseline: str | None) -> list[str]:
    """Label, difference to the baseline, loss, seeds, what is detectable, win rate, overhead."""
    if row.difference is None:
        cells = [_no_difference(row, baseline), NOTHING]
    else:
        cells = _difference_cells(row.difference, len(row.group.complete))
    cells += [f"{row.final.mean:.4f}", ends_text(row.final, ".4f")] if row.final else [NOTHING, NOTHING]
    return [
        row.group.label,
        *cells,
        f"{len(row.group.complete)} of {len(row.group.runs)}",
        number_text(row.difference.detectable, ".4f") if row.difference else NOTHING,
        number_text(row.win_rate, ".2f"),
        number_text(row.hessian_share, ".1%").replace("%", " %"),
    ]


def variation_cells(row: Row) -> list[str]:
    """Label, difference to the first group of the optimizer, what is detectable."""
    assert row.variation is not None
    detectable = number_text(row.variation.detectable, ".4f")
    return [row.group.label, *_difference_cells(row.variation, len(row.group.complete)), detectable]


def lengths_cells(lengths: Lengths) -> list[str]:
    """Optimizer, speed-up by the ends of its schedules, the loss at the end of each."""
    losses = [f"{row.group.total_steps:,}: {number_text(row.loss, '.4f')}" for row in lengths.rows]
    found = "-" if lengths.speed_up is None else speed_text(lengths.speed_up)
    return [lengths.optimizer, found, ", ".join(losses)]


def _difference_cells(difference: Difference, seeds: int) -> list[str]:
    interval = difference.interval
    number = f", n = {interval.n}" if interval.n != seeds else ""
    return [f"{interval.mean:+.4f}", f"{ends_text(interval, '+.4f')}{number}"]


def _no_difference(row: Row, baseline: str | None) -> str:
    if row.group.label == baseline:
        return "baseline"
    return NOTHING if row.final is None or baseline is None else "no shared seed"


def speed_cells(row: Row, baseline: str) -> list[str]:
    """Label, runs that reach the target, and the speed-up by steps, tokens, FLOPs, seconds."""
    cells = [row.group.label, f"{row.reached} of {len(row.group.runs)}"]
    if row.group.label == baseline:
        return [*cells, *["baseline"] * len(AXES)]
    return [*cells, *(speed_text(row.speed_ups[axis]) for axis in ("step", "tokens", "flops", "seconds"))]


def size_cells(row: Row | None, baseline: str | None) -> list[str]:
    """Loss and speed-up in tokens of the best row of an optimizer at one size."""
    if row is None or row.final is None:
        return [NOTHING, NOTHING]
    loss = f"{row.final.mean:.4f}"
    if row.group.label == baseline:
        return [loss, "baseline"]
    return [loss, speed_text(row.speed_ups["tokens"]) if row.speed_ups else NOTHING]


def speed_text(found: SpeedUp) -> str:
    """Write a speed-up with its interval, or as a bound."""
    if found.relation == "?":
        return NOTHING
    if found.relation != "=":
        return f"{found.relation} {found.interval.mean:.2f}"
    ends = ends_text(found.interval, ".2f")
    return f"{found.interval.mean:.2f}" + ("" if ends == NOTHING else f" ({ends})")


def ends_text(interval: Interval, form: str) -> str:
    """Write the ends of an interval, if it has any."""
    if math.isnan(interval.low):
        return NOTHING
    return f"{interval.low:{form}} to {interval.high:{form}}"


def number_text(value: float, form: str) -> str:
    """Write a number, if it is one."""
    return f"{value:{form}}" if math.isfinite(value) else NOTHING
