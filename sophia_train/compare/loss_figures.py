"""Validation loss against what was spent: steps, tokens, time, FLOPs."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from sophia_train.compare.drawing import (
    DASHES,
    MARKERS,
    POINTS,
    PUBLISHED,
    Drawing,
    color_of,
    finish,
    frame_losses,
    new_axes,
    short_numbers,
)
from sophia_train.compare.reference import Curve
from sophia_train.compare.report import Comparison, Report, Row, mean_curve, named_rows

SHOWN_FROM = 0.2
"""Share of a run from which on its losses are in the frame."""

AXIS_WORDS = {
    "step": "steps",
    "tokens": "tokens",
    "seconds": "training time",
    "flops": "FLOPs, Hessian passes included",
}

TIMES = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))

FAINT: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.4}
CUT: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.7, "linestyle": ":"}


def draw_losses(name: str, comparison: Comparison, report: Report, axis: str) -> Drawing:
    """Draw the mean loss of each group, with a band from the lowest to the highest seed.

    Args:
        name: of the figure.
        comparison: groups of one size.
        report: what that is a part of.
        axis: what was spent, one of `AXIS_WORDS`; published results are under `tokens` only, as their steps,
            machines and ways of counting FLOPs are other ones.
    """
    axes = new_axes()
    named = named_rows(comparison)
    spent = max(run.curve[-1][axis] for row in comparison.rows for run in row.group.runs)
    unit, unit_name = _unit(axis, spent)
    in_frame: list[float] = []
    for row in comparison.rows:
        color = color_of(row.group.optimizer, report.optimizers)
        if row in named:
            in_frame += _draw_mean(axes, row, axis, unit, color=color, **_look(row, named))
        elif row.group.complete:
            points = mean_curve(list(row.group.complete.values()))
            axes.plot([p[axis] / unit for p in points], [p["val/loss"] for p in points], color=color, **FAINT)
        for run in row.group.runs:
            if not run.is_comparable:
                losses = [point["val/loss"] for point in run.curve]
                axes.plot([point[axis] / unit for point in run.curve], losses, color=color, **CUT)
    references = report.reference.near(comparison.parameters) if axis == "tokens" else []
    if references:
        axes.plot([], [], linestyle="", label="published, on OpenWebText, validation of theirs:")
    for curve in references:
        in_frame += _draw_reference(axes, curve, report)
    frame_losses(axes, in_frame)
    _frame_costs(axes, spent / unit, [curve.tokens[-1] for curve in references])
    axes.set_xlabel(unit_name)
    axes.set_ylabel("validation loss (nats a token)")
    axes.set_title(f"{comparison.size} parameters{report.until}")
    if axis in ("step", "tokens"):
        short_numbers(axes)
    caption = _caption(comparison, unit_name, some_are_faint=len(named) < len(comparison.rows))
    return finish(axes, name, f"loss {comparison.size}", caption + report.remark)


def _draw_mean(axes: Axes, row: Row, axis: str, unit: float, **line: Any) -> list[float]:
    """Draw mean and band of a group; returns the losses that the frame has to show."""
    runs = list(row.group.complete.values())
    if not runs:
        return []
    points = mean_curve(runs)
    spends = [point[axis] / unit for point in points]
    seeds = f" ({len(runs)} seeds)" if len(runs) > 1 else ""
    axes.plot(spends, [point["val/loss"] for point in points], label=f"{row.group.label}{seeds}", **line)
    if len(runs) > 1:
        ends = [point["lowest"] for point in points], [point["highest"] for point in points]
        axes.fill_between(spends, *ends, color=line["color"], alpha=0.22, linewidth=0)
    return _later([point["step"] for point in points], [point["val/loss"] for point in points])


def _draw_reference(axes: Axes, curve: Curve, report: Report) -> list[float]:
    """Draw a published run, its end marked for how sure it is; returns the losses to show."""
    axes.plot(
        curve.tokens,
        curve.losses,
        color=color_of(curve.our_optimizer, report.optimizers),
        marker=MARKERS[curve.kind],
        markevery=[len(curve.tokens) - 1],
        label=curve.label,
        **PUBLISHED,
    )
    return _later(curve.tokens, curve.losses)


def _look(row: Row, named: Sequence[Row]) -> dict[str, Any]:
    """Tell groups of one optimizer, which have one colour, apart: first of all those of other lengths."""
    lengths = sorted({each.group.total_steps for each in named}, reverse=True)
    alike = [
        each
        for each in named
        if each.group.optimizer == row.group.optimizer and each.group.total_steps == row.group.total_steps
    ]
    place = lengths.index(row.group.total_steps) + len(lengths) * alike.index(row)
    points, dashes = divmod(place, len(DASHES))
    return {
        "linestyle": DASHES[dashes],
        "marker": POINTS[points % len(POINTS)],
        "markersize": 3.5,
        "markevery": 0.1,
    }


def _unit(axis: str, spent: float) -> tuple[float, str]:
    """Choose what one mark of the axis is, and its name."""
    if axis != "seconds":
        return 1.0, AXIS_WORDS[axis]
    unit, name = next(each for each in TIMES if spent >= 3 * each[0] or each[0] == 1)
    return unit, f"{AXIS_WORDS[axis]} ({name})"


def _later(costs: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Losses but for those of the beginning, which would flatten the rest."""
    finite = [(cost, loss) for cost, loss in zip(costs, losses, strict=True) if math.isfinite(loss)]
    return [loss for cost, loss in finite if cost >= SHOWN_FROM * costs[-1]]


def _frame_costs(axes: Axes, spent: float, published: Sequence[float]) -> None:
    """Begin at 0; where published runs are far longer than these, take powers of ten."""
    if published and max(published) > 3 * spent > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_xlim(SHOWN_FROM * min(spent, *published), 1.5 * max(published))
    else:
        axes.set_xlim(0, max([spent, *published]) * 1.02 or 1)


def _caption(comparison: Comparison, against: str, *, some_are_faint: bool) -> str:
    words = f"Validation loss against {against}: means over seeds"
    if any(len(row.group.complete) > 1 for row in comparison.rows):
        words += ", the band from the lowest to the highest"
    if some_are_faint:
        words += "; the best settings of each optimizer, all others thin"
    if any(not run.is_comparable for row in comparison.rows for run in row.group.runs):
        words += "; dotted: runs that were cut or diverged"
    return f"{words}."
