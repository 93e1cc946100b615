"""Final loss and speed-up against model size: the best group of each optimizer at each size."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from sophia_train.compare.drawing import (
    MARKERS,
    PUBLISHED,
    SOFT,
    Drawing,
    color_of,
    finish,
    new_axes,
    short,
)
from sophia_train.compare.reference import Curve
from sophia_train.compare.report import Report, Row, best_by_optimizer
from sophia_train.compare.statistics import Interval


def draw_losses_by_size(name: str, report: Report) -> Drawing:
    """Draw the loss of each optimizer at each size, with its interval, and published ones."""
    axes = new_axes()
    for optimizer, rows in _by_optimizer(report).items():
        finals = {size: row.final for size, row in rows.items() if row.final}
        _draw_intervals(axes, finals, optimizer, report)
    series = _published(report)
    if series:
        axes.plot([], [], linestyle="", label="published, on OpenWebText, validation of theirs:")
    for first, *others in series:
        curves = [first, *others]
        axes.plot(
            [curve.parameters for curve in curves],
            [curve.losses[-1] for curve in curves],
            color=color_of(first.our_optimizer, report.optimizers),
            marker=MARKERS[first.kind],
            label=f"{first.optimizer}, {first.name} ({first.kind}), {short(first.tokens[-1])} tokens",
            **PUBLISHED,
        )
    axes.set_ylabel("validation loss (nats a token)")
    axes.set_title(f"loss by size{report.until}")
    _dress(axes, report, [curve.parameters for curves in series for curve in curves])
    caption = "Loss of the best group of each optimizer, by model size; bars are intervals over seeds."
    return finish(axes, name, "sizes", caption + report.remark)


def draw_speed_ups_by_size(name: str, report: Report) -> Drawing:
    """Draw the speed-up of each optimizer at each size, with its interval, and the published claim."""
    axes = new_axes()
    axes.axhline(1, color=SOFT, linewidth=0.9, zorder=1)
    for optimizer, rows in _by_optimizer(report).items():
        found = {size: row.speed_ups["tokens"] for size, row in rows.items() if row.speed_ups}
        found = {size: each for size, each in found.items() if each.relation != "?"}
        if found:
            _draw_intervals(axes, {size: each.interval for size, each in found.items()}, optimizer, report)
        for size, each in found.items():
            if each.relation != "=":
                axes.annotate(
                    each.relation,
                    (size, each.interval.mean),
                    xytext=(0, 4),
                    textcoords="offset points",
                    ha="center",
                )
    claims = report.reference.claims
    if claims:
        axes.plot(
            [claim.parameters for claim in claims],
            [claim.speed_up for claim in claims],
            color=SOFT,
            marker=MARKERS[claims[0].kind],
            label=f"{claims[0].optimizer}, {claims[0].name}: its claim, in steps ({claims[0].kind})",
            **PUBLISHED,
        )
    axes.set_ylabel("speed-up in tokens")
    axes.set_title(f"speed-up by size{report.until}")
    _dress(axes, report, [claim.parameters for claim in claims])
    caption = (
        "Tokens of each size's baseline over those of the best group of each optimizer, on the way to the "
        "baseline's final loss; < and > are bounds."
    )
    return finish(axes, name, "sizes", caption + report.remark)


def _by_optimizer(report: Report) -> dict[str, dict[int, Row]]:
    """The best row of each optimizer, by the number of parameters."""
    found: dict[str, dict[int, Row]] = {}
    for comparison in report.comparisons:
        for optimizer, row in best_by_optimizer(comparison.rows).items():
            found.setdefault(optimizer, {})[comparison.parameters] = row
    return found


def _published(report: Report) -> list[list[Curve]]:
    """Ends of published curves that differ in the size only."""
    found: dict[tuple[Any, ...], list[Curve]] = {}
    for curve in report.reference.curves:
        found.setdefault((curve.name, curve.kind, curve.optimizer, curve.tokens[-1]), []).append(curve)
    return [sorted(each, key=lambda curve: curve.parameters) for each in found.values() if len(each) > 1]


def _draw_intervals(axes: Axes, intervals: dict[int, Interval], optimizer: str, report: Report) -> None:
    ends = [
        (0.0, 0.0) if math.isnan(each.low) else (each.mean - each.low, each.high - each.mean)
        for each in intervals.values()
    ]
    color = color_of(optimizer, report.optimizers)
    means = [each.mean for each in intervals.values()]
    axes.plot(list(intervals), means, color=color, marker="o", label=optimizer)
    reach = list(zip(*ends, strict=True))
    axes.errorbar(list(intervals), means, reach, color=color, linestyle="none", capsize=3)


def _dress(axes: Axes, report: Report, published: Sequence[int]) -> None:
    """Mark the sizes that are there: those of the runs, and published ones that are not next to one."""
    sizes = sorted({comparison.parameters for comparison in report.comparisons})
    others = {each for each in published if all(abs(each / size - 1) > 0.15 for size in sizes)}
    marks = sorted({*sizes, *others})
    axes.set_xscale("log")
    axes.set_xticks(marks, [short(mark) for mark in marks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("parameters")
