"""What an estimator is, and the one owner of when and on what it runs."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from sophia_train.data.batches import Batch
from sophia_train.seeds import derive

Estimates = dict[Tensor, Tensor]


def _leave(tensors: list[Tensor]) -> None:
    """Sum over the processes of a run that has one."""


@dataclass(frozen=True)
class Replica:
    """The model as one process of a run sees it.

    Attributes:
        model: the prepared model, whose backward pass averages over processes unless in `no_sync`.
        micro_batch_size: sequences of one forward and backward pass.
        rank: number of this process.
        world_size: number of processes.
        no_sync: context in which a backward pass leaves other processes alone.
        sum_over_processes: sums tensors over all processes, in place.
    """

    model: nn.Module
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    no_sync: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    sum_over_processes: Callable[[list[Tensor]], None] = _leave


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """An estimator of the Hessian's diagonal: micro-batches in, one noisy diagonal out.

    Attributes:
        interval: refresh every so many steps, the first step included (k of Alg. 3).
        batch_size: the first so many sequences of the step's batch, over all processes; None takes all.
        reads_training_gradient: whether `.grad` already is what the estimate is made of, so that no pass of
            its own is needed.
        passes: cost per token, in forward-backward passes.

    Raises:
        ValueError: a setting is out of range.
    """

    interval: int = 10
    batch_size: int | None = None

    reads_training_gradient: ClassVar[bool] = False
    passes: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval={self.interval} must be at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")

    def due(self, step: int) -> bool:
        """Whether h is refreshed before the update that follows `step` completed ones (Alg. 3, line 7)."""
        return step % self.interval == 0

    def check(self, batch_size: int, world_size: int) -> None:
        """Check the estimator against a run.

        Raises:
            ValueError: the sub-batch does not fit the batch, or does not split evenly over processes.
        """
        size = self.size(batch_size)
        if size > batch_size:
            raise ValueError(f"batch_size={size} is larger than the run's batch_size={batch_size}")
        if size % world_size:
            raise ValueError(f"batch_size={size} is not a multiple of the {world_size} processes")

    def size(self, batch_size: int) -> int:
        """Sequences of the sub-batch, over all processes, for a run's `batch_size`."""
        return batch_size if self.batch_size is None else self.batch_size

    @abstractmethod
    def estimate(self, replica: Replica, batch: Batch, seed: int) -> Estimates:
        """Estimate the diagonal, averaged over processes.

        Args:
            replica: the model on this process. Its `.grad` is the training gradient, accumulated, reduced and
                not clipped, if `reads_training_gradient`; otherwise it is None before and after.
            batch: this process's part of the sub-batch.
            seed: of this refresh; the estimate is a pure function of weights, sequences and seed.

        Returns:
            The estimate for each trained parameter, equal on all processes.
        """


@dataclass(frozen=True, kw_only=True)
class NoHessian(Estimator):
    """For optimizers that take no Hessian, and for a Sophia that is to stay with h = 0 (clipping only)."""

    interval: int = field(default=1, init=False)  # not settings here
    batch_size: int | None = field(default=None, init=False)

    passes: ClassVar[float] = 0.0

    def due(self, step: int) -> bool:
        """Never."""
        return False

    def estimate(self, replica: Replica, batch: Batch, seed: int) -> Estimates:
        """Estimate nothing."""
        return {}


class HessianUpdater:
    """Refreshes the optimizer's average of the Hessian's diagonal whenever the estimator is due.

    Args:
        estimator: what to estimate, how often, and on how much of the batch.
        optimizer: takes the estimates with `update_hessian`; under `NoHessian` any optimizer will do.
        replica: the model on this process.
        batch_size: sequences of the run's batch, over all processes.
        seed: the run's seed.
        timed: context that measures what runs inside it.

    Raises:
        ValueError: the optimizer takes no Hessian, or the sub-batch does not fit the run.
    """

    def __init__(
        self,
        estimator: Estimator,
        optimizer: Any,
        replica: Replica,
        *,
        batch_size: int,
        seed: int,
        timed: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        estimator.check(batch_size, replica.world_size)
        if not isinstance(estimator, NoHessian) and not hasattr(optimizer, "update_hessian"):
            raise ValueError(
                f"{type(estimator).__name__} estimates a Hessian, but {type(optimizer).__name__} takes none"
            )
        self.estimator = estimator
        self.optimizer = optimizer
        self.replica = replica
        self.seed = seed
        self.timed = timed
        self.batch_size = batch_size
        self._rejected: int | Tensor = 0  # a tensor on the device, so that counting reads nothing back

    def before(self, batch: Batch, step: int) -> None:
        """Refresh h ahead of the training gradient, if the estimator makes a pass of its own."""
        if self.estimator.due(step) and not self.estimator.reads_training_gradient:
            self._refresh(batch, step)

    def after_accumulation(self, batch: Batch, step: int) -> None:
        """Refresh h from the training gradient: accumulated, reduced, and not yet clipped."""
        if self.estimator.due(step) and self.estimator.reads_training_gradient:
            self._refresh(batch, step)

    def pass_sequences(self, step: int) -> float:
        """What the refresh at `step` costs, in sequences sent forward and backward, over all processes."""
        return self.estimator.passes * self.estimator.size(self.batch_size) * self.estimator.due(step)

    @property
    def rejected(self) -> int:
        """How many estimates were dropped because they were not finite; waits for the device."""
        return int(self._rejected)

    def state_dict(self) -> dict[str, int]:
        """State of the updater as JSON."""
        return {"rejected": self.rejected}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up a saved state."""
        self._rejected = state["rejected"]

    def _refresh(self, batch: Batch, step: int) -> None:
        size = self.estimator.size(self.batch_size)
        mine = sum(sequence < size for sequence in batch.sequences)
        with self.timed():
            part = Batch(batch.inputs[:mine], batch.targets[:mine], batch.sequences[:mine])
            estimates = self.estimator.estimate(self.replica, part, derive(self.seed, "hessian", step))
            used = self.optimizer.update_hessian(estimates)
        self._rejected = self._rejected + ~used
