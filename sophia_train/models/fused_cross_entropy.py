"""The head and the cross-entropy in one go, with their gradient: logits come and go a chunk at a time.

d loss / d logits = softmax(logits) - onehot(label) needs nothing that comes after the loss but a factor. So
it is made while the logits are there, in their place; the gradients of hidden states and weight follow, and
the chunk's memory is free for the next. A plain loss keeps the logits, or makes them again on the way back.
"""

from typing import Any

import torch
from torch import Tensor

from sophia_train.models.labels import sample_labels


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, marks: Tensor, words: int, chunk_tokens: int, sampled: bool
) -> Tensor:
    """Sum the cross-entropy of the logits `hidden weight^T`.

    Arguments are those of the operator below. Under autocast the products are of its type; sums, as of the
    weight's gradient, are float32 or wider.

    Raises:
        RuntimeError: it is differentiated twice.
    """
    device = hidden.device.type
    narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor
    loss, _, _ = torch.ops.sophia_train.linear_cross_entropy(
        hidden.to(narrow), weight, marks, words, chunk_tokens, sampled, with_gradient
    )
    return loss


@torch.library.custom_op("sophia_train::linear_cross_entropy", mutates_args=())
def _operator(
    hidden: Tensor,
    weight: Tensor,
    marks: Tensor,
    words: int,
    chunk_tokens: int,
    sampled: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient by the hidden states, and its gradient by the weight; empty ones if not asked for.

    One operator, which a compiler does not look into: it would compute the logits of all chunks first.

    Args:
        hidden: (N, C), of the type that products are made in.
        weight: (padded V, C), of that type or a wider one.
        marks: (N,) int64 word ids, or keys to draw them with; -1 where there is none.
        words: V; rows of the weight from there on are never predicted.
        chunk_tokens: how many tokens have their logits in memory at a time.
        sampled: whether the marks are keys.
        with_gradient: whether the gradients are wanted.
    """
    of_hidden, of_weight = _empty_gradients(hidden, weight, with_gradient)
    of_weight.zero_()
    weight = weight.to(hidden.dtype)
    losses = []
    logits_and_gradient = _on_cuda if hidden.is_cuda else _plain
    memory = hidden.new_empty(min(chunk_tokens, len(hidden)), len(weight))
    for start in range(0, len(hidden), chunk_tokens):
        rows = hidden[start : start + chunk_tokens]
        logits = torch.mm(rows, weight.T, out=memory[: len(rows)])
        chunk_marks = marks[start : start + chunk_tokens]
        chunk_losses, of_logits = logits_and_gradient(logits, chunk_marks, words, sampled, with_gradient)
        losses.append(chunk_losses)
        if with_gradient:
            torch.mm(of_logits, weight, out=of_hidden[start : start + chunk_tokens])
            _add_product(of_weight, of_logits.T, rows)
    return torch.cat(losses).sum(), of_hidden, of_weight


def _empty_gradients(hidden: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not wanted:
        hidden, weight = hidden[:0], weight[:0]
    return torch.empty_like(hidden), torch.empty_like(weight, dtype=wide)


@_operator.register_fake
def _shapes(hidden: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_hidden, of_weight = _empty_gradients(hidden, weight, settings[-1])
    return of_weight.new_empty(()), of_hidden, of_weight


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.weight_dtype = inputs[1].dtype


def _scale_gradients(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # a second derivative would take what was made for constants
        raise RuntimeError("a fused loss cannot be differentiated twice; use cross_entropy")
    of_hidden, of_weight = ctx.saved_tensors
    scaled = (of_hidden * gradient.to(of_hidden.dtype), (of_weight * gradient).to(ctx.weight_dtype))
    return *scaled, *5 * (None,)


_operator.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two matrices to a total, summing in the total's type."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _on_cuda(
    logits: Tensor, marks: Tensor, words: int, sampled: bool, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    from sophia_train.models.triton_cross_entropy import cross_entropy_  # there is no Triton without CUDA

    return cross_entropy_(logits, marks, words, sampled, with_gradient), logits


def _plain(
    logits: Tensor, marks: Tensor, words: int, sampled: bool, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Compute each token's loss, and the gradient of their sum.

    Args:
        logits: (n, padded V).
        marks: (n,) as of the operator.
        words: V.
        sampled: whether the marks are keys.
        with_gradient: whether the gradient is wanted.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide[:, words:] = -torch.inf
    counts = marks != -1
    labels = (sample_labels(wide, marks) if sampled else marks).where(counts, 0)[:, None]
    log_sum = wide.logsumexp(dim=-1, keepdim=True)
    losses = (log_sum - wide.gather(1, labels))[:, 0].where(counts, 0.0)
    if with_gradient:
        wide.sub_(log_sum).exp_().scatter_add_(1, labels, torch.full_like(log_sum, -1.0))
        wide.masked_fill_(~counts[:, None], 0.0)
    return losses, wide.to(logits.dtype)
