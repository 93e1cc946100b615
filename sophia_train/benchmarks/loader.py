"""What reading tokens costs of a step: a trainer with its loader, next to a batch that is there already."""

import argparse
import itertools
from typing import Any

from rich.table import Table

from sophia_train.benchmarks.turns import (
    Contestant,
    conditions,
    on_device,
    provenance,
    run_of,
    settings_of,
    take_turns,
    trainers_of,
)
from sophia_train.config import RunConfig, build
from sophia_train.data.base import Data
from sophia_train.distributed import start
from sophia_train.errors import ConfigError

LOADER, CONSTANT = "loader", "constant batch"
# The same work whatever is in a batch: the model stays as it is, and no step is clipped.
EQUAL_WORK = ["optimizer=adamw", "optimizer.lr=0", "gradient_clip=null"]


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Run one trainer by turns on its loader's batches and on a constant one; return what was measured.

    Both do the work of AdamW's step on the same model, which stays as it is by a learning rate of 0: the
    times differ by what the loader takes. It reads token files on the disk.

    Raises:
        ConfigError: an option does not fit the model or the others, or the memory is too small.
        RunError: the data cannot be had.
    """
    config = run_of(options, *EQUAL_WORK, *options.data.split())
    data = _data_of(config) if options.data else None
    accelerator = start(options.precision, 1)
    with trainers_of({LOADER: config}, accelerator, data) as trainers:
        trainer = trainers[LOADER]
        steps, constant = itertools.count(), on_device(trainer, 0)
        contestants = [
            Contestant(name, step, trainer.unwrapped, trainer.optimizer)
            for name, step in (
                (LOADER, lambda _: trainer.train_step(trainer.loader.batch(next(steps))).loss),
                (CONSTANT, lambda _: trainer.train_step(constant).loss),
            )
        ]
        take_turns(contestants, trainer, options.steps, options.repeats)
        settings = settings_of(options, config, trainer)
    fed, fixed = contestants
    return {
        "benchmark": "loader",
        "settings": {**settings, "data": options.data or "random words"},
        "environment": provenance(accelerator.device),
        "loader_share": 1 - 1 / fixed.times_faster_than(fed),
        "results": [
            {
                "name": each.name,
                "step_ms": each.step_ms(options.steps),
                "seconds": each.seconds,
                "losses": each.losses,
            }
            for each in contestants
        ],
    }


def table(report: dict[str, Any]) -> Table:
    """Lay out the figures in at most 80 columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("")
    made.add_column("ms a step", justify="right")
    for row in report["results"]:
        made.add_row(row["name"], f"{row['step_ms']:,.2f}")
    made.add_row("loader's share", f"{report['loader_share']:.2%}")
    return made


def notes(report: dict[str, Any]) -> str:
    """Say under what conditions the figures were measured."""
    settings, env = report["settings"], report["environment"]
    return "\n".join(
        [
            f"share: of a step's time, median of {settings['repeats']} repeats of "
            f"{settings['steps']} steps in turns",
            f"data: {settings['data']}",
            *conditions(report),
            f"versions: Python {env['python']}, torch {env['torch']}",
        ]
    )


def _data_of(config: RunConfig) -> Data:
    data: Data = build(config.data)
    words = data.load_tokenizer().vocab_size
    if words > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {words} words of "
            f"data.tokenizer={data.tokenizer}; use another --model or data"
        )
    data.prepare()
    return data
