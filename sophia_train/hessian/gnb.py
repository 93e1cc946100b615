"""The Gauss-Newton-Bartlett estimator (Sophia, Alg. 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_train.data.batches import Batch
from sophia_train.gradients import accumulate_gradients, evaluation_mode, micro_batches
from sophia_train.hessian.base import Estimates, Estimator, Replica
from sophia_train.models.labels import token_keys
from sophia_train.models.losses import sampled_cross_entropy
from sophia_train.optim.shards import locals_of, total_norm
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
        gradient_clip: bound of the norm of the gradient that is squared, as the official code has it (1.0);
            None, the paper, leaves it as it is: a clipped one is no longer an unbiased estimate of anything.
    """

    groups: int = 1
    gradient_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1:
            raise ValueError(f"groups={self.groups} must be at least 1")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip={self.gradient_clip} must be above 0, or null for no clip")

    @property
    def reduces_itself(self) -> bool:
        """Whether squares are reduced, and not one gradient; see `Estimator.reduces_itself`."""
        return self.groups > 1

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
        inputs, targets = batch.inputs, batch.targets
        labels = [derive(seed, "labels", sequence) for sequence in batch.sequences]
        keys = torch.tensor(labels, dtype=torch.int64).to(inputs.device, non_blocking=True)
        keys = token_keys(keys, targets.shape[1]).masked_fill(targets < 0, -1)  # as no target, no label
        tokens = replica.count_targets(batch)
        with evaluation_mode(replica.model):
            if self.groups == 1:
                # one square of the gradient over all processes
                return self._square(replica, inputs, keys, tokens, replica.world_size)
            return self._mean_over_groups(replica, inputs, keys, tokens)

    def _mean_over_groups(
        self, replica: Replica, inputs: Tensor, keys: Tensor, all_tokens: Tensor
    ) -> Estimates:
        # sequence i is on process i mod W, and W divides the groups, so that a group is all on one process
        total: Estimates = {}
        for group in range(self.groups // replica.world_size):
            rows = slice(group, None, self.groups // replica.world_size)
            tokens = (keys[rows] != -1).sum().clamp(min=1)
            squares = self._square(replica, inputs[rows], keys[rows], tokens, 1)
            torch._foreach_mul_(list(squares.values()), tokens / all_tokens)
            if total:
                torch._foreach_add_(list(total.values()), list(squares.values()))
            else:
                total = squares
        replica.sum_over_processes(list(total.values()))
        return total

    def _square(
        self, replica: Replica, inputs: Tensor, keys: Tensor, tokens: Tensor, processes: int
    ) -> Estimates:
        """B g*g for the gradient g of the mean loss over B `tokens`, made in the gradients' own memory.

        The tokens are those of one process, or of all.
        """
        accumulate_gradients(
            replica.model,
            micro_batches(inputs, keys, replica.micro_batch_size),
            sampled_cross_entropy,
            tokens=tokens / processes,
            no_sync=replica.no_sync,
            sync=processes > 1,
            strict=replica.strict,
        )
        estimates = replica.gradients()
        for parameter in estimates:
            parameter.grad = None
        gradients = locals_of(estimates.values())
        if self.gradient_clip is not None:
            norm = total_norm(estimates.values())
            torch._foreach_mul_(gradients, (self.gradient_clip / (norm + 1e-6)).clamp(max=1.0))
        torch._foreach_pow_(gradients, 2)
        torch._foreach_mul_(gradients, tokens)
        return estimates
