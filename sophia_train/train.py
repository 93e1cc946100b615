"""One training run: claim its folder, have everything built, fit, close."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.table import Column, Table

from sophia_train import checkpoint, compile_cache, distributed
from sophia_train.assembly import (
    GRADIENT_TYPES,
    Splits,
    build_trainer,
    micro_batch_size_of,
    open_splits,
    shards_of,
)
from sophia_train.compare.card import write_card
from sophia_train.compare.curves import plot_run
from sophia_train.config import compose, run_config
from sophia_train.data.base import Data
from sophia_train.data.statistics import LARGEST_BIGRAM_VOCABULARY, ngram_cross_entropy
from sophia_train.data.tokenizers import Tokenizer
from sophia_train.errors import ConfigError, as_run_error
from sophia_train.hessian.hutchinson import Hutchinson
from sophia_train.launch import launch
from sophia_train.memory import shrink_micro_batch
from sophia_train.planning.work import work_of
from sophia_train.profiler import traced
from sophia_train.run_config import (
    RunConfig,
    build,
    build_optimizer,
    empty_model,
    to_json,
    with_processes,
)
from sophia_train.run_folder import RunFolder
from sophia_train.trackers.base import RunInfo, Silent, Tracker, Trackers
from sophia_train.trackers.console import Output, duration
from sophia_train.trackers.jsonl import JsonlTracker
from sophia_train.trainer import Trainer

logger = logging.getLogger("sophia_train")


def main() -> None:
    """Run `python -m sophia_train` with the overrides of the command line."""
    launch(train)


def train(config: RunConfig) -> None:
    """Train as the settings say, together with the other processes that the launcher started.

    Raises:
        RunError: the run cannot start or go on; its code is the exit code.
        OSError: something could not be read or written.
    """
    gradient_type = GRADIENT_TYPES[config.gradient_type]
    accelerator = distributed.start(config.precision, config.processes, gradient_type)
    with distributed.ending_together(accelerator):
        _train(config, accelerator)


def _train(config: RunConfig, accelerator: Accelerator) -> None:
    config = with_processes(config, accelerator.num_processes)
    data: Data = build(config.data)
    tokenizer = data.load_tokenizer()
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {tokenizer.vocab_size} words of "
            f"data.tokenizer={data.tokenizer}; use model.vocab_size={tokenizer.vocab_size}"
        )
    if config.sample_interval is not None:
        tokenizer.encode(config.sample_prompt)  # its vocabulary must be there before training, not after
    trackers = _trackers(config, accelerator.is_main_process)
    if config.dry_run:
        _describe(config, data, accelerator)
        return
    if config.compile_cache is not None:
        compile_cache.keep_in(config.compile_cache)
    folder = RunFolder(Path(config.run_dir), to_json(config))
    with contextlib.ExitStack() as ownership:

        def claim() -> None:
            ownership.enter_context(folder.owned())
            folder.starting_point(config.resume)
            data.prepare()

        distributed.main_process_first(accelerator, claim)
        start = folder.starting_point(config.resume)
        splits = open_splits(data, accelerator)
        init_from = config.init_from if start is None else None  # may be gone by the time of a resume
        trainer = build_trainer(config, init_from, splits, tokenizer, trackers, accelerator)
        if start is not None:
            trainer.restore(start)
            logger.info("going on from %s", start)
        logger.info("%s: %s", folder.path, data.describe())
        if trainer.finished:
            finished = folder.path if checkpoint.exists(folder.path) else config.resume
            logger.info("%s is finished; choose another name= to train anew", finished)
        else:
            with _tracked(trainer, trackers, folder, config), _naming_what_fits(trainer, config, accelerator):
                if accelerator.is_main_process:
                    folder.write_start(accelerator.device, accelerator.num_processes)
                _fit(trainer, config, folder)
        if accelerator.is_main_process and checkpoint.exists(folder.path):  # else another run was finished
            folder.write_status(0, "finished", trainer.state.step)
            _conclude(trainer, splits, tokenizer, folder)


def _trackers(config: RunConfig, is_main_process: bool) -> Tracker:
    if not is_main_process:
        return Silent()
    return Trackers(JsonlTracker(), [build(node) for node in config.tracker.values()])


def _fit(trainer: Trainer, config: RunConfig, folder: RunFolder) -> None:
    if config.profile and trainer.replica.rank == 0:
        with traced(folder.path / "profile", trainer.state.step, trainer.hessian.interval) as between_steps:
            trainer.fit(between_steps)
    else:
        trainer.fit()


@contextlib.contextmanager
def _naming_what_fits(trainer: Trainer, config: RunConfig, accelerator: Accelerator) -> Iterator[None]:
    """Say which settings would do, if the memory of the device does not.

    Raises:
        ConfigError: the body was out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(_what_fits(trainer, config, accelerator)) from error


