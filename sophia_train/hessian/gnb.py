"""The Gauss-Newton-Bartlett estimator (Sophia, Alg. 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_train.data.batches import Batch
from sophia_train.gradients import accumulate_gradients, evaluation_mode, micro_batches
from sophia_train.hessian.base import Estimates, Estimator, Replica
from sophia_train.models.losses import sampled_cross_entropy
from sophia_train.seeds import derive


@dataclass(frozen=True, kw_only=True)
class GNB(Estimator):
    """Gauss-Newton diagonal from labels that the model draws itself: B g*g (Alg. 2, line 6).

    With labels sampled from the model, g the gradient of the mean loss over B tokens, E[B g*g] is the
    diagonal of the Gauss-Newton matrix: Bartlett's identity makes the cross terms between tokens vanish.
    That holds for the tokens of any part of the sub-batch, and with `groups` above 1 the squares of that
    many separate gradients are averaged: the same mean, a variance of about 2 / groups (plus a floor)
    instead of 2, for the same compute.

    B is counted, in target tokens: a hand-set B rescales gamma (see the official repository's issue #10).

    Attributes:
        groups: sequence i of the sub-batch is in group i mod `groups`; 1 is the paper's single square. The
            number of processes must divide it, if it is not 1.
    """

    groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1:
            raise ValueError(f"groups={self.groups} must be at least 1")

    def check(self, batch_size: int, world_size: int) -> None:
        """Check the sub-batch and the groups against a run."""
        super().check(batch_size, world_size)
        size = self.size(batch_size)
        if self.groups > size:
            raise ValueError(f"groups={self.groups} is more than the {size} sequences of the sub-batch")
        if self.groups > 1 and self.groups % world_size:
            raise ValueError(f"groups={self.groups} is not a multiple of the {world_size} processes")

    def estimate(self, replica: Replica, batch: Batch, seed: int) -> Estimates:
        """Estimate the Gauss-Newton diagonal of the mean loss; see `Estimator.estimate`."""
        inputs = batch.inputs
        labels = [derive(seed, "labels", sequence) for sequence in batch.sequences]
        keys = torch.tensor(labels, dtype=torch.int64).to(inputs.device, non_blocking=True)
        with evaluation_mode(replica.model):
            if self.groups == 1:
                # one square of the gradient over all processes
                return self._square(replica, inputs, keys, replica.world_size * inputs.numel(), sync=True)
            return self._mean_over_groups(replica, inputs, keys)

    def _mean_over_groups(self, replica: Replica, inputs: Tensor, keys: Tensor) -> Estimates:
        # sequence i is on process i mod W, and W divides the groups, so that a group is all on one process
        total: Estimates = {}
        for group in range(self.groups // replica.world_size):
            rows = slice(group, None, self.groups // replica.world_size)
            tokens = inputs[rows].numel()
            weight = tokens / (replica.world_size * inputs.numel())
            squares = self._square(replica, inputs[rows], keys[rows], tokens, sync=False)
            torch._foreach_mul_(list(squares.values()), weight)
            if total:
                torch._foreach_add_(list(total.values()), list(squares.values()))
            else:
                total = squares
        replica.sum_over_processes(list(total.values()))
        return total

    def _square(
        self, replica: Replica, inputs: Tensor, keys: Tensor, tokens: int, *, sync: bool
    ) -> Estimates:
        """B g*g for the gradient g of the mean loss over `tokens`, made in the gradients' own memory."""
        accumulate_gradients(
            replica.model,
            micro_batches(inputs, keys, replica.micro_batch_size),
            sampled_cross_entropy,
            tokens=inputs.numel(),
            no_sync=replica.no_sync,
            sync=sync,
        )
        estimates: Estimates = {}
        for parameter in replica.model.parameters():
            if parameter.grad is not None:
                estimates[parameter] = parameter.grad
                parameter.grad = None
        torch._foreach_pow_(list(estimates.values()), 2)
        torch._foreach_mul_(list(estimates.values()), tokens)
        return estimates
