"""What one step of a run is, whatever it runs on."""

from dataclasses import dataclass

import torch

from sophia_train.errors import ConfigError
from sophia_train.hessian.base import Estimator
from sophia_train.memory import MemoryEstimate, estimate_memory
from sophia_train.models.gpt2 import GPT2
from sophia_train.optim.mixed import MixedOptimizer
from sophia_train.optim.sophia import Sophia
from sophia_train.run_config import RunConfig, build, build_optimizer

# Bytes that an update reads and writes, a parameter in float32: weight and gradient are read and the weight
# is written; AdamW reads and writes two moments, Sophia its momentum, and only reads h.
OPTIMIZER_BYTES = {Sophia: 24, torch.optim.AdamW: 28}


@dataclass(frozen=True)
class Work:
    """One step, over all processes.

    Attributes:
        parameters: of the model.
        steps: of the run.
        tokens: target tokens of a step.
        flops: model FLOPs of a step, without the Hessian's.
        hessian: the Hessian's FLOPs over those, on the average over steps with and without a refresh.
        micro_batch_size: sequences of one forward and backward pass of one process.
        micro_batches: passes of one process.
        memory: of one device.
    """

    parameters: int
    steps: int
    tokens: int
    flops: float
    hessian: float
    micro_batch_size: int
    micro_batches: int
    memory: MemoryEstimate


def work_of(
    config: RunConfig, model: GPT2, processes: int, shards: int, micro_batch_size: int, bf16: bool
) -> Work:
    """Count what a step of a run is.

    Args:
        config: of the run.
        model: what is to be trained; `meta` will do.
        processes: that share the batch.
        shards: processes that share a copy of the parameters.
        micro_batch_size: sequences of one pass of one process.
        bf16: whether activations are bf16.
    """
    block_size = config.model.block_size
    tokens = config.batch_size * block_size
    estimator: Estimator = build(config.hessian)
    return Work(
        parameters=sum(p.numel() for p in model.parameters()),
        steps=config.total_steps(block_size),
        tokens=tokens,
        flops=tokens * model.flops_per_token(),
        hessian=estimator.passes * estimator.size(config.batch_size) / estimator.interval / config.batch_size,
        micro_batch_size=micro_batch_size,
        micro_batches=config.batch_size // (processes * micro_batch_size),
        memory=estimate_memory(model, micro_batch_size, bf16, shards),
    )


def optimizer_bytes(config: RunConfig, model: GPT2) -> int:
    """Bytes that an update of the whole model moves.

    Raises:
        ConfigError: it is by an optimizer of which that is not known, or which does more than move them.
    """
    optimizer = build_optimizer(config.optimizer, model)
    each = optimizer.optimizers if isinstance(optimizer, MixedOptimizer) else [optimizer]
    for one in each:
        if type(one) not in OPTIMIZER_BYTES:
            raise ConfigError(
                f"optimizer={type(one).__name__}: the time of its step is not known; "
                f"plan with one of {', '.join(known.__name__ for known in OPTIMIZER_BYTES)}"
            )
    return sum(
        OPTIMIZER_BYTES[type(one)] * p.numel()
        for one in each
        for group in one.param_groups
        for p in group["params"]
    )
