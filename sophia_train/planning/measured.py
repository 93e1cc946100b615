"""Speeds that were measured, and the MFU that they give for a model of any size.

A point is one object of `measured_points.json`:

    gpu, gpus           what it was measured on, one node
    run                 overrides of the run: model, batch, parallel, optimizer
    tokens_per_second   of whole steps, over all GPUs
    torch, command, provenance    the version, what prints the figure again, and the rest
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from sophia_train.config import compose, run_config
from sophia_train.planning.cluster import Card, Cluster
from sophia_train.planning.planned_run import PlannedRun, planned_run
from sophia_train.planning.step_time import step_time

POINTS = Path(__file__).with_name("measured_points.json")


@dataclass(frozen=True)
class Point:
    """A measured speed; see the head of this file."""

    gpu: str
    gpus: int
    run: str
    tokens_per_second: float
    torch: str
    command: str
    provenance: str

    @cached_property
    def planned(self) -> PlannedRun:
        """The run that was measured."""
        config = run_config(compose(self.run.split()))
        return planned_run(config, Cluster.of(self.gpu, self.gpus))

    @property
    def name(self) -> str:
        """What it is of, in a few words."""
        config, work = self.planned.config, self.planned.work
        how = f"{self.gpus} {self.gpu}" + (f" {config.parallel}" if self.gpus > 1 else "")
        return f"{short(work.parameters)}, {how}, {work.micro_batches} x {work.micro_batch_size}"

    @property
    def mfu(self) -> float:
        """MFU of the passes, once the optimizer is taken off; for one GPU."""
        at_peak = step_time(self.planned, 1.0)
        seconds = self.planned.work.tokens / self.tokens_per_second - at_peak.optimizer
        return (at_peak.total - at_peak.optimizer) / seconds

    def predicted(self, mfu: float) -> float:
        """Tokens/s by the model, for an MFU of the passes."""
        return self.planned.work.tokens / step_time(self.planned, mfu).total


@cache
def load_points(path: Path = POINTS) -> tuple[Point, ...]:
    """Read measured points."""
    return tuple(Point(**point) for point in json.loads(path.read_text()))


def calibrating(points: Sequence[Point], card: Card) -> list[Point]:
    """The points that give the MFU on a card: those of one GPU, of that card if there are, else of all."""
    single = [point for point in points if point.gpus == 1]
    return [point for point in single if point.gpu == card.name] or single


def mfu_of(points: Sequence[Point], parameters: int) -> float:
    """MFU for a model of a size: linear in the logarithm of the parameters between `points`, constant beyond.

    Points of the same size count as their mean.
    """
    by_size: dict[int, list[float]] = {}
    for point in points:
        by_size.setdefault(point.planned.work.parameters, []).append(point.mfu)
    sizes = sorted(by_size)
    values = [float(np.mean(by_size[size])) for size in sizes]
    return float(np.interp(math.log(parameters), [math.log(size) for size in sizes], values))


def used_points(points: Sequence[Point], parameters: int) -> list[Point]:
    """Those of `points` that `mfu_of` takes its value from: of the next smaller and the next larger size."""
    sizes = {point.planned.work.parameters for point in points}
    smaller = max((size for size in sizes if size <= parameters), default=None)
    larger = min((size for size in sizes if size >= parameters), default=None)
    return [point for point in points if point.planned.work.parameters in (smaller, larger)]


def errors(points: Sequence[Point]) -> list[tuple[float, float | None]]:
    """How far the model is from each point: predicted tokens/s over measured, less 1.

    Returns:
        For each point the error with it among those that give the MFU, and that without it; None where no
        other does.
    """
    found = []
    for point in points:
        parameters, card = point.planned.work.parameters, point.planned.cluster.card
        others = calibrating([each for each in points if each is not point], card)
        left_out = _error(point, mfu_of(others, parameters)) if others else None
        found.append((_error(point, mfu_of(calibrating(points, card), parameters)), left_out))
    return found


def short(number: int) -> str:
    """A number of parameters or tokens as people say it: 124M, 1.56B."""
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"


def _error(point: Point, mfu: float) -> float:
    return point.predicted(mfu) / point.tokens_per_second - 1
