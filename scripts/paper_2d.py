"""Draw the paper's Figure 2: five optimizers on a loss of two parameters, one sharp and one flat.

    python scripts/paper_2d.py [--out FILE] [--start X Y] [--steps N] [--lr METHOD=VALUE] ...

The loss is 8 (x - 1)^2 (1.3 x^2 + 2 x + 1) + (y - 4)^2 / 2, smallest, 0, at (1, 4).

The paper prints neither start nor learning rates; those here are ours. At the start the loss curves downwards
along x, so Newton's method goes to the saddle point (0, 4). GD's rate is close to the largest stable one,
2/68.8. SignGD and Adam have a rate between bouncing along x and dawdling along y. Sophia is that of this
project with the exact diagonal of the Hessian at each step; nothing is noisy, so nothing is averaged: betas
0, gamma 1, clip 1.

Much hangs on the rates: Adam is there in 30 steps with 0.15, and Sophia in 46 with 0.1, which Adam has here.
"""

import argparse
import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sophia_train import durable
from sophia_train.command_line import Parser, whole_number
from sophia_train.errors import ConfigError, OutputError, exit_code_of
from sophia_train.optim import Sophia

START, MINIMUM, SADDLE = (0.22, 0.3), (1.0, 4.0), (0.0, 4.0)
NEAR = 1e-2  # a loss below this has reached the minimum
FARTHEST = 10.0  # of a start from 0: farther off, the picture shows nothing
BEHIND = {"color": "white", "alpha": 0.6, "pad": 0.6, "linewidth": 0}  # the words
SUFFIXES = (".png", ".svg", ".pdf")

Step = Callable[[], object]  # moves the point that it was made for


def loss(points: Tensor) -> Tensor:
    """Compute the loss of points (..., 2)."""
    x, y = points.unbind(-1)
    return 8 * (x - 1) ** 2 * (1.3 * x**2 + 2 * x + 1) + (y - 4) ** 2 / 2


gradient = torch.func.grad(loss)


def curvature(point: Tensor) -> Tensor:
    """Compute the Hessian's diagonal; beside it are zeros, as x and y do not interact."""
    return torch.func.jacrev(gradient)(point).diagonal()


def gd(point: Tensor, lr: float) -> Step:
    """Gradient descent."""
    return _with_gradient(torch.optim.SGD([point], lr), point)


def sign_gd(point: Tensor, lr: float) -> Step:
    """Descent by the gradient's sign."""
    return lambda: point.sub_(lr * gradient(point).sign())


def adam(point: Tensor, lr: float) -> Step:
    """Adam with torch's defaults."""
    return _with_gradient(torch.optim.Adam([point], lr), point)


def newton(point: Tensor, lr: float) -> Step:
    """Newton's method."""
    return lambda: point.sub_(lr * gradient(point) / curvature(point))


def sophia(point: Tensor, lr: float) -> Step:
    """Sophia with a fresh Hessian at each step."""
    optimizer = Sophia([point], lr, betas=(0.0, 0.0), gamma=1.0, clip_threshold=1.0, weight_decay=0.0)
    step = _with_gradient(optimizer, point)

    def with_hessian() -> None:
        optimizer.update_hessian({point: curvature(point)})
        step()

    return with_hessian


def _with_gradient(optimizer: torch.optim.Optimizer, point: Tensor) -> Step:
    def step() -> None:
        point.grad = gradient(point)
        optimizer.step()

    return step


class Method(NamedTuple):
    """An optimizer, its learning rate unless told otherwise, and how it is drawn."""

    begin: Callable[[Tensor, float], Step]
    lr: float
    style: dict[str, Any]


# Where paths coincide, what is drawn later is smaller, so that all can be seen.
METHODS = {
    "Sophia": Method(sophia, 0.3, {"color": "#a50f3c", "marker": "o", "linewidth": 3.2, "markersize": 9}),
    "SignGD": Method(sign_gd, 0.1, {"color": "#56b4e9", "marker": "^", "linewidth": 1.1, "markersize": 6}),
    "Adam": Method(adam, 0.1, {"color": "#cc7a00", "marker": "D", "linewidth": 1.3, "markersize": 3.5}),
    "GD": Method(gd, 0.025, {"color": "#00568f", "marker": "s", "linewidth": 1.3, "markersize": 3.5}),
    "Newton": Method(newton, 1.0, {"color": "#222222", "marker": "X", "linewidth": 1.8, "linestyle": "--"}),
}


def trajectory(name: str, lr: float, start: Sequence[float], steps: int) -> Tensor:
    """Return the points (n, 2) of a method: `start`, then one a step, for as long as the loss is finite."""
    point = torch.tensor(start, dtype=torch.float64)
    step = METHODS[name].begin(point, lr)
    points = [point.clone()]
    for _ in range(steps):
        step()
        if not loss(point).isfinite():
            break
        points.append(point.clone())
    return torch.stack(points)


