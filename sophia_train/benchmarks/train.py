"""Our training step with AdamW and with Sophia-G, next to transformers' GPT-2 in a plain PyTorch loop."""

import argparse
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from sophia_train.benchmarks.turns import (
    Contestant,
    conditions,
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


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Run the contestants in turns, and return what was measured.

    All start from the same weights and see the same batches of random words, with biases, as transformers'
    GPT-2 has them. The first two repeat each other's arithmetic, so their losses must agree.

    Raises:
        ConfigError: an option does not fit the model or the others, or the memory is too small.
        UnavailableError: transformers is not installed.
    """
    transformers = _transformers()
    configs = {
        name: run_of(options, "model.bias=true", f"optimizer={optimizer}")
        for name, optimizer in ((OURS, "adamw"), (SOPHIA, "sophia_g"))
    }
    accelerator = start(options.precision, 1)
    with trainers_of(configs, accelerator) as trainers:
        contestants = [
            Contestant(OURS, lambda batch: trainers[OURS].train_step(batch).loss),
            Contestant(THEIRS, _plain_loop(transformers, configs[OURS], trainers[OURS])),
            Contestant(SOPHIA, lambda batch: trainers[SOPHIA].train_step(batch).loss),
        ]
        take_turns(contestants, trainers[OURS], options.steps, options.repeats)
    tokens = options.batch_size * configs[OURS].model.block_size
    ours, theirs, _ = contestants
    return {
        "benchmark": "train",
        "settings": settings_of(options, configs[OURS], trainers[OURS]),
        "environment": provenance(accelerator.device, transformers=transformers.__version__),
        "results": [
            {
                "name": each.name,
                "tokens_per_second": 1000 * tokens / each.step_ms(options.steps),
                "step_ms": each.step_ms(options.steps),
                "ratio": each.times_faster_than(theirs),
                "seconds": each.seconds,
                "losses": each.losses,
            }
            for each in contestants
        ],
        "largest_loss_difference": max(
            abs(own - other) for own, other in zip(ours.losses, theirs.losses, strict=True)
        ),
    }


def table(report: dict[str, Any]) -> Table:
    """Lay out the figures in at most 80 columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("")
    for heading in ("tokens/s", "ms a step", "ratio", "loss"):
        made.add_column(heading, justify="right")
    for row in report["results"]:
        made.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_ms']:,.1f}",
            f"{row['ratio']:.2f}",
            f"{row['losses'][-1]:.5f}",
        )
    return made


def notes(report: dict[str, Any]) -> str:
    """Say under what conditions the figures were measured."""
    settings, env = report["settings"], report["environment"]
    steps = len(report["results"][0]["losses"])
    return "\n".join(
        [
            f"ratio: tokens/s over transformers', median of {settings['repeats']} repeats in turns",
            f"loss: after {steps} steps; ours and theirs with AdamW differ by at most "
            f"{report['largest_loss_difference']:.1e}",
            *conditions(report),
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
