"""The one gradient path: training and Hessian estimation both accumulate their gradients here."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sophia_train.seeds import derive

LossFunction = Callable[..., Tensor]


class MicroBatch(NamedTuple):
    """What one forward and backward pass of one process sees."""

    inputs: Tensor  # (b, T) int64 word ids
    targets: Tensor  # whatever the loss takes, one row a sequence


def micro_batches(inputs: Tensor, targets: Tensor, size: int) -> list[MicroBatch]:
    """Split the sequences of one process into micro-batches of `size`; the last one may be smaller."""
    return [MicroBatch(*rows) for rows in zip(inputs.split(size), targets.split(size), strict=True)]


def accumulate_gradients(
    model: nn.Module,
    batches: Sequence[MicroBatch],
    loss_fn: LossFunction,
    *,
    tokens: int | Tensor,
    no_sync: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    sync: bool = True,
    dropout_seed: int | None = None,
) -> Tensor:
    """Add the gradient of the mean loss over the micro-batches to `.grad`.

    Under data parallelism the wrapped model averages gradients over processes, in the backward pass of the
    last micro-batch only; with the same `tokens` on each process that is the mean over all their tokens.

    Args:
        model: called as `model(inputs, targets, loss_fn=loss_fn)`; returns the loss summed over tokens.
        batches: this process's micro-batches, of any sizes.
        loss_fn: see `models.losses`.
        tokens: number of target tokens in `batches`, all together: the mean is over these. Where processes
            have different numbers of them, their average.
        no_sync: context in which a backward pass leaves other processes alone.
        sync: whether the last backward pass averages over processes; False keeps gradients local.
        dropout_seed: reseeds dropout for each micro-batch as a pure function of this number and its index.

    Returns:
        This process's mean loss, a detached scalar on the device; nothing is read back.
    """
    total = None
    for index, batch in enumerate(batches):
        if dropout_seed is not None:
            torch.manual_seed(derive(dropout_seed, "micro-batch", index))
        with contextlib.nullcontext() if sync and index == len(batches) - 1 else no_sync():
            loss = model(batch.inputs, batch.targets, loss_fn=loss_fn) / tokens
            loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        raise ValueError("no micro-batches to accumulate gradients over")
    return total


def count_targets(targets: Tensor) -> Tensor:
    """Count the targets that carry weight in a loss, as a scalar on their device: -1 marks the others."""
    return (targets >= 0).sum()


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for the body, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
