"""What optimizers that average estimates of the Hessian's diagonal have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sophia_train.optim.kernels import fusable, triton_kernels


def owned(
    optimizer: Optimizer, estimates: Mapping[Tensor, Tensor]
) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """List the optimizer's groups that have estimates, each with those of its parameters that do.

    Raises:
        ValueError: there are none.
    """
    groups = [(group, [p for p in group["params"] if p in estimates]) for group in optimizer.param_groups]
    used = [(group, params) for group, params in groups if params]
    if not used:
        raise ValueError("none of the estimates is for a parameter of this optimizer")
    return used


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether no tensor has a NaN or an infinity, a boolean scalar on the device."""
    if fusable(tensors):
        return triton_kernels().all_finite(tensors)
    norms = torch._foreach_norm(list(tensors), float("inf"))
    return torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()


def move_averages(
    averages: Sequence[Tensor], estimates: Sequence[Tensor], weight: float, use: Tensor
) -> None:
    """Move averages by `weight` towards estimates if `use`, a boolean on the device, says so."""
    for average, estimate in zip(averages, estimates, strict=True):
        average.lerp_(torch.where(use, estimate, average), weight)
