"""Labels that a model draws from its own prediction, without a random generator (Sophia, Alg. 2, line 3)."""

import torch
from torch import Tensor


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
