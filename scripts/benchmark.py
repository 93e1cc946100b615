"""Measure this project's speed beside a yardstick, in one process, taking turns.

    python scripts/benchmark.py train [--model NAME] [--batch-size N] [--steps N] [--repeats N] ...

`train`: our training step with AdamW and with Sophia-G, next to transformers' GPT-2 in a plain PyTorch loop.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sophia_train import durable
from sophia_train.command_line import Parser, whole_number
from sophia_train.config import RunConfig, build, compose, run_config
from sophia_train.data.batches import Batch
from sophia_train.data.token_files import Tokens, TokenShard
from sophia_train.data.tokenizers import load_tokenizer
from sophia_train.distributed import start
from sophia_train.errors import ConfigError, UnavailableError, exit_code_of
from sophia_train.gradients import micro_batches
from sophia_train.models import convert
from sophia_train.optim.groups import decay_groups
from sophia_train.run_folder import environment
from sophia_train.trackers.base import Silent
from sophia_train.train import build_trainer
from sophia_train.trainer import Trainer

SEED = 1337
WARMUP_STEPS = 2  # not timed: compilation, allocation, optimizer state
OURS, SOPHIA, THEIRS = "sophia_train, AdamW", "sophia_train, Sophia-G", "transformers, AdamW"


@dataclass
class Contestant:
    """One way to train, and what was measured of it."""

    name: str
    step: Callable[[Batch], Tensor | float]  # one update of the parameters; returns the loss
    seconds: list[float] = field(default_factory=list)  # of each repeat
    losses: list[float] = field(default_factory=list)  # of each step, the warm-up's too


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="our step next to transformers' GPT-2 in a plain loop")
    train.add_argument("--model", default="gpt2_nano", metavar="NAME", help="of configs/model (%(default)s)")
    train.add_argument(
        "--batch-size", type=whole_number, default=32, metavar="N", help="sequences (%(default)s)"
    )
    train.add_argument(
        "--micro-batch-size",
        type=whole_number,
        metavar="N",
        help="sequences of one pass (as training plans it)",
    )
    train.add_argument(
        "--steps", type=whole_number, default=10, metavar="N", help="of one repeat (%(default)s)"
    )
    train.add_argument("--repeats", type=whole_number, default=5, metavar="N", help="timed (%(default)s)")
    train.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(%(default)s)")
    train.add_argument("--compile", action="store_true", help="compile both models")
    train.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    report = train_report(options)
    Console(highlight=False, width=80).print(train_table(report))
    Console(highlight=False, soft_wrap=True).print(train_notes(report), markup=False)
    if options.json is not None:
        durable.write_json(options.json, report)


def train_report(options: argparse.Namespace) -> dict[str, Any]:
    """Run the contestants of `train` in turns, and return what was measured.

    All start from the same weights and see the same batches of random words, with biases, as transformers'
    GPT-2 has them. The first two repeat each other's arithmetic, so their losses must agree.

    Raises:
        ConfigError: an option does not fit the model or the others, or the memory is too small.
        UnavailableError: transformers is not installed.
    """
    transformers = _transformers()
    with tempfile.TemporaryDirectory() as folder:
        configs = {
            name: run_config(compose(_overrides(options, optimizer)))
            for name, optimizer in ((OURS, "adamw"), (SOPHIA, "sophia_g"))
        }
        interval = configs[SOPHIA].hessian["interval"]
        if options.steps % interval:
            raise ConfigError(
                f"--steps {options.steps}: Sophia-G refreshes its Hessian every {interval} steps, and each "
                f"repeat must have as many refreshes; use a multiple of {interval}"
            )
        accelerator = start(options.precision, 1)
        words = _random_words(configs[OURS], Path(folder))
        trainers = {  # as `python -m sophia_train` builds them
            name: build_trainer(
                config,
                init_from=None,
                splits=(words, words),
                tokenizer=load_tokenizer("bytes"),
                trackers=Silent(),
                accelerator=accelerator,
            )
            for name, config in configs.items()
        }
        micro_batch_size = trainers[OURS].replica.micro_batch_size
        contestants = [
            Contestant(OURS, lambda batch: trainers[OURS].train_step(batch).loss),
            Contestant(THEIRS, _plain_loop(transformers, configs[OURS], trainers[OURS])),
            Contestant(SOPHIA, lambda batch: trainers[SOPHIA].train_step(batch).loss),
        ]
        try:
            _take_turns(contestants, trainers[OURS], options.steps, options.repeats)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"three models and passes of {micro_batch_size} sequences do not fit into the GPU's memory; "
                f"use --micro-batch-size {max(1, micro_batch_size // 2)} or a smaller --model"
            ) from None
    tokens = options.batch_size * configs[OURS].model.block_size
    theirs = next(each for each in contestants if each.name == THEIRS)
    return {
        "benchmark": "train",
        "settings": {
            "model": options.model,
            "size": convert.describe(configs[OURS].model),
            "batch_size": options.batch_size,
            "micro_batch_size": micro_batch_size,
            "tokens_per_step": tokens,
            "steps": options.steps,
            "repeats": options.repeats,
            "precision": options.precision,
            "compile": options.compile,
            "seed": SEED,
        },
        "environment": {
            **environment(accelerator.device, 1),
            "accelerate": version("accelerate"),
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "command": ["python", "scripts/benchmark.py", *sys.argv[1:]],
        },
        "results": [_result(each, theirs, tokens, options.steps) for each in contestants],
        "largest_loss_difference": max(
            abs(ours - other) for ours, other in zip(contestants[0].losses, theirs.losses, strict=True)
        ),
    }


def train_table(report: dict[str, Any]) -> Table:
    """Lay out the figures of `train` in at most 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("tokens/s", "ms a step", "ratio", "loss"):
        table.add_column(heading, justify="right")
    for row in report["results"]:
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_ms']:,.1f}",
            f"{row['ratio']:.2f}",
            f"{row['losses'][-1]:.5f}",
        )
    return table


