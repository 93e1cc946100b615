"""Labels that a model draws from its own prediction, without a random generator (Sophia, Alg. 2, line 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 2048
"""How many classes of words there are: a word's is its number modulo this."""


def token_keys(keys: Tensor, length: int) -> Tensor:
    """Derive the keys (B, `length`) of the tokens of sequences from the sequences' keys (B,), all int64."""
    return _mix64(_mix64(keys)[:, None] + torch.arange(length, device=keys.device))


def sample_labels(logits: Tensor, keys: Tensor) -> Tensor:
    """Draw a word for every token with the Gumbel-max trick: first its class, then the word of that class.

    The noise of a class or word is a hash of the token's key and its number, so that no generator has a
    state, and a change of the logits by rounding changes a label only where two of them nearly tie. In two
    stages, a token needs the noise of some 2,000 classes and some words, and not of all words.

    Args:
        logits: (N, V).
        keys: (N,) int64, one key a token.

    Returns:
        (N,) int64 word ids, distributed as softmax(logits).
    """
    count = min(CLASSES, logits.shape[-1])
    size = -(-logits.shape[-1] // count)
    padded = F.pad(logits, (0, size * count - logits.shape[-1]), value=-torch.inf).unflatten(
        -1, (size, count)
    )
    classes = torch.arange(count, device=logits.device)
    chosen = (padded.logsumexp(1) + _gumbel(~classes, keys)).argmax(
        -1, keepdim=True
    )  # words are not negative
    words = chosen + count * torch.arange(size, device=logits.device)
    of_words = padded.gather(2, chosen[:, None].expand(-1, size, 1))[..., 0]
    return words.gather(1, (of_words + _gumbel(words, keys)).argmax(-1, keepdim=True))[:, 0]


def _gumbel(numbers: Tensor, keys: Tensor) -> Tensor:
    """Noise (N, n) of numbers, (n,) or (N, n), under the keys (N,) of tokens."""
    low = ((keys << 32) >> 32).to(torch.int32)[:, None]
    high = (keys >> 32).to(torch.int32)[:, None]
    bits = _mix32(_mix32(numbers.to(torch.int32) ^ low) ^ high) & 0x7FFFFFFF
    uniform = (bits.float() + 0.5) * 2.0**-31  # fine-grained near 0, where the likely winners are
    return -(-torch.log1p(-uniform)).log()


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
