"""The loss curves of one run as a picture."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sophia_train import durable
from sophia_train.errors import DataError
from sophia_train.trackers.jsonl import FILE_NAME, read_metrics

TRAIN, VALIDATION, QUIET = "#8fb8de", "#c8452f", "#6b6b6b"


def plot_run(run_dir: Path, baselines: Mapping[str, float] | None = None) -> Path:
    """Draw training and validation loss against step, with tokens on the upper axis, to `loss.png`.

    Args:
        run_dir: a run folder with `metrics.jsonl`.
        baselines: losses in nats a token to draw as horizontal lines, such as the bigram's.

    Returns:
        The picture's path.

    Raises:
        DataError: no loss is recorded, or the file was altered.
        OSError: reading or writing failed.
    """
    records = read_metrics(run_dir / FILE_NAME)
    train, validation = _series(records, "train/loss"), _series(records, "val/loss")
    if not train and not validation:
        raise DataError(
            f"{run_dir / FILE_NAME} has no train/loss and no val/loss; let the run log at least once"
        )
    baselines = dict(baselines or {})

    figure = Figure(figsize=(8, 4.8), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    last_step = max(step for step, _ in (*train, *validation))
    if train:
        axes.plot(*zip(*train, strict=True), color=TRAIN, linewidth=1.2, label="training")
    labels: list[tuple[float, str, str]] = []
    if validation:
        marker = "o" if len(validation) <= 40 else ""
        axes.plot(
            *zip(*validation, strict=True),
            color=VALIDATION,
            linewidth=1.8,
            marker=marker,
            markersize=3.5,
            label="validation",
            clip_on=False,
        )
        labels.append((validation[-1][1], f"{validation[-1][1]:.3f}", VALIDATION))
    for name, value in baselines.items():
        axes.axhline(value, color=QUIET, linewidth=0.9, linestyle=(0, (5, 4)), zorder=1)
        labels.append((value, f"{name} {value:.3f}", QUIET))
    axes.set_xlim(0, max(last_step, 1))
    shown = [*(loss for _, loss in validation), *baselines.values(), *_without_spikes([y for _, y in train])]
    margin = 0.05 * (max(shown) - min(shown)) or 0.1
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    _write_at_the_right(axes, labels)
    _dress(axes, records)
    axes.set_title(run_dir.resolve().name, loc="left", fontsize=12, fontweight="bold", pad=10)

    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    path = run_dir / "loss.png"
    durable.write_bytes(path, picture.getvalue())
    return path


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of the records that have a finite `key`."""
    return [(r["step"], r[key]) for r in records if key in r and math.isfinite(r[key])]


def _without_spikes(losses: list[float]) -> list[float]:
    """Return the losses but for rare ones above the first, which would flatten the rest of the curve."""
    if not losses:
        return []
    high = max(losses[0], sorted(losses)[int(0.95 * (len(losses) - 1))])
    return [loss for loss in losses if loss <= high]


def _write_at_the_right(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write (height, text, colour) at the right of the axes, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.045 * (high - low)
    heights: list[float] = []
    for height, text, color in sorted(labels):
        heights.append(max(height, heights[-1] + gap) if heights else height)
        axes.annotate(
            text,
            (1.0, heights[-1]),
            xycoords=("axes fraction", "data"),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=9,
            annotation_clip=False,
        )


def _dress(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9a9a9a")
    axes.tick_params(color="#9a9a9a", labelcolor="#333333")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    last = max(records, key=lambda record: record["step"])
    if last["step"] and last.get("tokens"):
        rate = last["tokens"] / last["step"]
        above = axes.secondary_xaxis("top", functions=(lambda x: x * rate, lambda x: x / rate))
        above.set_xlabel("tokens", color=QUIET, fontsize=9)
        above.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        above.tick_params(color="#9a9a9a", labelcolor=QUIET, labelsize=8)
        above.spines["top"].set_visible(False)


def _short(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
