"""What optimizers that average estimates of the Hessian's diagonal have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sophia_train.optim.kernels import fusable, triton_kernels
from sophia_train.optim.shards import locals_of, true_for_all_shards


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
    """Whether no tensor has a NaN or an infinity in any of its parts, a boolean scalar on the device."""
    parts = locals_of(tensors)
    if fusable(parts):
        finite = triton_kernels().all_finite(parts)
    else:
        norms = torch._foreach_norm([part for part in parts if part.numel()], float("inf"))
        finite = torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()
    return true_for_all_shards(finite, tensors)


def move_averages(
    averages: Sequence[Tensor], estimates: Sequence[Tensor], weight: float, use: Tensor
) -> None:
    """Move averages by `weight` towards estimates if `use`, a boolean on the device, says so."""
    for average, estimate in zip(averages, estimates, strict=True):
        average.lerp_(torch.where(use, estimate, average), weight)
