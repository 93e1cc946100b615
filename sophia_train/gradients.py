"""The one gradient path: training and Hessian estimation both accumulate their gradients here."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sophia_train.collectives import world_size
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
    strict: bool = False,
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
        strict: add in an order that does not depend on the number of processes; see `_fixed_order`.
        dropout_seed: reseeds dropout for each micro-batch as a pure function of this number and its index.

    Returns:
        This process's mean loss, a detached scalar on the device; nothing is read back.
    """
    if strict:
        return _fixed_order(model, batches, loss_fn, tokens, no_sync, sync)
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


def _fixed_order(
    model: nn.Module,
    sequences: Sequence[MicroBatch],
    loss_fn: LossFunction,
    tokens: int | Tensor,
    no_sync: Callable[[], AbstractContextManager[None]],
    sync: bool,
) -> Tensor:
    """Leave the same bits in `.grad` for any number of processes that is a power of 2.

    Sequence i is on process i mod W. Gradients of single sequences are the leaves of a tree that is cut
    through at the level of processes: the sum over all i = c (mod 2^l) is that over i = c (mod 2^(l+1)) plus
    that over i = c + 2^l, as far as the number of sequences can be halved, and then goes along i. Divisions
    by W are exact.

    Args:
        model: as of `accumulate_gradients`, and so are the others.
        sequences: micro-batches of one sequence, as many on each process.
        loss_fn: see `models.losses`.
        tokens: the mean is over these, those of this process.
        no_sync: context in which a backward pass leaves other processes alone.
        sync: whether to average over processes.

    Returns:
        This process's mean loss.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts = world_size() if sync else 1
    losses: list[Tensor] = []

    def gradient_of(index: int) -> list[Tensor]:
        with no_sync():
            inputs, targets = sequences[index]
            loss = model(inputs, targets, loss_fn=loss_fn) / tokens
            loss.backward()
        losses.append(loss.detach())
        gradients = [cast(Tensor, p.grad) for p in parameters]
        for p in parameters:
            p.grad = None
        return gradients

    def sum_from(first: int, stride: int) -> list[Tensor]:
        if len(sequences) % (2 * stride) == 0:
            halves = sum_from(first, 2 * stride), sum_from(first + stride, 2 * stride)
            return list(torch._foreach_add(*halves))
        total = gradient_of(first)
        for index in range(first + stride, len(sequences), stride):
            torch._foreach_add_(total, gradient_of(index))
        return total

    for p, own in zip(parameters, sum_from(0, 1), strict=True):
        whole = own
        if parts > 1:
            sums = [torch.empty_like(own) for _ in range(parts)]
            torch.distributed.all_gather(sums, own.contiguous())
            while len(sums) > 1:
                half = len(sums) // 2
                sums = [low + high for low, high in zip(sums[:half], sums[half:], strict=True)]
            whole = sums[0] / parts
        p.grad = whole
    return torch.stack(losses).sum()


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
