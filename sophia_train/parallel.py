"""How the processes of a run share its model: each has a copy (DDP), or a part of one (FSDP2).

ddp   every process has all parameters, and gradients are averaged as the backward pass makes them
fsdp  every process keeps 1 / W of parameters, gradients and optimizer state, and has a block's
      parameters whole only while it needs them, or until the last micro-batch of a step (Zhao et
      al., 2023; torch's `fully_shard`)
hsdp  fsdp inside groups of processes, such as those of one machine; the groups have copies
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sophia_train.errors import ConfigError
from sophia_train.models.gpt2 import GPT2

Mode = Literal["ddp", "fsdp", "hsdp"]
Compiled = Literal["whole", "blocks"]
NoSync = Callable[[], AbstractContextManager[None]]


def prepare(
    model: GPT2,
    accelerator: Accelerator,
    mode: Mode,
    *,
    compiled: Compiled | None = None,
    shard_processes: int | None = None,
    gradient_type: torch.dtype = torch.float32,
) -> tuple[nn.Module, NoSync]:
    """Share a model out; its parameters are equal on all processes before.

    FSDP2 changes the model itself, whose parameters become `DTensor`s: optimizers are made afterwards.

    Args:
        model: on the device of this process.
        accelerator: from `distributed.start`, which also settles what DDP sends.
        mode: how.
        compiled: what to compile: the whole model, or one block, whose code serves for all of them, sooner
            but without what compilers fuse over their borders. Where parameters come and go between blocks,
            whole means blocks.
        shard_processes: processes that share a copy in hsdp; None takes those of one machine.
        gradient_type: in which FSDP2 sends gradients; with bf16 those of each micro-batch, to add them up in
            float32.

    Returns:
        What to call for a forward pass whose backward pass averages gradients over processes, and a context
        in which it leaves other processes alone.

    Raises:
        ConfigError: as `count_shards`, or Accelerate has not made it what was asked for.
    """
    if compiled == "whole" and mode == "ddp":
        model.compile()
    elif compiled is not None:
        # to train, to estimate the Hessian, that with a smaller last micro-batch, and to evaluate: each layer
        # by itself, where layers have scales of attention of their own
        own_code = 4 * model.config.n_layer
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, own_code)
        for block in model.transformer.h:
            block.compile()
    if mode == "ddp":
        if (
            gradient_type is torch.bfloat16
            and accelerator.num_processes > 1
            and accelerator.device.type == "cpu"
        ):
            raise ConfigError(
                "gradient_type=bf16: DDP sends it between GPUs only; use fp32, or parallel=fsdp"
            )
        prepared = accelerator.prepare_model(model)
        if accelerator.num_processes > 1 and not isinstance(prepared, DistributedDataParallel):
            raise ConfigError(
                f"parallel=ddp, but Accelerate made it {accelerator.distributed_type.value}; "
                "launch with torchrun, or check `accelerate config`"
            )
        return prepared, functools.partial(accelerator.no_sync, prepared)
    mesh = _mesh(mode, accelerator, shard_processes)
    narrow = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=gradient_type)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The rest is one unit, so that the tied embedding is whole at both of its uses. It would stay whole after
    # a forward pass, in wait for a backward pass, which an evaluation does not make.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    assert isinstance(model, FSDPModule)
    # In bf16 FSDP2 would add up those of micro-batches, too.
    keeps_gradients = gradient_type is not torch.bfloat16
    return model, functools.partial(_keeping_whole, model, keeps_gradients)


def count_shards(mode: Mode, world_size: int, shard_processes: int | None) -> int:
    """Return how many processes share one copy of the parameters; the arguments are those of `prepare`.

    Raises:
        ConfigError: so many processes cannot share it in that way.
    """
    if mode == "ddp":
        return 1
    if world_size == 1:
        raise ConfigError(
            f"parallel={mode}, but 1 process runs and has nobody to share with; "
            "launch with torchrun --nproc-per-node <processes>, or use parallel=ddp"
        )
    if mode == "fsdp":
        return world_size
    shards = shard_processes or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % shards or not 1 < shards < world_size:
        raise ConfigError(
            f"parallel=hsdp with shard_processes={shards} of {world_size} processes: it must divide "
            "them into several groups of 2 or more; set shard_processes, or use parallel=fsdp or ddp"
        )
    return shards


def _mesh(mode: Mode, accelerator: Accelerator, shard_processes: int | None) -> DeviceMesh:
    shards = count_shards(mode, accelerator.num_processes, shard_processes)
    device, copies = accelerator.device.type, accelerator.num_processes // shards
    if mode == "hsdp":
        return init_device_mesh(device, (copies, shards), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (shards,), mesh_dim_names=("shard",))


@contextlib.contextmanager
def _keeping_whole(model: FSDPModule, gradients: bool) -> Iterator[None]:
    """Let a pass that others of its step follow leave parameters whole for them, and gradients, too.

    So parameters are gathered for the first forward pass of a step and the last backward pass, however many
    are between: for 6 bytes a parameter that is, up to 1.5B, the better bargain.
    """
    model.set_reshard_after_forward(False)
    model.set_reshard_after_backward(False)
    model.set_requires_gradient_sync(not gradients)
    try:
        yield
    finally:
        model.set_reshard_after_forward(True)
        model.set_reshard_after_backward(True)
        model.set_requires_gradient_sync(True)
