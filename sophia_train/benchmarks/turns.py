"""What every benchmark needs: contestants that take turns on the same batches, and where that was."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sophia_train.assembly import build_trainer
from sophia_train.config import RunConfig, compose, run_config
from sophia_train.data.base import Data
from sophia_train.data.batches import Batch
from sophia_train.data.token_files import Tokens, TokenShard
from sophia_train.data.tokenizers import load_tokenizer
from sophia_train.errors import ConfigError
from sophia_train.models import convert
from sophia_train.run_folder import environment
from sophia_train.trackers.base import Silent
from sophia_train.trainer import Trainer

SEED = 1337
WARMUP_STEPS = 2  # not timed: compilation, allocation, optimizer state


@dataclass
class Contestant:
    """One way to train, and what was measured of it."""

    name: str
    step: Callable[[Batch], Tensor | float]  # one update of the parameters; returns the loss
    model: nn.Module
    optimizer: Optimizer
    seconds: list[float] = field(default_factory=list)  # of each repeat
    losses: list[float] = field(default_factory=list)  # of each step, the warm-up's too
    peak_bytes: int = 0  # allocated at a time on a GPU, beyond what stood there at the start of a repeat

    def step_ms(self, steps: int) -> float:
        """Median time of a step, in ms, over repeats of so many."""
        return 1000 * statistics.median(self.seconds) / steps

    def times_faster_than(self, other: "Contestant") -> float:
        """Median ratio of speeds, as of `times_faster`."""
        return times_faster(self.seconds, other.seconds)

    @property
    def peak_gb(self) -> float | None:
        """Peak memory on a GPU if it were alone there: what stands between steps, and a step's; else None."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        standing = [tensor.nbytes for tensor in tensors if tensor.is_cuda]
        return (self.peak_bytes + sum(standing)) / 1e9 if standing else None


def of_trainer(name: str, trainer: Trainer) -> Contestant:
    """Return a trainer as a contestant: its step on the batches that all have."""
    return Contestant(
        name, lambda batch: trainer.train_step(batch).loss, trainer.unwrapped, trainer.optimizer
    )