def train_notes(report: dict[str, Any]) -> str:
    """Say under what conditions the figures of `train` were measured."""
    settings, env = report["settings"], report["environment"]
    steps = len(report["results"][0]["losses"])
    compiled = "compiled" if settings["compile"] else "not compiled"
    return "\n".join(
        [
            f"ratio: tokens/s over transformers', median of {settings['repeats']} repeats in turns",
            f"loss: after {steps} steps; ours and theirs with AdamW differ by at most "
            f"{report['largest_loss_difference']:.1e}",
            f"model: {settings['model']}, {settings['precision']}, {compiled}",
            f"batch: {settings['batch_size']} sequences, {settings['micro_batch_size']} a pass, "
            f"{settings['tokens_per_step']:,} tokens",
            f"device: {env['device']}, {env['threads']} threads",
            f"versions: Python {env['python']}, torch {env['torch']}, transformers {env['transformers']}",
        ]
    )


def _transformers() -> ModuleType:
    # a torchvision that was built for another torch would keep transformers from importing
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        import transformers
    except ImportError:
        raise UnavailableError("transformers is not installed; pip install 'sophia_train[hf]'") from None
    return transformers


def _overrides(options: argparse.Namespace, optimizer: str) -> list[str]:
    size = "null" if options.micro_batch_size is None else options.micro_batch_size
    return [
        f"model={options.model}",
        "model.bias=true",
        f"optimizer={optimizer}",
        "schedule=constant",
        "schedule.warmup_steps=0",
        f"batch_size={options.batch_size}",
        f"micro_batch_size={size}",
        f"max_steps={WARMUP_STEPS + options.steps * options.repeats}",
        f"precision={options.precision}",
        f"compile={str(options.compile).lower()}",
        f"seed={SEED}",
    ]


def _random_words(config: RunConfig, folder: Path) -> Tokens:
    """Write as many words as the run reads to a token file; all are in the model's vocabulary."""
    assert config.max_steps is not None
    count = config.max_steps * config.batch_size * config.model.block_size + 1
    words = np.random.default_rng(SEED).integers(config.model.vocab_size, size=count, dtype="<u2")
    words.tofile(folder / "words.bin")
    return Tokens([TokenShard(folder / "words.bin", "<u2", 0, count)])


def _plain_loop(
    transformers: ModuleType, config: RunConfig, trainer: Trainer
) -> Callable[[Batch], Tensor | float]:
    """Return one step of transformers' GPT-2, on the weights and with the settings of a trainer of ours."""
    settings = transformers.GPT2Config(
        **convert.hf_config(config.model), attn_implementation="sdpa", use_cache=False
    )
    with trainer.device:
        model = transformers.GPT2LMHeadModel(settings)
    model.load_state_dict(convert.to_hf_state(trainer.unwrapped, config.model), strict=False)  # tied head
    model.tie_weights()
    model.train()
    if config.compile:
        model.compile()
    optimizer = build(config.optimizer, decay_groups(model))
    bf16 = config.precision == "bf16"

    def step(batch: Batch) -> Tensor:
        parts = micro_batches(batch.inputs, batch.targets, trainer.replica.micro_batch_size)
        total = torch.zeros((), device=trainer.device)
        for inputs, targets in parts:
            with torch.autocast(trainer.device.type, torch.bfloat16, enabled=bf16):
                logits = model(inputs).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) / len(parts)
            loss.backward()
            total += loss.detach()
        if config.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def _take_turns(contestants: list[Contestant], trainer: Trainer, steps: int, repeats: int) -> None:
    """Warm all contestants up, then time `repeats` stretches of the same `steps` batches of each."""
    first = 0
    for count in [WARMUP_STEPS] + [steps] * repeats:
        batches = [
            Batch(batch.inputs.to(trainer.device), batch.targets.to(trainer.device), batch.sequences)
            for batch in (trainer.batches.batch(step) for step in range(first, first + count))
        ]
        for contestant in contestants:
            _wait_for(trainer.device)
            began = time.perf_counter()
            losses = [contestant.step(batch) for batch in batches]
            _wait_for(trainer.device)
            if first:
                contestant.seconds.append(time.perf_counter() - began)
            contestant.losses += [float(loss) for loss in losses]
        first += count


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _result(contestant: Contestant, theirs: Contestant, tokens: int, steps: int) -> dict[str, Any]:
    seconds = statistics.median(contestant.seconds) / steps
    # of neighbours in time, so that what else the machine does falls on both
    ratios = [other / own for own, other in zip(contestant.seconds, theirs.seconds, strict=True)]
    return {
        "name": contestant.name,
        "tokens_per_second": tokens / seconds,
        "step_ms": 1000 * seconds,
        "ratio": statistics.median(ratios),
        "seconds": contestant.seconds,
        "losses": contestant.losses,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
