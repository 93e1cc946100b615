"""Sophia's arithmetic in one pass over memory: each kernel is one launch for all tensors of a group.

`Sophia` itself has the same formulas in plain torch, on which these are tested. A step reads weight,
gradient, momentum and h, and writes weight and momentum: moving those 24 bytes a parameter is its time.

Tensors are as `kernels.fusable` says. Their addresses are handed over in a table, made anew for each call.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # coordinates of a program; more are slower
WARPS = 4
ALIGNMENT = 16  # bytes; addresses that are multiples of it are read four coordinates at a time

Tables = tuple[Tensor, Tensor, Tensor, Tensor]


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
    group: Mapping[str, Any],
) -> None:
    """Update parameters and their momenta in place, as `Sophia.step` says."""
    correction = group["bias_correction"]
    beta, clip = group["betas"][0], group["clip_threshold"]
    columns = [params, grads, [s["exp_avg"] for s in states], [s["hessian"] for s in states]]
    if correction == "both":
        columns.append([s["hessian_weight"] for s in states])
    momentum_weights = None
    if correction != "none":
        weights = torch.tensor([1 - beta ** float(s["step"]) for s in states])
        momentum_weights = weights.to(params[0].device, non_blocking=True)
    tables, aligned = _tables(columns)
    _step[_programs(tables)](
        *tables,
        momentum_weights,
        len(params),
        1.0 - beta,
        1.0 - group["lr"] * group["weight_decay"],
        -float(group["lr"]),
        float(group["gamma"]),
        float(group["eps"]),
        1.0 if clip is None else float(clip),
        HAS_CLIP=clip is not None,
        ADDS_EPS=group["eps_mode"] == "add",
        CORRECTS_MOMENTUM=correction != "none",
        CORRECTS_HESSIAN=correction == "both",
        ASCENDS=group["maximize"],
        ALIGNED=aligned,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether no tensor has a NaN or an infinity, a boolean scalar on the device."""
    tables, aligned = _tables([tensors])
    finite = torch.ones((), dtype=torch.int32, device=tensors[0].device)
    _find_not_finite[_programs(tables)](*tables, finite, ALIGNED=aligned, BLOCK=BLOCK, num_warps=WARPS)
    return finite.bool()


def move_averages(
    averages: Sequence[Tensor], estimates: Sequence[Tensor], weight: float, use: Tensor
) -> None:
    """Move averages by `weight` towards estimates if `use`, a boolean on the device, says so."""
    columns = [averages, estimates]
    tables, aligned = _tables(columns)
    _move_averages[_programs(tables)](
        *tables,
        use.to(torch.int32),
        len(averages),
        weight,
        ALIGNED=aligned,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def _tables(columns: Sequence[Sequence[Tensor]]) -> tuple[Tables, bool]:
    """Make what the kernels find their way by, and say whether all addresses are aligned.

    Returns:
        Addresses, (columns * tensors,) int64; for each program, the tensor that it works on; for each tensor,
        its first program; and its coordinates.
    """
    tensors = columns[0]
    device = tensors[0].device
    addresses = torch.tensor(
        [tensor.data_ptr() for column in columns for tensor in column],
        dtype=torch.int64,
        pin_memory=device.type == "cuda",  # or the copy would wait for what the device has to do
    )
    shapes = _shape_tables(tuple(tensor.numel() for tensor in tensors), device)
    on_device = addresses.to(device, non_blocking=True)
    return (on_device, *shapes), not (addresses % ALIGNMENT).any()


def _programs(tables: Tables) -> tuple[int]:
    return (len(tables[1]),)


@functools.lru_cache(maxsize=16)
def _shape_tables(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
    blocks = torch.repeat_interleave(torch.arange(len(sizes)), count)
    firsts = count.cumsum(0) - count
    return (
        blocks.to(device, torch.int32, non_blocking=True),
        firsts.to(device, torch.int32, non_blocking=True),
        torch.tensor(sizes).to(device, non_blocking=True),
    )


@triton.jit
def _place(blocks, firsts, sizes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Find a program's tensor, its coordinates in it, and which of them exist."""
    block = tl.program_id(0)
    tensor = tl.load(blocks + block)
    offsets = (block - tl.load(firsts + tensor)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tensor, offsets, offsets < tl.load(sizes + tensor)


@triton.jit
def _column(addresses, index, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    pointer = tl.load(addresses + index).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    addresses,
    blocks,
    firsts,
    sizes,
    momentum_weights,
    tensors,
    momentum_rate,
    kept,  # of the weight, after its decay
    minus_lr,
    gamma,
    eps,
    clip,
    HAS_CLIP: tl.constexpr,
    ADDS_EPS: tl.constexpr,
    CORRECTS_MOMENTUM: tl.constexpr,
    CORRECTS_HESSIAN: tl.constexpr,
    ASCENDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, offsets, exists = _place(blocks, firsts, sizes, BLOCK)
    params = _column(addresses, tensor, ALIGNED) + offsets
    grads = _column(addresses, tensors + tensor, ALIGNED) + offsets
    exp_avgs = _column(addresses, 2 * tensors + tensor, ALIGNED) + offsets
    hessians = _column(addresses, 3 * tensors + tensor, ALIGNED) + offsets
    param = tl.load(params, mask=exists)
    grad = tl.load(grads, mask=exists)
    momentum = tl.load(exp_avgs, mask=exists)
    hessian = tl.load(hessians, mask=exists)
    if ASCENDS:
        grad = -grad
    momentum = tl.fma(grad - momentum, momentum_rate, momentum)
    tl.store(exp_avgs, momentum, mask=exists)
    if CORRECTS_MOMENTUM:
        momentum = tl.div_rn(momentum, tl.load(momentum_weights + tensor))
    denominator = hessian * gamma
    if CORRECTS_HESSIAN:
        weight = tl.load(_column(addresses, 4 * tensors + tensor, False))
        denominator = tl.div_rn(denominator, tl.where(weight > 0, weight, 1.0))
    if ADDS_EPS:
        denominator += eps
    else:
        denominator = tl.maximum(denominator, eps, propagate_nan=tl.PropagateNan.ALL)
    update = tl.div_rn(momentum, denominator)
    if HAS_CLIP:
        update = tl.clamp(update, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    tl.store(params, tl.fma(update, minus_lr, param * kept), mask=exists)


@triton.jit
def _find_not_finite(  # type: ignore[no-untyped-def]
    addresses, blocks, firsts, sizes, finite, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    tensor, offsets, exists = _place(blocks, firsts, sizes, BLOCK)
    values = tl.load(_column(addresses, tensor, ALIGNED) + offsets, mask=exists, other=0.0)
    largest = tl.max(tl.where(tl.abs(values) < float("inf"), 0, 1))  # a NaN is not below anything
    tl.store(finite, 0, mask=largest > 0)


@triton.jit
def _move_averages(  # type: ignore[no-untyped-def]
    addresses, blocks, firsts, sizes, use, tensors, weight, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    if tl.load(use) > 0:
        tensor, offsets, exists = _place(blocks, firsts, sizes, BLOCK)
        averages = _column(addresses, tensor, ALIGNED) + offsets
        average = tl.load(averages, mask=exists)
        estimate = tl.load(_column(addresses, tensors + tensor, ALIGNED) + offsets, mask=exists)
        tl.store(averages, tl.fma(estimate - average, weight, average), mask=exists)