def times_faster(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Median ratio of speeds over neighbours in time, so that what else runs falls on both."""
    return statistics.median(theirs / own for own, theirs in zip(seconds, others, strict=True))


def take_turns(contestants: Sequence[Contestant], trainer: Trainer, steps: int, repeats: int) -> None:
    """Warm all contestants up, then time `repeats` stretches of the same `steps` batches of each.

    Raises:
        ConfigError: the memory is too small for all of them.
    """
    device, first = trainer.device, 0
    for count in [WARMUP_STEPS] + [steps] * repeats:
        batches = [on_device(trainer, step) for step in range(first, first + count)]
        for contestant in contestants:
            with _measured(contestant, device, counts=first > 0):
                losses = [contestant.step(batch) for batch in batches]
            contestant.losses += [float(loss) for loss in losses]
        first += count


def on_device(trainer: Trainer, step: int) -> Batch:
    """Return the batch of a step where the trainer's model is."""
    batch = trainer.loader.batches.batch(step)
    return Batch(batch.inputs.to(trainer.device), batch.targets.to(trainer.device), batch.sequences)


@contextmanager
def _measured(contestant: Contestant, device: torch.device, counts: bool) -> Iterator[None]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        standing = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    try:
        yield
    except torch.OutOfMemoryError:
        raise ConfigError(
            "the models and a pass of each do not fit into the GPU's memory together; "
            "use a smaller --micro-batch-size or --model"
        ) from None
    if on_gpu:
        torch.cuda.synchronize(device)
    if counts:
        contestant.seconds.append(time.perf_counter() - began)
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(device) - standing
            contestant.peak_bytes = max(contestant.peak_bytes, peak)


@contextmanager
def _random_words(config: RunConfig) -> Iterator[Tokens]:
    """Write as many words as the run reads to a token file; all are in the model's vocabulary."""
    assert config.max_steps is not None
    count = config.max_steps * config.batch_size * config.model.block_size + 1
    words = np.random.default_rng(SEED).integers(config.model.vocab_size, size=count, dtype="<u2")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "words.bin"
        words.tofile(path)
        yield Tokens([TokenShard(path, "<u2", 0, count)])


def _check_refreshes(config: RunConfig, steps: int) -> None:
    """Check that each repeat of so many steps has as many refreshes of the Hessian.

    Raises:
        ConfigError: it has not.
    """
    interval = config.hessian.get("interval", 1)
    if steps % interval:
        raise ConfigError(
            f"--steps {steps}: the Hessian is refreshed every {interval} steps, and each "
            f"repeat must have as many refreshes; use a multiple of {interval}"
        )


def gigabytes(figure: float | None) -> str:
    """Write memory, or that it was not measured, as on a CPU."""
    return "-" if figure is None else f"{figure:.2f}"


def provenance(device: torch.device, **versions: str) -> dict[str, Any]:
    """Where and how a benchmark was run."""
    return {
        **environment(device, 1),
        "accelerate": version("accelerate"),
        **versions,
        "threads": torch.get_num_threads(),
        "command": ["python", "scripts/benchmark.py", *sys.argv[1:]],
    }


def run_of(options: argparse.Namespace, *overrides: str) -> RunConfig:
    """Settings of a run that is only measured: no schedule, a length in steps, the rest as by default.

    Raises:
        ConfigError: an option does not fit the model or the others, or repeats have no equal refreshes.
    """
    size = "null" if options.micro_batch_size is None else options.micro_batch_size
    config = run_config(
        compose(
            [
                f"model={options.model}",
                "schedule=constant",
                "schedule.warmup_steps=0",
                f"batch_size={options.batch_size}",
                f"micro_batch_size={size}",
                f"max_steps={WARMUP_STEPS + options.steps * options.repeats}",
                f"precision={options.precision}",
                f"compile={options.compile}",
                f"seed={SEED}",
                *overrides,
            ]
        )
    )
    _check_refreshes(config, options.steps)
    return config


@contextmanager
def trainers_of(
    configs: Mapping[str, RunConfig], accelerator: Accelerator, data: Data | None = None
) -> Iterator[dict[str, Trainer]]:
    """Build a trainer for each, as `python -m sophia_train` does, on the same tokens.

    Args:
        configs: of the runs, by name.
        accelerator: from `distributed.start`.
        data: whose training tokens to read, prepared already; by default random words.

    Raises:
        RunError: the data cannot be opened.
    """
    any_config = next(iter(configs.values()))
    tokenizer = load_tokenizer("bytes") if data is None else data.load_tokenizer()
    with _random_words(any_config) if data is None else nullcontext(data.open("train")) as words:
        yield {
            name: build_trainer(
                config,
                init_from=None,
                splits=(words, words),
                tokenizer=tokenizer,
                trackers=Silent(),
                accelerator=accelerator,
            )
            for name, config in configs.items()
        }


def settings_of(options: argparse.Namespace, config: RunConfig, trainer: Trainer) -> dict[str, Any]:
    """What was run, for a report."""
    return {
        "model": options.model,
        "size": convert.describe(config.model),
        "batch_size": options.batch_size,
        "micro_batch_size": trainer.replica.micro_batch_size,
        "tokens_per_step": options.batch_size * config.model.block_size,
        "steps": options.steps,
        "repeats": options.repeats,
        "precision": options.precision,
        "compile": options.compile,
        "seed": SEED,
    }


def conditions(report: Mapping[str, Any]) -> list[str]:
    """Say in some lines what was run and on what."""
    settings, env = report["settings"], report["environment"]
    compiled = {"true": "compiled", "blocks": "blocks compiled"}.get(settings["compile"], "not compiled")
    return [
        f"model: {settings['model']}, {settings['precision']}, {compiled}",
        f"batch: {settings['batch_size']} sequences, {settings['micro_batch_size']} a pass, "
        f"{settings['tokens_per_step']:,} tokens",
        f"device: {env['device']}, {env['threads']} threads",
    ]
