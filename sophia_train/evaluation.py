"""Validation loss over fixed blocks, each token counted once, on any number of processes."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sophia_train.gradients import evaluation_mode
from sophia_train.models.losses import fused_cross_entropy


@torch.no_grad()
def evaluate(
    model: nn.Module,
    blocks: Iterable[tuple[Tensor, Tensor]],
    sum_over_processes: Callable[[list[Tensor]], None],
    device: torch.device,
) -> float:
    """Mean cross-entropy, in nats a token.

    Args:
        model: called as `model(inputs, targets, loss_fn=...)`.
        blocks: this process's (inputs, targets) micro-batches, as many of the same shape on each process;
            targets of -1 do not count, so that padded blocks weigh nothing.
        sum_over_processes: sums tensors over all processes, in place.
        device: where the model is.

    Returns:
        The loss over all processes' tokens, the same on each.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluation_mode(model):
        for inputs, targets in blocks:
            targets = targets.to(device, non_blocking=True)
            loss = model(inputs.to(device, non_blocking=True), targets, loss_fn=fused_cross_entropy)
            total += torch.stack([loss.double(), (targets >= 0).sum().double()])
    sum_over_processes([total])
    loss_sum, tokens = total.tolist()
    return loss_sum / tokens
