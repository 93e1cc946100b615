"""What becomes of Sophia's gamma, the scale of h in the denominator, over a run.

A rule is a pure function of the step and of the optimizer's state, in which gamma itself is: checkpoints
hold it, and a resume needs nothing else.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch.optim.optimizer import Optimizer


class GammaRule(ABC):
    """Sets gamma ahead of each step, for all groups of an optimizer that have one."""

    @abstractmethod
    def adjust(self, optimizer: Optimizer, step: int, total_steps: int) -> None:
        """Set gamma for the step that follows `step` completed ones, of `total_steps` in all."""


@dataclass(frozen=True, kw_only=True)
class FixedGamma(GammaRule):
    """Leaves gamma as it is (the paper)."""

    def adjust(self, optimizer: Optimizer, step: int, total_steps: int) -> None:
        """Do nothing."""


@dataclass(frozen=True, kw_only=True)
class DecayingGamma(GammaRule):
    """Constant, then half a cosine down to 0: towards pure sign momentum.

    From the authors' 1.5B run (levanter, commit e183ec80); not in the paper.

    Attributes:
        start_fraction: of the run, up to which gamma stays.

    Raises:
        ValueError: it is not in [0, 1).
    """

    start_fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.start_fraction < 1:
            raise ValueError(f"start_fraction={self.start_fraction} must be at least 0 and below 1")

    def adjust(self, optimizer: Optimizer, step: int, total_steps: int) -> None:  # noqa: D102
        start = self.start_fraction * total_steps
        progress = min(max(0.0, (step - start) / max(1.0, total_steps - start)), 1.0)
        for group in gamma_groups(optimizer):
            initial = group.setdefault("initial_gamma", group["gamma"])
            group["gamma"] = initial * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, kw_only=True)
class AutoGamma(GammaRule):
    """Holds the unclipped fraction inside a band: the official README's "0.1 to 0.5", kept by a machine.

    Every `interval` steps, gamma of all groups is multiplied by `factor` if fewer coordinates than `low` are
    unclipped, and divided by it if more than `high` are. Inside the band it does not change by a bit.

    Attributes:
        low: least unclipped fraction.
        high: largest unclipped fraction.
        interval: steps between two looks; each waits for the device.
        factor: of one correction. It stays out of oscillation where the band is wider than it, because the
            fraction grows no faster than gamma.
        freeze_after: completed steps after which gamma stays; None: never.

    Raises:
        ValueError: a setting is out of range.
    """

    low: float = 0.1
    high: float = 0.5
    interval: int = 10
    factor: float = 2.0
    freeze_after: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low={self.low} must be below high={self.high}, both between 0 and 1")
        if self.interval < 1:
            raise ValueError(f"interval={self.interval} must be at least 1")
        if not 1 < self.factor < math.inf:
            raise ValueError(f"factor={self.factor} must be above 1")
        if self.low > 0 and self.factor > self.high / self.low:
            raise ValueError(
                f"factor={self.factor} must be at most high / low = {self.high / self.low:g}, "
                "or gamma would jump over the band and back"
            )
        if self.freeze_after is not None and self.freeze_after < 0:
            raise ValueError(f"freeze_after={self.freeze_after} must be at least 0")

    def adjust(self, optimizer: Optimizer, step: int, total_steps: int) -> None:  # noqa: D102
        frozen = self.freeze_after is not None and step >= self.freeze_after
        if frozen or step == 0 or step % self.interval or not hasattr(optimizer, "unclipped_fraction"):
            return
        fraction = optimizer.unclipped_fraction().item()
        for group in gamma_groups(optimizer):
            if fraction < self.low:
                group["gamma"] *= self.factor
            elif fraction > self.high:
                group["gamma"] /= self.factor


def gamma_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups of an optimizer that have a gamma and a clip; MARS calls something else a gamma."""
    return [group for group in optimizer.param_groups if "gamma" in group and "clip_threshold" in group]
