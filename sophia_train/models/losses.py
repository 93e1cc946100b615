"""Losses on the last hidden states, a chunk of tokens at a time: the full tokens x V matrix never exists.

A loss is called as `loss(hidden, head, targets)` and returns the **sum** over its target tokens, so that
micro-batches, groups and processes of any size add up to the same mean.

`fused_cross_entropy`, and `sampled_cross_entropy` on a `Head`, make the gradient while a chunk's logits are
there, in the forward pass: nothing is recomputed, and nothing is kept but the gradient itself. They refuse to
be differentiated twice. `cross_entropy` can be; where it has several chunks, it recomputes their logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sophia_train.models.fused_cross_entropy import linear_cross_entropy
from sophia_train.models.labels import sample_labels

CHUNK_TOKENS = 8192  # 8192 x 50,304 logits in float32 are 1.6 GB


@dataclass  # torch's compiler cannot call a frozen one
class Head:
    """The map from hidden states to logits.

    Attributes:
        weight: (padded V, C), the word embedding.
        words: V; the rows of `weight` from there on are never predicted.
    """

    weight: Tensor
    words: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., C) to logits (..., V)."""
        return F.linear(hidden, self.weight)[..., : self.words]


def fused_cross_entropy(
    hidden: Tensor, head: Head, targets: Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Sum of the cross-entropy, in nats, of the target tokens; for training.

    Args:
        hidden: (B, T, C) last hidden states.
        head: the map to logits.
        targets: (B, T) int64 word ids; -1 marks a token that does not count.
        chunk_tokens: how many tokens have their logits in memory at a time.

    Returns:
        A scalar, float32 or wider.

    Raises:
        RuntimeError: it is differentiated twice.
    """
    return _fused(hidden, head, targets, chunk_tokens, sampled=False)


def cross_entropy(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Sum of the cross-entropy, in nats, of the target tokens; differentiable any number of times.

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

    Raises:
        RuntimeError: it is differentiated twice, and the head is a `Head`.
    """
    if isinstance(head, Head):
        return _fused(hidden, head, keys, chunk_tokens, sampled=True)
    return _sum_over_chunks(_sampled_cross_entropy, hidden, head, (keys.flatten(),), chunk_tokens)


def _fused(hidden: Tensor, head: Head, marks: Tensor, chunk_tokens: int, sampled: bool) -> Tensor:
    return linear_cross_entropy(
        hidden.flatten(0, 1), head.weight, marks.flatten(), head.words, chunk_tokens, sampled
    )


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
