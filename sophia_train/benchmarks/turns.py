"""What every benchmark needs: contestants that take turns on the same batches, and where that was."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sophia_train.config import RunConfig
from sophia_train.data.batches import Batch
from sophia_train.data.token_files import Tokens, TokenShard
from sophia_train.errors import ConfigError
from sophia_train.run_folder import environment
from sophia_train.trainer import Trainer

SEED = 1337
WARMUP_STEPS = 2  # not timed: compilation, allocation, optimizer state


@dataclass
class Contestant:
    """One way to train, and what was measured of it."""

    name: str
    step: Callable[[Batch], Tensor | float]  # one update of the parameters; returns the loss
    seconds: list[float] = field(default_factory=list)  # of each repeat
    losses: list[float] = field(default_factory=list)  # of each step, the warm-up's too
    peak_bytes: int = 0  # allocated at a time on a GPU, beyond what stood there at the start of a repeat

    def step_ms(self, steps: int) -> float:
        """Median time of a step, in ms, over repeats of so many."""
        return 1000 * statistics.median(self.seconds) / steps

    def times_faster_than(self, other: "Contestant") -> float:
        """Median ratio of speeds over neighbours in time, so that what else runs falls on both."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(theirs / own for own, theirs in pairs)


def take_turns(contestants: Sequence[Contestant], trainer: Trainer, steps: int, repeats: int) -> None:
    """Warm all contestants up, then time `repeats` stretches of the same `steps` batches of each.

    Raises:
        ConfigError: the memory is too small for all of them.
    """
    device, first = trainer.device, 0
    for count in [WARMUP_STEPS] + [steps] * repeats:
        batches = [
            Batch(batch.inputs.to(device), batch.targets.to(device), batch.sequences)
            for batch in (trainer.loader.batches.batch(step) for step in range(first, first + count))
        ]
        for contestant in contestants:
            with _measured(contestant, device, counts=first > 0):
                losses = [contestant.step(batch) for batch in batches]
            contestant.losses += [float(loss) for loss in losses]
        first += count


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
def random_words(config: RunConfig) -> Iterator[Tokens]:
    """Write as many words as the run reads to a token file; all are in the model's vocabulary."""
    assert config.max_steps is not None
    count = config.max_steps * config.batch_size * config.model.block_size + 1
    words = np.random.default_rng(SEED).integers(config.model.vocab_size, size=count, dtype="<u2")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "words.bin"
        words.tofile(path)
        yield Tokens([TokenShard(path, "<u2", 0, count)])


def check_refreshes(config: RunConfig, steps: int) -> None:
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


def provenance(device: torch.device, **versions: str) -> dict[str, Any]:
    """Where and how a benchmark was run."""
    return {
        **environment(device, 1),
        "accelerate": version("accelerate"),
        **versions,
        "threads": torch.get_num_threads(),
        "command": ["python", "scripts/benchmark.py", *sys.argv[1:]],
    }


def overrides(
    model: str, batch_size: int, micro_batch_size: int | None, steps: int, precision: str, compiled: bool
) -> list[str]:
    """Settings of a run that is only measured: no schedule, a length in steps, the rest as by default."""
    return [
        f"model={model}",
        "schedule=constant",
        "schedule.warmup_steps=0",
        f"batch_size={batch_size}",
        f"micro_batch_size={'null' if micro_batch_size is None else micro_batch_size}",
        f"max_steps={WARMUP_STEPS + steps}",
        f"precision={precision}",
        f"compile={str(compiled).lower()}",
        f"seed={SEED}",
    ]