def draw(paths: Mapping[str, Tensor]) -> Figure:
    """Draw trajectories from one start over the contours of the loss."""
    x0, y0 = next(iter(paths.values()))[0].tolist()
    figure = Figure(figsize=(6.0, 5.6), dpi=200, layout="constrained")
    axes = figure.add_subplot(xlabel=r"$\theta_1$ (sharp)", ylabel=r"$\theta_2$ (flat)")
    axes.set_xlim(min(-0.25, x0 - 0.2), max(1.4, x0 + 0.2))
    axes.set_ylim(min(-0.25, y0 - 0.5), max(4.75, y0 + 0.5))
    _draw_loss(axes)
    for name, points in paths.items():
        x, y = points.clamp(-1e3, 1e3).unbind(-1)  # the renderer overflows at what diverges
        axes.plot(x, y, label=name, markeredgecolor="white", markeredgewidth=0.5, **METHODS[name].style)
    for place, text, marker, size, offset in (
        ((x0, y0), "start", "o", 9, (0, -17)),
        (MINIMUM, "minimum", "*", 17, (22, 13)),
        (SADDLE, "saddle point", "P", 10, (0, 13)),
    ):
        axes.plot(*place, marker, markersize=size, color="white", markeredgecolor="black", zorder=4)
        axes.annotate(text, place, offset, textcoords="offset points", ha="center", zorder=5, bbox=BEHIND)
    figure.legend(loc="outside upper center", ncols=len(paths), frameon=False, columnspacing=1.4)
    return figure


def _draw_loss(axes: Axes) -> None:
    x, y = (
        torch.linspace(*limits, 400, dtype=torch.float64) for limits in (axes.get_xlim(), axes.get_ylim())
    )
    heights = loss(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1))
    highest = math.ceil(2 * math.log2(heights.max()))
    levels = [2 ** (power / 2) for power in range(-8, highest + 1)]  # 8, the saddle point's, is among them
    tints = LinearSegmentedColormap.from_list("tints", ["#ffffff", "#d3dae2"])
    axes.contourf(x, y, heights, levels, cmap=tints, norm=LogNorm(levels[0], levels[-1]), extend="min")
    axes.contour(x, y, heights, levels, colors="#a4afbb", linewidths=0.5)


def summary(paths: Mapping[str, Tensor], rates: Mapping[str, float]) -> Table:
    """Lay out where each method ended in at most 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "lr", "end", "loss", f"steps to loss < {NEAR:g}"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, points in paths.items():
        losses = loss(points).tolist()
        near = next((str(step) for step, value in enumerate(losses) if value < NEAR), "-")
        table.add_row(name, f"{rates[name]:g}", _pair(points[-1].tolist()), f"{losses[-1]:.2g}", near)
    return table


def _pair(point: Sequence[float]) -> str:
    x, y = (round(value, 4) + 0.0 for value in point)  # + 0.0 makes 0 of -0
    return f"({x:.4g}, {y:.4g})"


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    rates = {name: method.lr for name, method in METHODS.items()}
    defaults = " ".join(f"{name}={lr}" for name, lr in rates.items())
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default="paper_2d.png", metavar="FILE", help="png, svg or pdf (%(default)s)")
    add("--start", type=coordinate, nargs=2, default=START, metavar=("X", "Y"), help="%(default)s")
    add("--steps", type=whole_number, default=50, metavar="N", help="(%(default)s)")
    add("--lr", type=rate, action="append", default=[], metavar="METHOD=VALUE", help=f"({defaults})")
    options = parser.parse_args(arguments)
    _check(options.out)
    rates.update(options.lr)
    paths = {name: trajectory(name, lr, options.start, options.steps) for name, lr in rates.items()}
    picture = io.BytesIO()
    draw(paths).savefig(picture, format=options.out.suffix[1:].lower())
    durable.write_bytes(options.out, picture.getvalue())
    Console(highlight=False, width=80).print(summary(paths, rates))
    console = Console(highlight=False, soft_wrap=True)
    for name, points in paths.items():
        if len(points) <= options.steps:
            console.print(f"{name} diverged: its loss is not finite after step {len(points) - 1}")
    console.print(f"{options.out}: {options.steps} steps from {_pair(options.start)}", markup=False)


def _check(out: Path) -> None:
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"--out {out} is none of {', '.join(SUFFIXES)}; use --out {out.stem or 'paper_2d'}.png"
        )
    if out.is_dir():
        raise OutputError(f"--out {out} is a folder; name a file in it")
    if not out.parent.is_dir():
        raise OutputError(f"--out {out}: there is no folder {out.parent}; make it, or name another")


def coordinate(text: str) -> float:
    """Read a coordinate of the start."""
    value = float(text)
    if not abs(value) <= FARTHEST:
        raise argparse.ArgumentTypeError(f"{text} is not a number from {-FARTHEST:g} to {FARTHEST:g}")
    return value


def rate(text: str) -> tuple[str, float]:
    """Read METHOD=VALUE, the method in upper or lower case."""
    key, _, value = text.partition("=")
    name = next((name for name in METHODS if name.lower() == key.lower()), None)
    if name is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not METHOD=VALUE, METHOD one of {', '.join(METHODS)}")
    if not 0 < float(value) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} gives no number above 0, as {name}=0.1 does")
    return name, float(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
