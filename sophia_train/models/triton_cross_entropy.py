"""The cross-entropy of logits and its gradient as one kernel: `fused_cross_entropy._plain` on a GPU.

A program has one token. It goes along the row of its logits twice: for the sums of the exponentials, where a
lane has one class of words, by which labels are drawn; then to put the gradient in the place of each logit. A
row is small enough to be in the cache still.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sophia_train.models.labels import CLASSES

LANES, REPEATS = CLASSES, 2  # words side by side, and how often before anything is summed up
WARPS = 8
LOWEST = tl.constexpr(-1e30)  # below any logit


def cross_entropy_(logits: Tensor, marks: Tensor, words: int, sampled: bool, with_gradient: bool) -> Tensor:
    """Compute each token's loss, and put the gradient of their sum in the place of the logits.

    Args:
        logits: (n, padded V), rows contiguous.
        marks: (n,) int64 word ids, or keys to draw them with as `labels.sample_labels`; -1 for none.
        words: V; columns from there on are never predicted.
        sampled: whether the marks are keys.
        with_gradient: whether the gradient is wanted; otherwise the logits stay.

    Returns:
        (n,) float32, 0 for a token without a label.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _kernel[(len(logits),)](
        logits,
        marks,
        losses,
        logits.stride(0),
        WORDS=words,
        COLUMNS=logits.shape[1],
        SAMPLED=sampled,
        WITH_GRADIENT=with_gradient,
        MEMBERS=triton.next_power_of_2(triton.cdiv(words, LANES)),
        REPEATS=REPEATS,
        LANES=LANES,
        num_warps=WARPS,
    )
    return losses


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """`labels._mix32` on unsigned numbers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(numbers, low, high):  # type: ignore[no-untyped-def]
    """The noise of each number, from the halves of a token's key."""
    bits = _mix(_mix(numbers.to(tl.uint32) ^ low) ^ high) & 0x7FFFFFFF
    uniform = (bits.to(tl.float32) + 0.5) * (2.0**-31)
    # -log1p(-uniform): the quotient makes up for the rounding of `rest`, so that small noise is fine-grained
    rest = 1.0 - uniform
    exponential = tl.where(rest == 1.0, uniform, tl.log(rest) * uniform / (rest - 1.0))
    return -tl.log(exponential)


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    logits,
    marks,
    losses,
    stride,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SAMPLED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    MEMBERS: tl.constexpr,
    REPEATS: tl.constexpr,
    LANES: tl.constexpr,
):
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    mark = tl.load(marks + token)
    low, high = mark.to(tl.uint32), (mark >> 32).to(tl.uint32)
    label = mark.to(tl.int32)
    # Lanes of their own, so that the loop waits for no other. A lane takes REPEATS words at a time, and
    # shrinks its sum once for all of them. LOWEST is finite, so that its distance to itself is 0.
    largest, total = tl.full((LANES,), LOWEST, tl.float32), tl.zeros((LANES,), tl.float32)
    lanes = tl.arange(0, LANES)
    offsets = tl.arange(0, REPEATS)[:, None] * LANES + lanes[None, :]
    for start in range(0, WORDS, REPEATS * LANES):
        column = start + offsets
        logit = tl.load(row + column, mask=column < WORDS, other=LOWEST).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(logit, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(logit - largest[None, :]), axis=0)
    highest = tl.max(largest)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(largest - highest)))
    if SAMPLED:
        noisy = tl.where(lanes < WORDS, largest + tl.log(total) + _gumbel(~lanes, low, high), LOWEST)
        drawn = tl.argmax(noisy, axis=0)
        members = drawn + LANES * tl.arange(0, MEMBERS)
        logit = tl.load(row + members, mask=members < WORDS, other=LOWEST).to(tl.float32)
        noisy = tl.where(members < WORDS, logit + _gumbel(members, low, high), LOWEST)
        label = drawn + LANES * tl.argmax(noisy, axis=0)
    label = tl.minimum(tl.maximum(label, 0), WORDS - 1)  # where there is none, or no number to draw it by
    log_likelihood = tl.load(row + label).to(tl.float32) - log_sum
    if WITH_GRADIENT:
        tl.debug_barrier()  # the logit of the label has been read
        for start in range(0, COLUMNS, REPEATS * LANES):
            column = start + offsets
            logit = tl.load(row + column, mask=column < WORDS, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(logit - log_sum) - tl.where(column == label, 1.0, 0.0)
            gradient = tl.where(mark != -1, gradient, 0.0)
            tl.store(row + column, gradient.to(logits.dtype.element_ty), mask=column < COLUMNS)
    tl.store(losses + token, tl.where(mark != -1, -log_likelihood, 0.0))
