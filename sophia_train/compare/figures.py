"""The figures of a comparison."""

import math
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sophia_train.compare.drawing import (
    DASHES,
    SOFT,
    Drawing,
    color_of,
    finish,
    frame_losses,
    new_axes,
    style,
)
from sophia_train.compare.loss_figures import AXIS_WORDS, draw_losses
from sophia_train.compare.report import Comparison, Report, named_rows
from sophia_train.compare.size_figures import draw_losses_by_size, draw_speed_ups_by_size


def draw(report: Report) -> list[Drawing]:
    """Draw everything that a report has the numbers for."""
    drawings = []
    several = len(report.comparisons) > 1
    for comparison in report.comparisons:
        suffix = f"_{comparison.size}" if several else ""
        if any(row.difference for row in named_rows(comparison)):
            drawings.append(_styled(f"differences{suffix}", _draw_differences, comparison, report))
        for axis in AXIS_WORDS:
            drawings.append(_styled(f"loss_{axis}{suffix}", draw_losses, comparison, report, axis))
        if any(math.isfinite(row.win_rate) for row in comparison.rows):
            drawings.append(_styled(f"win_rate{suffix}", _draw_win_rates, comparison, report))
        if any(row.hessian_share > 0 for row in comparison.rows):
            drawings.append(_styled(f"overhead{suffix}", _draw_overheads, comparison, report))
    if several:
        drawings.append(_styled("loss_size", draw_losses_by_size, report))
        drawings.append(_styled("speed_up_size", draw_speed_ups_by_size, report))
    if any(math.isfinite(loss) for study in report.studies for loss in study.losses):
        drawings.append(_styled("tuning", _draw_tuning, report))
    return drawings


def _styled(name: str, draw_it: Callable[..., Drawing], *what: Any) -> Drawing:
    with style(name):
        return draw_it(name, *what)


def _draw_differences(name: str, comparison: Comparison, report: Report) -> Drawing:
    rows = [row for row in named_rows(comparison) if row.difference]
    axes = new_axes(0.75 + 0.42 * len(rows))
    axes.axvline(0, color=SOFT, linewidth=0.9, zorder=1)
    for place, row in enumerate(rows):
        assert row.difference is not None
        interval = row.difference.interval
        color = color_of(row.group.optimizer, report.optimizers)
        axes.plot([interval.low, interval.high], [place, place], color=color, solid_capstyle="butt")
        axes.plot(interval.mean, place, marker="o", color=color)
        _write_above(axes, place, f"{row.group.label}: {interval.mean:+.4f}")
    _dress_list(axes, len(rows))
    axes.set_xlabel(f"loss less that of {comparison.baseline} (nats a token)")
    axes.set_title(f"difference to the baseline{report.where}")
    caption = f"Loss of each group less that of {comparison.baseline}, with its interval over seeds."
    return finish(axes, name, f"differences {comparison.size}", caption + report.remark)


def _draw_win_rates(name: str, comparison: Comparison, report: Report) -> Drawing:
    shares = {row.group.label: (row.win_rate, row.group.optimizer) for row in named_rows(comparison)}
    axes = _draw_shares(shares, report)
    axes.set_xlim(0, 100)
    axes.set_xlabel("coordinates that are not clipped (%)")
    axes.set_title(f"win rate{report.until}")
    caption = "Win rate: the fraction of coordinates that are not clipped, mean over logged steps and seeds."
    return finish(axes, name, f"hessian {comparison.size}", caption + report.remark)


def _draw_overheads(name: str, comparison: Comparison, report: Report) -> Drawing:
    shares = {row.group.label: (row.hessian_share, row.group.optimizer) for row in named_rows(comparison)}
    axes = _draw_shares(shares, report)
    axes.set_xlim(0, 1.2 * max(100 * row.hessian_share for row in comparison.rows if row.hessian_share > 0))
    axes.set_xlabel("time in Hessian passes (%)")
    axes.set_title(f"overhead{report.until}")
    caption = (
        "Overhead: the share of the time that goes into Hessian passes, mean over logged steps and seeds."
    )
    return finish(axes, name, f"hessian {comparison.size}", caption + report.remark)


def _draw_shares(shares: dict[str, tuple[float, str]], report: Report) -> Axes:
    """Draw a bar for each label, which stands above it; a share that was not logged has none."""
    logged = {label: each for label, each in shares.items() if math.isfinite(each[0])}
    axes = new_axes(0.75 + 0.42 * len(logged))
    for place, (label, (share, optimizer)) in enumerate(logged.items()):
        axes.barh(place, 100 * share, height=0.36, color=color_of(optimizer, report.optimizers))
        _write_above(axes, place, f"{label}: {100 * share:.1f} %")
    _dress_list(axes, len(logged))
    return axes


def _write_above(axes: Axes, place: int, text: str) -> None:
    axes.annotate(
        text,
        (0, place - 0.24),
        xycoords=("axes fraction", "data"),
        xytext=(1, 0),
        textcoords="offset points",
        va="bottom",
        fontsize=8.5,
        annotation_clip=False,
    ).set_in_layout(False)


def _dress_list(axes: Axes, length: int) -> None:
    axes.set_ylim(length - 0.65, -0.75)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")


def _draw_tuning(name: str, report: Report) -> Drawing:
    axes = new_axes()
    seen: list[str] = []
    for study in report.studies:
        color = color_of(study.optimizer, report.optimizers)
        dashes = DASHES[seen.count(color) % len(DASHES)]
        seen.append(color)
        trials = range(1, len(study.losses) + 1)
        label = f"{study.path.name}: {study.budget}"
        axes.plot(trials, study.losses, linestyle="", marker="o", markersize=2.5, color=color, alpha=0.45)
        axes.step(trials, study.best_losses, where="post", color=color, linestyle=dashes, label=label)
    tried = sorted(loss for study in report.studies for loss in study.losses if math.isfinite(loss))
    first = [loss for study in report.studies for loss in study.losses[:1] if math.isfinite(loss)]
    ceiling = max([*first, tried[len(tried) // 2]])
    frame_losses(axes, [loss for loss in tried if loss <= ceiling])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trials")
    axes.set_ylabel("validation loss (nats a token)")
    axes.set_title("tuning")
    caption = "The lowest loss that each study had found after so many trials; a dot is a trial."
    return finish(axes, name, "tuning", caption)
