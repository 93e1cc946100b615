"""What a run needs of a device's memory, estimated from its shapes before anything is allocated."""

from dataclasses import dataclass

from torch import nn

from sophia_train.models.gpt2 import GPT2Config
from sophia_train.models.losses import CHUNK_TOKENS

STATE_BYTES = 16  # a parameter in float32: weight, gradient, and two moments of the optimizer
ACTIVATION_BYTES = 34  # a layer, token and channel in bf16, attention not materialised (Korthikanti, 2022)
LOGIT_BYTES = 10  # of one chunk: bf16 and float32 logits and the gradient


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    states: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.states + self.activations + self.logits


def estimate_memory(
    model: nn.Module, config: GPT2Config, micro_batch_size: int, bf16: bool
) -> MemoryEstimate:
    """Estimate the peak of a training step; measured peaks are within about a quarter of it."""
    tokens = micro_batch_size * config.block_size
    parameters = sum(p.numel() for p in model.parameters())
    width = 1 if bf16 else 2
    return MemoryEstimate(
        states=STATE_BYTES * parameters,
        activations=width * ACTIVATION_BYTES * tokens * config.n_layer * config.n_embd,
        logits=LOGIT_BYTES * min(tokens, CHUNK_TOKENS) * config.padded_vocab_size,
    )


def plan_micro_batch(
    model: nn.Module, config: GPT2Config, sequences: int, bf16: bool, memory: int | None
) -> int:
    """Choose the sequences of one pass when the user leaves that open.

    Args:
        model: its parameters are counted.
        config: its shapes.
        sequences: sequences of a step on one process; the result divides it.
        bf16: whether activations are bf16.
        memory: bytes of the device; None for a CPU, where small passes stay in its caches.

    Returns:
        The largest divisor of `sequences`, at most 64, whose estimate is within 70 % of the memory; 1 if none
        is. On a CPU the largest with at most 8,192 tokens.
    """
    for size in range(min(sequences, 64), 1, -1):
        if sequences % size:
            continue
        if memory is None:
            fits = size * config.block_size <= 8192
        else:
            fits = estimate_memory(model, config, size, bf16).total <= 0.7 * memory
        if fits:
            return size
    return 1
