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
    kind = (torch.float32, first.device)
    ordinary = {Tensor, torch.nn.Parameter}  # no DTensor: it has parts elsewhere
    sizes = [each.numel() for each in columns[0]]
    for column in columns:
        if [each.numel() for each in column] != sizes or not {type(each) for each in column} <= ordinary:
            return False
        if {(each.dtype, each.device) for each in column} != {kind}:
            return False
        if not all([each.is_contiguous() for each in column]):
            return False
    return True
