"""The numbers of a comparison as the cells of its tables."""

import math

from sophia_train.compare.report import Row
from sophia_train.compare.statistics import Difference, Interval, SpeedUp
from sophia_train.trackers.base import AXES

NOTHING = "-"


def loss_cells(row: Row, baseline: str | None) -> list[str]:
    """Label, seeds, loss, difference to the baseline, what is detectable, win rate, overhead."""
    cells = [row.group.label, f"{len(row.group.complete)} of {len(row.group.runs)}"]
    cells += [f"{row.final.mean:.4f}", ends_text(row.final, ".4f")] if row.final else [NOTHING, NOTHING]
    if row.difference is not None:
        interval = row.difference.interval
        cells += [f"{interval.mean:+.4f}", f"{ends_text(interval, '+.4f')}{_method(row.difference)}"]
        cells.append(number_text(row.difference.detectable, ".4f"))
    else:
        cells += [_no_difference(row, baseline), NOTHING, NOTHING]
    return [
        *cells,
        number_text(row.win_rate, ".2f"),
        number_text(row.hessian_share, ".1%").replace("%", " %"),
    ]


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


def _method(difference: Difference) -> str:
    return f", {difference.method}, n = {difference.interval.n}" if difference.interval.n > 1 else ""


def number_text(value: float, form: str) -> str:
    """Write a number, if it is one."""
    return f"{value:{form}}" if math.isfinite(value) else NOTHING
