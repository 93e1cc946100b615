"""What a run needs of a device's memory, estimated from its shapes before anything is allocated."""

from dataclasses import dataclass

from sophia_train.models.gpt2 import GPT2
from sophia_train.models.losses import CHUNK_TOKENS

STATE_BYTES = 16  # a parameter in float32: weight, gradient, and two moments of the optimizer
ACTIVATION_BYTES = 34  # a layer, token and channel in bf16, attention not materialised (Korthikanti, 2022)
INPUT_BYTES = 2  # a layer, token and channel in bf16 that a recomputed block starts from
LOGIT_BYTES = 4  # of one chunk: at most float32, and the gradient takes their place
GRADIENT_BYTES = 4  # a parameter that is shared: its gradient, whole until all micro-batches have added to it


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


def estimate_memory(model: GPT2, micro_batch_size: int, bf16: bool, shards: int = 1) -> MemoryEstimate:
    """Estimate the peak of a training step; measured peaks are within about a quarter of it.

    Where blocks are recomputed, that is all of their inputs and the activations of one.

    Args:
        model: what is to be trained; `meta` will do.
        micro_batch_size: sequences of one pass.
        bf16: whether activations are bf16.
        shards: processes that share parameters, gradients and the optimizer's state.
    """
    config = model.config
    tokens = micro_batch_size * config.block_size
    parameters = sum(p.numel() for p in model.parameters())
    layer, layers = ACTIVATION_BYTES, config.n_layer * ACTIVATION_BYTES
    if model.transformer.recompute_blocks:
        layers = config.n_layer * INPUT_BYTES + layer
    whole = GRADIENT_BYTES + (2 if bf16 else 4)  # with the parameters, as they were gathered
    return MemoryEstimate(
        states=parameters * STATE_BYTES // shards + (parameters * whole if shards > 1 else 0),
        activations=tokens * config.n_embd * layers * (1 if bf16 else 2),
        logits=LOGIT_BYTES * min(tokens, CHUNK_TOKENS) * config.padded_vocab_size,
    )


def plan_micro_batch(model: GPT2, sequences: int, bf16: bool, memory: int | None, shards: int = 1) -> int:
    """Choose the sequences of one pass when the user leaves that open.

    Args:
        model: what is to be trained; `meta` will do.
        sequences: sequences of a step on one process; the result divides it.
        bf16: whether activations are bf16.
        memory: bytes of the device; None for a CPU, where small passes stay in its caches.
        shards: as of `estimate_memory`.

    Returns:
        The largest divisor of `sequences`, at most 64, whose estimate is within 70 % of the memory; 1 if none
        is. On a CPU the largest with at most 8,192 tokens.
    """
    for size in range(min(sequences, 64), 1, -1):
        if sequences % size:
            continue
        if memory is None:
            fits = size * model.config.block_size <= 8192
        else:
            fits = estimate_memory(model, size, bf16, shards).total <= 0.7 * memory
        if fits:
            return size
    return 1


def shrink_micro_batch(
    model: GPT2, sequences: int, bf16: bool, memory: int | None, too_large: int, shards: int = 1
) -> int | None:
    """Choose the sequences of one pass after `too_large` did not fit into the memory.

    Args:
        model: as of `plan_micro_batch`, and so are `sequences` and `bf16`.
        sequences: of a step on one process; the result divides it.
        bf16: whether activations are bf16.
        memory: bytes that the process could have; None for a CPU.
        too_large: sequences of the pass that failed.
        shards: as of `estimate_memory`.

    Returns:
        What would have been planned for that memory, but at most half of what failed; None if that was 1.
    """
    planned = plan_micro_batch(model, sequences, bf16, memory, shards)
    most = min(planned, too_large // 2)
    return next((size for size in range(most, 0, -1) if sequences % size == 0), None)