def _what_fits(trainer: Trainer, config: RunConfig, accelerator: Accelerator) -> str:
    model, replica, device, memory = trainer.unwrapped, trainer.replica, accelerator.device, None
    if device.type == "cuda":  # others may use it, too
        memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    sequences, bf16 = config.batch_size // replica.world_size, accelerator.mixed_precision == "bf16"
    shards = shards_of(config, accelerator)
    overrides = []
    if size := shrink_micro_batch(model, sequences, bf16, memory, replica.micro_batch_size, shards):
        overrides.append(f"micro_batch_size={size}")
    estimator = trainer.hessian.estimator
    if isinstance(estimator, Hutchinson) and estimator.due(trainer.state.step):
        if estimator.micro_batch_size > 1:  # it may have been its pass
            overrides.append(f"hessian.micro_batch_size={estimator.micro_batch_size // 2}")
    if not overrides and not model.transformer.recompute_blocks:
        overrides.append("activation_checkpointing=blocks")
    fix = f"use {' '.join(overrides)}, and the batch stays as it is"
    if not overrides:
        fix = "choose a smaller model= or model.block_size="
    return (
        f"micro_batch_size={replica.micro_batch_size} is too much for the memory of {device} "
        f"after {trainer.state.step} steps; {fix}"
    )


@contextlib.contextmanager
def _tracked(trainer: Trainer, trackers: Tracker, folder: RunFolder, config: RunConfig) -> Iterator[None]:
    """Start the trackers; however the body ends, close them, and say in status.json what went wrong."""
    resumed_from = trainer.state.step or None
    code = 0
    data = trainer.manifest["data"]
    trackers.start(
        RunInfo(folder.path, config.name, to_json(config), resumed_from, trainer.total_steps, data)
    )
    try:
        with distributed.noticing_losses():
            yield
    except BaseException as error:
        reason = as_run_error(error)
        code = reason.code
        if distributed.failure(error).told_here:
            with contextlib.suppress(OSError):  # the disk may be what failed
                folder.write_status(code, str(reason), trainer.state.step)
        raise
    finally:
        trackers.close(code)


def _conclude(trainer: Trainer, splits: Splits, tokenizer: Tokenizer, folder: RunFolder) -> None:
    """Draw the loss curve, and print the result beside what counting words achieves on the same text."""
    state = trainer.state
    baselines = {}
    if tokenizer.vocab_size <= LARGEST_BIGRAM_VOCABULARY:
        baselines["unigram"] = ngram_cross_entropy(*splits, tokenizer.vocab_size, 1)
        baselines["bigram"] = ngram_cross_entropy(*splits, tokenizer.vocab_size, 2)
        folder.write_status(0, "finished", state.step, baselines)  # again: counting takes time
    figure = plot_run(folder.path, baselines)
    card = write_card(folder.path, defaults=to_json(run_config(compose())))
    _print(
        {
            "validation loss": f"{trainer.validation_loss:.3f} nats a token",
            **{f"  {name} model": f"{value:.3f}" for name, value in baselines.items()},
            "steps, tokens": f"{state.step:,}, {state.tokens:,}",
            "time": duration(state.seconds),
            "loss curve": str(figure),
            "card": str(card),
        }
    )


def _describe(config: RunConfig, data: Data, accelerator: Accelerator) -> None:
    """Print what a run would be (`dry_run=true`)."""
    model = empty_model(config)
    build_optimizer(config.optimizer, model)
    processes, bf16 = accelerator.num_processes, accelerator.mixed_precision == "bf16"
    size, shards = micro_batch_size_of(config, model, accelerator), shards_of(config, accelerator)
    work = work_of(config, model, processes, shards, size, bf16)
    memory, steps, tokens, hessian = work.memory, work.steps, work.tokens, work.hessian
    rows = {
        "run folder": config.run_dir,
        "data": data.describe(),
        "parameters": f"{work.parameters:,}",
        "batch": f"{config.batch_size} x {config.model.block_size} = {tokens:,} tokens: "
        f"{processes} process(es) x {work.micro_batches} micro-batches of {size}",
        "steps": f"{steps:,}",
        "tokens": f"{steps * tokens:,}",
        "FLOPs": f"{steps * work.flops * (1 + hessian):.3g}"
        + (f", of which {hessian / (1 + hessian):.1%} for the Hessian" if hessian else ""),
        "memory": f"about {memory.total / 1e9:.1f} GB a device: states {memory.states / 1e9:.1f}, "
        f"activations {memory.activations / 1e9:.1f}"
        f"{' (blocks recomputed)' if model.transformer.recompute_blocks else ''}, "
        f"logits {memory.logits / 1e9:.1f}",
    }
    if accelerator.is_main_process:
        _print(rows)


def _print(rows: Mapping[str, str]) -> None:
    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    Output(highlight=False).print(table)
