"""A small run built by hand, for tests that need more than the command line gives: float64, other data."""

import functools
from pathlib import Path

import numpy as np
import torch

from sophia_train import distributed
from sophia_train.data.batches import Batches, validation_blocks
from sophia_train.data.token_files import Tokens, TokenShard
from sophia_train.hessian import GNB, HessianUpdater, NoHessian, Replica
from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.optim import Sophia
from sophia_train.optim.groups import decay_groups
from sophia_train.optim.schedules import Cosine
from sophia_train.throughput import Throughput
from sophia_train.trackers.base import RunInfo, Trackers
from sophia_train.trackers.jsonl import JsonlTracker
from sophia_train.trainer import Trainer, TrainerConfig

MODEL = GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50, bias=True)
TRAINER = {
    "seed": 7,
    "batch_size": 8,
    "micro_batch_size": None,
    "max_steps": 20,
    "max_tokens": None,
    "max_seconds": None,
    "stop_at_step": None,
    "gradient_clip": 1.0,
    "max_skipped_steps": 2,
    "log_interval": 1,
    "eval_interval": 5,
    "eval_tokens": None,
    "save_interval": 5,
    "keep_checkpoints": 3,
    "sample_interval": None,
}


def text(folder: Path, n: int = 2000) -> Tokens:
    """Write tokens with some order in them, so that there is something to learn."""
    path = folder / "tokens.bin"
    if not path.exists():
        steps = np.random.default_rng(0).integers(1, 4, n)
        (np.cumsum(steps) % MODEL.vocab_size).astype("<u2").tofile(path)
    return Tokens([TokenShard(path, np.dtype("<u2"), 0, n)])


def build(run_dir: Path, *, optimizer="sophia", dtype=torch.float32, micro_batch_size=8, groups=1, **changes):
    """Build a trainer on the processes that there are; returns it and its model."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = TrainerConfig(**{**TRAINER, **changes})
    accelerator = distributed.start("fp32", None)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    model = GPT2(changes.pop("model", MODEL)).to(dtype)
    model.initialize(config.seed)
    if optimizer == "sophia":
        made, estimator = Sophia(decay_groups(model), lr=3e-3), GNB(interval=3, batch_size=4, groups=groups)
    else:
        made, estimator = torch.optim.AdamW(decay_groups(model), lr=3e-3, fused=True), NoHessian()
    prepared = accelerator.prepare_model(model)
    no_sync = functools.partial(accelerator.no_sync, prepared)
    replica = Replica(prepared, micro_batch_size, rank, world_size, no_sync, distributed.sum_over_processes)
    throughput = Throughput(accelerator.device, world_size)
    tokens = text(run_dir.parent)
    trackers = Trackers(JsonlTracker())
    trainer = Trainer(
        config,
        replica=replica,
        optimizer=made,
        schedule=Cosine(warmup_steps=3),
        hessian=HessianUpdater(
            estimator,
            made,
            replica,
            batch_size=config.batch_size,
            seed=config.seed,
            timed=throughput.hessian,
        ),
        batches=Batches(
            tokens,
            block_size=MODEL.block_size,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
        ),
        validation=validation_blocks(tokens, MODEL.block_size, rank, world_size, micro_batch_size, 400),
        trackers=trackers,
        run_dir=run_dir,
        throughput=throughput,
        manifest={"config": {}},
        sample=lambda: "",
        device=accelerator.device,
        total_steps=config.total_steps(MODEL.block_size),
    )
    return trainer, model


def start_trackers(trainer: Trainer, run_dir: Path) -> None:
    """Begin or go on with the metrics, as `train` does."""
    resumed_from = trainer.state.step or None
    trainer.trackers.start(RunInfo(run_dir, "test", {}, resumed_from, trainer.total_steps))
