"""Tensors that FSDP2 has sharded over processes: the part that is here, and what is true of all parts.

A `DTensor` stands for a whole tensor of which each process keeps some rows. Rules that go coordinate by
coordinate work on the parts, without torch's dispatch through the whole; sums and counts are made here.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process keeps, in the same memory: all of it, if not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts of tensors that this process keeps, as `local`."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors has parts on other processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def rows_of(tensor: Tensor) -> slice:
    """Which rows of the whole tensor this process keeps."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    part, parts = place_of([tensor])
    return chunk(len(tensor), part, parts)


def place_of(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Return which part of sharded tensors this process keeps, and of how many; (0, 1) if not sharded."""
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            for dim, placement in enumerate(tensor.placements):
                if placement.is_shard():
                    return tensor.device_mesh.get_local_rank(dim), tensor.device_mesh.size(dim)
    return 0, 1


def in_first_copy(tensors: Iterable[Tensor]) -> bool:
    """Whether this process belongs to the first of the copies that replicas have of sharded tensors."""
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            mesh, dims = tensor.device_mesh, enumerate(tensor.placements)
            return not any(mesh.get_local_rank(dim) for dim, each in dims if not each.is_shard())
    return True


def chunk(rows: int, part: int, parts: int) -> slice:
    """Return the rows of one of `parts` parts, as `torch.chunk` and FSDP2 cut them: the last are smaller."""
    size = -(-rows // parts)
    return slice(min(part * size, rows), min((part + 1) * size, rows))


def sharded_like(tensor: DTensor, part: Tensor) -> DTensor:
    """Make the whole tensor of which this process keeps `part`, shaped and sharded as another is."""
    part = part.to(local(tensor).device)
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, over all their parts: a scalar on the device."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def sum_over_shards(value: Tensor, like: Sequence[Tensor]) -> Tensor:
    """Sum what each process found in its parts of `like`; where these are not sharded, the value itself."""
    return _reduce(value, like, ReduceOp.SUM)


def true_for_all_shards(flag: Tensor, like: Sequence[Tensor]) -> Tensor:
    """Whether what each process found of its parts of `like` is true everywhere, a boolean scalar."""
    return _reduce(flag.to(torch.int32), like, ReduceOp.MIN).bool()


def gather_shards(values: Tensor, like: Sequence[Tensor]) -> Tensor:
    """Put together the values, of any number, that each process took from its parts of `like`."""
    for group in _groups(like):
        longest = torch.tensor(len(values), device=values.device)
        torch.distributed.all_reduce(longest, ReduceOp.MAX, group)
        padded = values.new_full((int(longest),), torch.nan)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, padded, group)
        values = torch.cat(parts)
        values = values[~values.isnan()]
    return values


def _reduce(value: Tensor, like: Sequence[Tensor], operation: Any) -> Tensor:
    for group in _groups(like):
        value = value.clone()
        torch.distributed.all_reduce(value, operation, group)
    return value


def _groups(tensors: Sequence[Tensor]) -> list[Any]:
    """The groups of processes that have different parts of the tensors: one, or none."""
    sharded = next((tensor for tensor in tensors if isinstance(tensor, DTensor)), None)
    if sharded is None:
        return []
    placements = enumerate(sharded.placements)
    return [sharded.device_mesh.get_group(dim) for dim, placement in placements if placement.is_shard()]
