"""What each optimizer adds to AdamW's step and memory in the same trainer, its Hessian's passes included."""

import argparse
from typing import Any

from rich.table import Table

from sophia_train.benchmarks.turns import (
    conditions,
    gigabytes,
    of_trainer,
    provenance,
    run_of,
    settings_of,
    take_turns,
    trainers_of,
)
from sophia_train.distributed import start
from sophia_train.trainer import Trainer

YARDSTICK = "optimizer=adamw"
RUNS = ["optimizer=sophia_g", "optimizer=sophia_h", "optimizer=sophia_empirical_fisher"]


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Run AdamW and each of `options.runs`, overrides of a run, in turns; return what was measured.

    All start from the same weights and see the same batches of random words. Every repeat has as many
    refreshes as it should, so that its mean step is the average over steps with and without one.

    Raises:
        ConfigError: an option does not fit the model or the others, or the memory is too small.
    """
    configs = {run: run_of(options, *run.split()) for run in [YARDSTICK, *options.runs]}
    accelerator = start(options.precision, 1)
    with trainers_of(configs, accelerator) as trainers:
        contestants = [of_trainer(run, trainer) for run, trainer in trainers.items()]
        yardstick = contestants[0]
        take_turns(contestants, trainers[YARDSTICK], options.steps, options.repeats)
    return {
        "benchmark": "hessian",
        "settings": settings_of(options, configs[YARDSTICK], trainers[YARDSTICK]),
        "environment": provenance(accelerator.device),
        "results": [
            {
                "name": each.name,
                "step_ms": each.step_ms(options.steps),
                "overhead": 1 / each.times_faster_than(yardstick) - 1,
                "hessian_flops_share": _flops_share(trainers[each.name], options.steps),
                "peak_gb": each.peak_gb,
                "seconds": each.seconds,
            }
            for each in contestants
        ],
    }


def table(report: dict[str, Any]) -> Table:
    """Lay out the figures in at most 80 columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("")
    for heading in ("ms a step", "over AdamW", "of FLOPs", "peak GB"):
        made.add_column(heading, justify="right")
    for row in report["results"]:
        name = row["name"].replace("optimizer=", "").replace("hessian=", "").replace("hessian.", "")
        made.add_row(
            name,
            f"{row['step_ms']:,.1f}",
            f"{row['overhead']:+.1%}",
            f"{row['hessian_flops_share']:.1%}",
            gigabytes(row["peak_gb"]),
        )
    return made


def notes(report: dict[str, Any]) -> str:
    """Say under what conditions the figures were measured."""
    settings, env = report["settings"], report["environment"]
    return "\n".join(
        [
            f"over AdamW: time of a step, median of {settings['repeats']} repeats of "
            f"{settings['steps']} steps in turns",
            "of FLOPs: the Hessian's passes, of all",
            *conditions(report),
            f"versions: Python {env['python']}, torch {env['torch']}",
        ]
    )


def _flops_share(trainer: Trainer, steps: int) -> float:
    """FLOPs of the Hessian's passes over all FLOPs, in a stretch of steps with as many refreshes as due."""
    hessian = sum(trainer.hessian.pass_sequences(step) for step in range(1, steps + 1))
    return hessian / (hessian + steps * trainer.config.batch_size)
