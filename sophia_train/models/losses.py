"""Losses on the last hidden states, a chunk of tokens at a time: the full tokens x V matrix never exists.

A loss is called as `loss(hidden, head, targets)` and returns the **sum** over its target tokens, so that
micro-batches, groups and processes of any size add up to the same mean. Where there is more than one chunk,
logits are recomputed in the backward pass instead of kept. Every loss can be differentiated twice.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 8192  # 8192 x 50,304 logits in float32 are 1.6 GB


def cross_entropy(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Sum of the cross-entropy, in nats, of the target tokens.

    Args:
        hidden: (B, T, C) last hidden states.
        head: maps (N, C) hidden states to (N, V) logits.
        targets: (B, T) int64 word ids; -1 marks a token that does not count.
        chunk_tokens: how many tokens have their logits in memory at a time.

    Returns:
        A scalar, float32 or wider.
    """
    return _sum_over_chunks(_cross_entropy, hidden, head, (targets.flatten(),), chunk_tokens)


def sampled_cross_entropy(
    hidden: Tensor, head: Callable[[Tensor], Tensor], keys: Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Sum of the cross-entropy of labels drawn from the model's own prediction (Sophia, Alg. 2, lines 3-4).

    The label of a token is a pure function of its logits and its key: the same for any micro-batch, chunk and
    number of processes.

    Args:
        hidden: (B, T, C) last hidden states.
        head: maps (N, C) hidden states to (N, V) logits.
        keys: (B, T) int64, one key a token (`token_keys`); -1 marks a token that does not count.
        chunk_tokens: how many tokens have their logits in memory at a time.

    Returns:
        A scalar, float32 or wider. No gradient flows through the draw.
    """
    return _sum_over_chunks(_sampled_cross_entropy, hidden, head, (keys.flatten(),), chunk_tokens)


def token_keys(keys: Tensor, length: int) -> Tensor:
    """Derive the keys (B, `length`) of the tokens of sequences from the sequences' keys (B,), all int64."""
    return _mix64(_mix64(keys)[:, None] + torch.arange(length, device=keys.device))


def sample_labels(logits: Tensor, keys: Tensor) -> Tensor:
    """Draw a word for every token with the Gumbel-max trick.

    The noise of a word is a hash of the token's key and the word's number, so that no generator has a state,
    and a change of the logits by rounding changes a label only where two words nearly tie.

    Args:
        logits: (N, V).
        keys: (N,) int64, one key a token.

    Returns:
        (N,) int64 word ids, distributed as softmax(logits).
    """
    words = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.int32)
    low = ((keys << 32) >> 32).to(torch.int32)[:, None]
    high = (keys >> 32).to(torch.int32)[:, None]
    bits = _mix32(_mix32(words ^ low) ^ high) & 0x7FFFFFFF
    uniform = (bits.float() + 0.5) * 2.0**-31  # fine-grained near 0, where the likely winners are
    exponential = -torch.log1p(-uniform)
    return (logits - exponential.log()).argmax(dim=-1)


def _cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(_wide(head(hidden)), targets, ignore_index=-1, reduction="sum")


def _sampled_cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], keys: Tensor) -> Tensor:
    logits = _wide(head(hidden))
    labels = sample_labels(logits.detach(), keys).where(keys != -1, -1)
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")


def _sum_over_chunks(
    chunk_loss: Callable[..., Tensor],
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    per_token: tuple[Tensor, ...],
    chunk_tokens: int,
) -> Tensor:
    hidden = hidden.flatten(0, 1)  # (N, C)
    if len(hidden) <= chunk_tokens:
        return chunk_loss(hidden, head, *per_token)
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    chunks = zip(*(tensor.split(chunk_tokens) for tensor in (hidden, *per_token)), strict=True)
    for hidden_chunk, *rest in chunks:
        total = total + checkpoint(
            chunk_loss, hidden_chunk, head, *rest, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mix32(x: Tensor) -> Tensor:
    """Hash int32 to int32, a bijection (C. Wellons' lowbias32); shifts are masked to be logical."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as a signed number
    return x ^ ((x >> 16) & 0xFFFF)


def _mix64(x: Tensor) -> Tensor:
    """Hash int64 to int64, a bijection (the finalizer of splitmix64); shifts are masked to be logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB as a signed number
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
