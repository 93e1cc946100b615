"""Optimizers whose weights to evaluate are not the weights that they train, as schedule-free ones."""

import contextlib
from collections.abc import Iterator

import torch
from torch.optim.optimizer import Optimizer

from sophia_train.optim.shards import locals_of


def has_evaluation_weights(optimizer: Optimizer) -> bool:
    """Whether the optimizer keeps weights to evaluate apart, and has `eval` and `train` to swap them."""
    return hasattr(optimizer, "eval") and hasattr(optimizer, "train")


@contextlib.contextmanager
@torch.no_grad()
def evaluation_weights(optimizer: Optimizer) -> Iterator[None]:
    """Put the weights to evaluate into the parameters for the body, for optimizers that have others.

    Afterwards the parameters are bitwise what they were: `train` alone would bring them back up to rounding,
    so that a run that evaluates would not be one that does not.
    """
    if not has_evaluation_weights(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.clone() for p in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        torch._foreach_copy_(locals_of(parameters), locals_of(trained))
