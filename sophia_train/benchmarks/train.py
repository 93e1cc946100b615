"""Our training step with AdamW and with Sophia-G, next to transformers' GPT-2 or nanoGPT in a plain loop."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sophia_train.benchmarks import checkouts, nanogpt
from sophia_train.benchmarks.turns import (
    Contestant,
    conditions,
    gigabytes,
    of_trainer,
    provenance,
    run_of,
    settings_of,
    take_turns,
    trainers_of,
)
from sophia_train.config import RunConfig, build
from sophia_train.data.batches import Batch
from sophia_train.distributed import start
from sophia_train.errors import UnavailableError
from sophia_train.gradients import micro_batches
from sophia_train.models import convert
from sophia_train.optim.groups import decay_groups
from sophia_train.trainer import Trainer

OURS, SOPHIA, THEIRS = "sophia_train, AdamW", "sophia_train, Sophia-G", "transformers, AdamW"
Peer = tuple[nn.Module, Optimizer, Callable[[nn.Module, Tensor, Tensor], Tensor]]


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Run the contestants in turns, and return what was measured.

    All start from the same weights and see the same batches of random words: with biases, as transformers'
    GPT-2 has them, or without next to nanoGPT, whose checkout `options.nanogpt` is. Ours with AdamW and
    theirs repeat each other's arithmetic, but that nanoGPT has the exact GELU and ours its approximation by
    tanh, which is OpenAI's: so their losses must agree.

    Raises:
        ConfigError: an option does not fit the model or the others, or the memory is too small.
        MissingInputError: the checkout has no model.
        UnavailableError: transformers is not installed.
    """
    if options.nanogpt is None:
        theirs, module = THEIRS, _transformers()
        model, adamw, versions = ["model.bias=true"], [], {"transformers": module.__version__}
    else:
        theirs, module = nanogpt.NAME, nanogpt.load(options.nanogpt)
        model, adamw = nanogpt.OVERRIDES, nanogpt.ADAMW_OVERRIDES
        versions = {"nanoGPT": f"model.py {checkouts.digest(options.nanogpt / 'model.py')}"}
    configs = {
        OURS: run_of(options, *model, "optimizer=adamw", *adamw),
        SOPHIA: run_of(options, *model, "optimizer=sophia_g"),
    }
    accelerator = start(options.precision, 1)
    with trainers_of(configs, accelerator) as trainers, _products(options):
        build_peer = _transformers_peer if options.nanogpt is None else _nanogpt_peer
        peer = build_peer(module, configs[OURS], trainers[OURS])
        contestants = [
            of_trainer(OURS, trainers[OURS]),
            _plain_loop(theirs, *peer, configs[OURS], trainers[OURS]),
            of_trainer(SOPHIA, trainers[SOPHIA]),
        ]
        take_turns(contestants, trainers[OURS], options.steps, options.repeats)
    tokens = options.batch_size * configs[OURS].model.block_size
    ours, yardstick, _ = contestants
    return {
        "benchmark": "train",
        "settings": settings_of(options, configs[OURS], trainers[OURS]),
        "environment": provenance(accelerator.device, **versions),
        "yardstick": theirs,
        "results": [
            {
                "name": each.name,
                "tokens_per_second": 1000 * tokens / each.step_ms(options.steps),
                "step_ms": each.step_ms(options.steps),
                "ratio": each.times_faster_than(yardstick),
                "peak_gb": each.peak_gb,
                "seconds": each.seconds,
                "losses": each.losses,
            }
            for each in contestants
        ],
        "largest_loss_difference": max(
            abs(own - other) for own, other in zip(ours.losses, yardstick.losses, strict=True)
        ),
    }


def table(report: dict[str, Any]) -> Table:
    """Lay out the figures in at most 80 columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("")
    for heading in ("tokens/s", "ms a step", "ratio", "loss", "peak GB"):
        made.add_column(heading, justify="right")
    for row in report["results"]:
        made.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_ms']:,.1f}",
            f"{row['ratio']:.2f}",
            f"{row['losses'][-1]:.5f}",
            gigabytes(row["peak_gb"]),
        )
    return made


def notes(report: dict[str, Any]) -> str:
    """Say under what conditions the figures were measured."""
    settings, env = report["settings"], report["environment"]
    steps = len(report["results"][0]["losses"])
    peer = report["yardstick"].partition(",")[0]
    return "\n".join(
        [
            f"ratio: tokens/s over those of {peer}, median of {settings['repeats']} repeats in turns",
            f"loss: after {steps} steps; ours and theirs with AdamW differ by at most "
            f"{report['largest_loss_difference']:.1e}",
            "peak: weights, optimizer state, and the most that a step has beside them",
            *conditions(report),
            *["blocks: ours; theirs is compiled whole"] * (report["settings"]["compile"] == "blocks"),
            f"versions: Python {env['python']}, torch {env['torch']}, {peer} {env[peer]}",
        ]
    )


@contextlib.contextmanager
def _products(options: argparse.Namespace) -> Iterator[None]:
    """Let float32 products be TF32 for all contestants, where nanoGPT, one of them, is trained that way."""
    before = torch.get_float32_matmul_precision()
    if options.nanogpt is not None and torch.cuda.is_available():  # a CPU may take it for a wish for bf16
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _transformers() -> ModuleType:
    # those that were built for another torch would keep transformers from importing, or make it complain
    for package in ("torchvision", "torchao"):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    try:
        import transformers
    except ImportError:
        raise UnavailableError("transformers is not installed; pip install 'sophia_train[hf]'") from None
    return transformers


def _transformers_peer(transformers: ModuleType, config: RunConfig, trainer: Trainer) -> Peer:
    """Build transformers' GPT-2 with our weights, our AdamW for it, and its loss."""
    settings = transformers.GPT2Config(
        **convert.hf_config(config.model), attn_implementation="sdpa", use_cache=False
    )
    with trainer.device:
        model = transformers.GPT2LMHeadModel(settings)
    model.load_state_dict(convert.to_hf_state(trainer.unwrapped, config.model), strict=False)  # tied head
    model.tie_weights()

    def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).logits.flatten(0, 1).float(), targets.flatten())

    return model, build(config.optimizer, decay_groups(model)), loss_of


def _nanogpt_peer(module: ModuleType, config: RunConfig, trainer: Trainer) -> Peer:
    model = nanogpt.model_of(module, config, trainer)
    optimizer = nanogpt.optimizer_of(model, config.optimizer, trainer.device.type)
    return model, optimizer, nanogpt.loss_of


def _plain_loop(
    name: str,
    model: nn.Module,
    optimizer: Optimizer,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
    config: RunConfig,
    trainer: Trainer,
) -> Contestant:
    """Return another's model in a loop as many write it, with the settings of a trainer of ours."""
    model.train()
    if config.compile:
        model.compile()
    bf16 = config.precision == "bf16"

    def step(batch: Batch) -> Tensor:
        parts = micro_batches(batch.inputs, batch.targets, trainer.replica.micro_batch_size)
        total = torch.zeros((), device=trainer.device)
        for inputs, targets in parts:
            with torch.autocast(trainer.device.type, torch.bfloat16, enabled=bf16):
                loss = loss_of(model, inputs, targets) / len(parts)
            loss.backward()
            total += loss.detach()
        if config.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return Contestant(name, step, model, optimizer)
