"""What an estimator is, and the one owner of when and on what it runs."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sophia_train.data.batches import Batch
from sophia_train.gradients import count_targets
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
        sharded: whether each process keeps a part of every parameter only (FSDP2).
        strict: whether gradients are to be the same bits for any number of processes.
        no_sync: context in which a backward pass leaves other processes alone.
        autocast: the mixed precision of the model's forward pass. Accelerate opens it inside that pass only,
            and what differentiates a backward pass needs it there, too.
        sum_over_processes: sums tensors over all processes, in place.
    """

    model: nn.Module
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    sharded: bool = False
    strict: bool = False
    no_sync: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    autocast: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    sum_over_processes: Callable[[list[Tensor]], None] = _leave

    @property
    def unwrapped(self) -> nn.Module:
        """The model itself, whose backward pass leaves other processes alone."""
        module = getattr(self.model, "module", self.model)
        assert isinstance(module, nn.Module)
        return module

    def gradients(self) -> Estimates:
        """The `.grad` of every parameter that has one."""
        return {p: p.grad for p in self.model.parameters() if p.grad is not None}

    def count_targets(self, batch: Batch) -> Tensor:
        """Target tokens of a batch over all processes, a scalar on the device: the B of the estimates."""
        tokens = count_targets(batch.targets)
        self.sum_over_processes([tokens])
        return tokens


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """An estimator of the Hessian's diagonal: micro-batches in, one noisy diagonal out.

    Attributes:
        interval: refresh every so many steps, the first step included (k of Alg. 3).
        batch_size: the first so many sequences of the step's batch, over all processes; None takes all.
        refresh_at_start: whether the first step is preceded by a refresh (the paper). Without it h is 0 for
            the first `interval` steps, which is what comes of refreshing *after* the last step of each
            interval, as the official code does: the same weights, one step later by name.
        reads_training_gradient: whether `.grad` already is what the estimate is made of, so that no pass of
            its own is needed.
        passes: cost per token, in forward-backward passes.

    Raises:
        ValueError: a setting is out of range.
    """

    interval: int = 10
    batch_size: int | None = None
    refresh_at_start: bool = True

    reads_training_gradient: ClassVar[bool] = False
    passes: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval={self.interval} must be at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")

    def due(self, step: int) -> bool:
        """Whether h is refreshed before the update that follows `step` completed ones (Alg. 3, line 7)."""
        return step % self.interval == 0 and (step > 0 or self.refresh_at_start)

    @property
    def reduces_itself(self) -> bool:
        """Whether it makes something else of each process's sequences than a gradient, and reduces that.

        FSDP2, which leaves no process a whole gradient, and strict sums do not allow it.
        """
        return False

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
class TrainingGradientEstimator(Estimator):
    """An estimator made of the training gradient: accumulated, reduced over processes, and not clipped.

    It costs no pass of its own, and its sub-batch is the whole batch.
    """

    batch_size: int | None = field(default=None, init=False)  # not a setting here

    reads_training_gradient: ClassVar[bool] = True
    passes: ClassVar[float] = 0.0

    def estimate(self, replica: Replica, batch: Batch, seed: int) -> Estimates:
        """Estimate from `.grad`, which stays as it is; see `Estimator.estimate`."""
        gradients = replica.gradients()
        tokens = replica.count_targets(batch)
        estimates = self.from_gradients(list(gradients.values()), tokens)
        return dict(zip(gradients, estimates, strict=True))

    @abstractmethod
    def from_gradients(self, gradients: list[Tensor], tokens: int | Tensor) -> list[Tensor]:
        """Make the estimates, new tensors, out of gradients of the mean loss over `tokens` target tokens."""


@dataclass(frozen=True, kw_only=True)
class NoHessian(Estimator):
    """For optimizers that take no Hessian, and for a Sophia that is to stay with h = 0 (clipping only)."""

    interval: int = field(default=1, init=False)  # not settings here
    batch_size: int | None = field(default=None, init=False)
    refresh_at_start: bool = field(default=False, init=False)

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
        if estimator.reduces_itself and (replica.sharded or replica.strict):
            raise ValueError(
                f"{type(estimator).__name__} cannot be had from sharded gradients or strict sums"
            )
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
        # tensors on the device as soon as something is counted, so that counting reads nothing back
        self._rejected: int | Tensor = 0
        self._refreshed: int | Tensor = -1

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
    def interval(self) -> int | None:
        """Steps between two refreshes, None where there are none."""
        return None if isinstance(self.estimator, NoHessian) else self.estimator.interval

    def metrics(self, step: int) -> dict[str, float]:
        """What is known of the refreshes after `step` completed steps; waits for the device.

        Returns:
            `optim/hessian_rejected`, estimates dropped so far, and once there is an h, `hessian/age`, the
            steps that were made with it. Nothing for a run without a Hessian.
        """
        if self.interval is None:
            return {}
        age = {"hessian/age": step - self.refreshed} if self.refreshed >= 0 else {}
        return {"optim/hessian_rejected": self.rejected, **age}

    @property
    def rejected(self) -> int:
        """How many estimates were dropped because they were not finite; waits for the device."""
        return int(self._rejected)

    @property
    def refreshed(self) -> int:
        """Completed steps at the last refresh that was used, -1 before the first; waits for the device."""
        return int(self._refreshed)

    def state_dict(self) -> dict[str, int]:
        """State of the updater as JSON."""
        return {"rejected": self.rejected, "refreshed": self.refreshed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up a saved state."""
        self._rejected, self._refreshed = state["rejected"], state["refreshed"]

    def _refresh(self, batch: Batch, step: int) -> None:
        size = self.estimator.size(self.batch_size)
        mine = sum(sequence < size for sequence in batch.sequences)
        with self.timed():
            part = Batch(batch.inputs[:mine], batch.targets[:mine], batch.sequences[:mine])
            estimates = self.estimator.estimate(self.replica, part, derive(self.seed, "hessian", step))
            used = self.optimizer.update_hessian(estimates)
        self._rejected = self._rejected + ~used
        self._refreshed = torch.where(used, step, self._refreshed)
