"""Everything that a run needs, built from its settings."""

import dataclasses
import functools
import os
from pathlib import Path

import torch
from accelerate import Accelerator

from sophia_train import checkpoint, parallel
from sophia_train.collectives import gather, sum_over_processes, together
from sophia_train.data.base import SPLITS, Data
from sophia_train.data.batches import Batches, document_blocks, validation_blocks
from sophia_train.data.token_files import Tokens
from sophia_train.data.tokenizers import Tokenizer
from sophia_train.distributed import PREPARATION
from sophia_train.errors import ConfigError
from sophia_train.gradients import evaluation_mode
from sophia_train.hessian.base import Estimator, HessianUpdater, Replica
from sophia_train.hessian.hutchinson import Hutchinson
from sophia_train.memory import plan_micro_batch
from sophia_train.models import convert
from sophia_train.models.float8 import use_float8
from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.run_config import RunConfig, build, build_optimizer, empty_model, to_json
from sophia_train.run_folder import environment
from sophia_train.throughput import Throughput
from sophia_train.trackers.base import Tracker
from sophia_train.trainer import Trainer

GRADIENT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Splits = tuple[Tokens, Tokens]  # of training and of validation


def open_splits(data: Data, accelerator: Accelerator) -> Splits:
    """Open the tokens of a run, of whose files each process verifies a share.

    Raises:
        MissingInputError, DataError: as `Data.open`, on all processes.
    """
    # all files on each machine, which may have copies of its own
    share = accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    opened: list[Tokens] = []
    together(lambda: opened.extend(data.open(split, share) for split in SPLITS), PREPARATION)
    training, validation = opened
    return training, validation


def build_trainer(
    config: RunConfig,
    init_from: str | None,
    splits: Splits,
    tokenizer: Tokenizer,
    trackers: Tracker,
    accelerator: Accelerator,
) -> Trainer:
    """Build all that a run needs, on this process.

    Args:
        config: of the run.
        init_from: weights to start from: a run, a checkpoint or a Hugging Face folder; None draws them.
        splits: tokens of training and of validation.
        tokenizer: for samples.
        trackers: take the metrics.
        accelerator: from `distributed.start`.

    Raises:
        ConfigError: settings do not fit each other, the processes, or the weights to start from.
        MissingInputError, DataError: those weights are not there, or damaged.
    """
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    model = _build_model(config, init_from, device)
    estimator: Estimator = build(config.hessian)
    if config.precision == "fp8":
        if isinstance(estimator, Hutchinson):
            raise ConfigError("precision=fp8 cannot be differentiated twice, as Hutchinson does; use bf16")
        use_float8(model, device)
    micro_batch_size = micro_batch_size_of(config, model, accelerator)
    prepared, no_sync = parallel.prepare(
        model,
        accelerator,
        config.parallel,
        compiled=_compiled(config, device),
        shard_processes=config.shard_processes,
        gradient_type=GRADIENT_TYPES[config.gradient_type],
    )
    optimizer = build_optimizer(config.optimizer, model)  # of sharded parameters, if they are
    if config.strict:
        _make_strict(device)
    replica = Replica(
        prepared,
        micro_batch_size,
        rank,
        world_size,
        sharded=config.parallel != "ddp",
        strict=config.strict,
        no_sync=no_sync,
        autocast=accelerator.autocast,
        sum_over_processes=sum_over_processes,
    )
    throughput = Throughput(device, world_size)
    block_size = config.model.block_size
    training, validation = splits
    fingerprints = {"train": training.fingerprint(), "validation": validation.fingerprint()}
    return Trainer(
        config,
        replica=replica,
        optimizer=optimizer,
        schedule=build(config.schedule),
        gamma=build(config.gamma),
        hessian=HessianUpdater(
            estimator,
            optimizer,
            replica,
            batch_size=config.batch_size,
            seed=config.seed,
            timed=throughput.hessian,
        ),
        batches=Batches(
            training,
            block_size=block_size,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            starts=document_blocks(training, block_size, tokenizer.end_of_text)
            if config.data.get("start_at_documents")
            else None,
        ),
        validation=validation_blocks(
            validation, block_size, rank, world_size, micro_batch_size, config.eval_tokens
        ),
        trackers=trackers,
        run_dir=Path(config.run_dir),
        throughput=throughput,
        manifest={
            "config": to_json(config),
            "environment": environment(device, world_size),
            "data": fingerprints,
            "tokenizer": tokenizer.name,  # the path in the config may be gone when the model is used
        },
        sample=functools.partial(_sample, model, tokenizer, config, device),
        device=device,
        total_steps=config.total_steps(block_size),
    )


def _build_model(config: RunConfig, init_from: str | None, device: torch.device) -> GPT2:
    """Build the model on its device, with new weights or those of `init_from`."""
    model = empty_model(config).to_empty(device=device)
    if init_from is None:
        model.initialize(config.seed)
        return model
    source = Path(init_from)
    if checkpoint.exists(source):
        weights, manifest = checkpoint.load_weights(source)
        theirs = GPT2Config(**manifest["config"]["model"])
    else:
        theirs, weights = convert.load_folder(source)
    _check_same_shape(theirs, config.model, init_from)
    checkpoint.load_parameters(model, weights, init_from)
    return model


def _check_same_shape(theirs: GPT2Config, ours: GPT2Config, source: str) -> None:
    for key, value in dataclasses.asdict(theirs).items():
        if key != "dropout" and value != getattr(ours, key):
            raise ConfigError(
                f"model.{key}={getattr(ours, key)}, but init_from={source} has {value}; "
                f"set model.{key}={value}"
            )


def _make_strict(device: torch.device) -> None:
    """Let every process add up in the same order.

    Raises:
        ConfigError: a GPU does not.
    """
    if device.type != "cpu":
        raise ConfigError(
            "strict=true: a GPU's attention adds in any order; use ACCELERATE_USE_CPU=true, or leave it out"
        )
    torch.set_num_threads(1)  # products of matrices are cut in other ways by other numbers of threads


def micro_batch_size_of(config: RunConfig, model: GPT2, accelerator: Accelerator) -> int:
    """Return the sequences of a pass: those asked for, or as many as the smallest device has memory for.

    Raises:
        ConfigError: as `shards_of`.
    """
    if config.micro_batch_size is not None or config.strict:
        return config.micro_batch_size or 1
    device = accelerator.device
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    sequences = config.batch_size // accelerator.num_processes
    bf16, shards = accelerator.mixed_precision == "bf16", shards_of(config, accelerator)
    return min(gather(plan_micro_batch(model, sequences, bf16, memory, shards)))


def shards_of(config: RunConfig, accelerator: Accelerator) -> int:
    """Return how many processes share one copy of the parameters.

    Raises:
        ConfigError: as `parallel.count_shards`.
    """
    return parallel.count_shards(config.parallel, accelerator.num_processes, config.shard_processes)


def _compiled(config: RunConfig, device: torch.device) -> parallel.Compiled | None:
    if config.compile == "blocks":
        return "blocks"
    return "whole" if config.compile is True or (config.compile == "auto" and device.type == "cuda") else None


def _sample(model: GPT2, tokenizer: Tokenizer, config: RunConfig, device: torch.device) -> str:
    prompt = torch.tensor([tokenizer.encode(config.sample_prompt) or [tokenizer.end_of_text]], device=device)
    with evaluation_mode(model):
        ids = model.generate(prompt, config.sample_tokens, seed=config.seed, words=tokenizer.vocab_size)
    return tokenizer.decode(ids[0].tolist())
