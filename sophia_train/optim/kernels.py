"""Where the fused kernels are: on CUDA, which brings Triton along."""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def triton_kernels() -> ModuleType:
    """Return `triton_sophia`, which nothing imports where there is no CUDA: Triton may not be installed."""
    return importlib.import_module("sophia_train.optim.triton_sophia")


def fusable(*columns: Sequence[Tensor]) -> bool:
    """Whether fused kernels can take tensors; the i-th of every column belong to the same parameter.

    They must be float32, contiguous, of one size for a parameter, and all on one CUDA device.
    """
    first = columns[0][0]
    if not first.is_cuda:
        return False
    device, ordinary = first.get_device(), (Tensor, torch.nn.Parameter)  # no DTensor: it has parts elsewhere
    return all(
        type(each) in ordinary
        and each.dtype is torch.float32
        and each.is_contiguous()
        and each.get_device() == device
        and each.numel() == like.numel()
        for column in columns
        for each, like in zip(column, columns[0], strict=True)
    )
