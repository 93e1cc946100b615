"""Learning-rate schedules: pure functions of the step, so that a resume needs nothing but the step."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A factor on the peak learning rate: linear warm-up, then what the schedule is named for.

    Raises:
        ValueError: a setting is out of range.
    """

    warmup_steps: int = 2000

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be at least 0")
        for name in ("final_lr_fraction", "decay_fraction"):
            value = getattr(self, name, 0.0)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be between 0 and 1")

    def __call__(self, step: int, total_steps: int) -> float:
        """Factor for the step that follows `step` completed ones, of `total_steps` in all."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.after_warmup(min(progress, 1.0))

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """Factor at `progress` in [0, 1] between the end of the warm-up and the end of the run."""


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from 1 down to `final_lr_fraction`."""

    final_lr_fraction: float = 0.05

    def after_warmup(self, progress: float) -> float:  # noqa: D102
        f = self.final_lr_fraction
        return f + (1 - f) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from 1 down to `final_lr_fraction`."""

    final_lr_fraction: float = 0.05

    def after_warmup(self, progress: float) -> float:  # noqa: D102
        return 1 - (1 - self.final_lr_fraction) * progress


@dataclass(frozen=True, kw_only=True)
class WSD(Schedule):
    """Warm-up, stable, decay: 1 until the last `decay_fraction` of the run, then a line down."""

    decay_fraction: float = 0.2
    final_lr_fraction: float = 0.0

    def after_warmup(self, progress: float) -> float:  # noqa: D102
        remaining = 1 - progress
        if remaining >= self.decay_fraction:
            return 1.0
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * remaining / self.decay_fraction


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """1 after the warm-up."""

    def after_warmup(self, progress: float) -> float:  # noqa: D102
        return 1.0
