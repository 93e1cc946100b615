"""How figures look: ink, sizes of letters, legends, and their files."""

import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

SERIES = ("#1566b8", "#c8452f", "#2b8540", "#8450c4", "#b06d00", "#08868c", "#c22f7c", "#6d5a4c")
"""Colours of optimizers; `page.css` has their counterparts for dark screens, in this order."""

INK, SOFT, GRID, PAPER = "#1f2328", "#626a73", "#e2e5e9", "#ffffff"

DASHES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)))
POINTS = (None, "o", "s", "^")
"""Lines of several settings of one optimizer, and the points on them where there are more than dashes."""

SETTINGS: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.06,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # letters stay letters
    "text.color": INK,
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
}

MARKERS = {"published": "D", "digitised": "o", "community": "^", "unverified": "x"}
"""Ends of published curves, by how sure they are."""

PUBLISHED: dict[str, Any] = {
    "linewidth": 1.0,
    "linestyle": (0, (4, 2)),
    "markerfacecolor": "none",
    "zorder": 1.5,
}
"""Lines of published results: thin, behind those of the runs."""

WIDTH, HEIGHT = 4.7, 3.1  # inches: on a telephone letters of 9 points stay legible
LETTERS = 58  # of a line of the legend
METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)


@dataclass(frozen=True)
class Drawing:
    """A finished figure.

    Attributes:
        name: of its files, without the ending.
        place: where in a report it belongs; see `contents`.
        caption: what it shows, as a sentence.
        png: its bytes, on white.
        svg: its text, with colours as in this module.
    """

    name: str
    place: str
    caption: str
    png: bytes
    svg: str


@contextmanager
def style(name: str) -> Iterator[None]:
    """Draw in the style of a paper; the same figure has the same bytes each time."""
    settings: Any = {**SETTINGS, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        yield


def new_axes(height: float = HEIGHT) -> Axes:
    """A figure with one set of axes."""
    return Figure(figsize=(WIDTH, height)).add_subplot()


def finish(axes: Axes, name: str, place: str, caption: str) -> Drawing:
    """Put the legend below the axes, where it hides nothing, and write PNG and SVG."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 2 if max(map(len, labels)) <= LETTERS / 2 else 1
        wrapped = [textwrap.fill(label, LETTERS) for label in labels]
        lines = math.ceil(sum(text.count("\n") + 1 for text in wrapped) / columns)
        figure.set_figheight(figure.get_figheight() + 0.17 * lines + 0.12)
        figure.legend(
            handles, wrapped, loc="outside lower left", alignment="left", labelspacing=0.35, ncols=columns
        )
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return Drawing(name, place, caption, png.getvalue(), _unique_names(svg.getvalue(), name))


def color_of(optimizer: str, optimizers: Sequence[str]) -> str:
    """A colour for each optimizer, the same in all figures; that of text for one that no run has."""
    return SERIES[optimizers.index(optimizer) % len(SERIES)] if optimizer in optimizers else SOFT


def short_numbers(axes: Axes) -> None:
    """Write the numbers of the x axis as 10k, 2.5M."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """Write a number as people say it: 124M, 1.56B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def frame_losses(axes: Axes, losses: Sequence[float]) -> None:
    """Show these losses; what lies above, as the first steps do, is outside."""
    if losses:
        margin = 0.06 * (max(losses) - min(losses)) or 0.05
        axes.set_ylim(min(losses) - margin, max(losses) + margin)


def _unique_names(svg: str, name: str) -> str:
    """Make the ids of a figure its own, so that several can stand in one page."""
    svg = METADATA.sub("", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
