"""What optimizers that average estimates of the Hessian's diagonal have in common."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


def owned(optimizer: Optimizer, estimates: Mapping[Tensor, Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
    """List the optimizer's parameters that have an estimate, each with its group.

    Raises:
        ValueError: there are none.
    """
    used = [(p, group) for group in optimizer.param_groups for p in group["params"] if p in estimates]
    if not used:
        raise ValueError("none of the estimates is for a parameter of this optimizer")
    return used


def largest_magnitude(estimates: Mapping[Tensor, Tensor]) -> Tensor:
    """Largest absolute value of all estimates, a scalar on the device; NaN if one of them has a NaN."""
    norms = torch._foreach_norm(list(estimates.values()), float("inf"))
    return torch.stack([norm.to(norms[0].device) for norm in norms]).max()


def move_average(average: Tensor, estimate: Tensor | float, weight: float, use: Tensor) -> None:
    """Move an average by `weight` towards an estimate if `use`, a boolean on the device, says so."""
    average.lerp_(torch.where(use, estimate, average), weight)
