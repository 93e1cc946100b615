"""Training on several processes, next to one: speed, what Sophia adds to it, memory and losses."""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table

from sophia_train import distributed
from sophia_train.assembly import GRADIENT_TYPES
from sophia_train.benchmarks.turns import (
    WARMUP_STEPS,
    conditions,
    gigabytes,
    provenance,
    run_of,
    settings_of,
    take_turns,
    trainers_of,
)
from sophia_train.benchmarks.turns import of_trainer as contestant_of
from sophia_train.collectives import gather, rank
from sophia_train.data.base import Data
from sophia_train.errors import RunError, exit_code_of
from sophia_train.run_config import RunConfig, build, from_json, to_json, with_processes

RUNS = ["optimizer=adamw", "optimizer=sophia_g"]
PROCESSES = [1, 2]


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each of `options.runs` on each number of processes, each time in processes of their own.

    All train the same model on the same global batches of real text, from the same weights, while the
    learning rate rises to its peak: at its peak from the start, rounding would grow until losses say nothing.
    They are compared with those of the first run that has the same optimizer: of another that differs in
    micro_batch_size alone, that shows what rounding does on one process.

    Raises:
        ConfigError: an option does not fit the model or the others.
        RunError: processes failed; what they had to say is on stderr.
    """
    configs = {}
    for run, processes in itertools.product(options.runs, options.processes):
        share = [f"parallel={options.parallel if processes > 1 else 'ddp'}"]
        share.append(f"schedule.warmup_steps={WARMUP_STEPS + options.steps * options.repeats - 1}")
        configs[run, processes] = with_processes(
            run_of(options, "data=python_stdlib", *share, *run.split()), processes
        )
    results = []
    for (run, processes), config in configs.items():
        parallel = config.parallel if processes > 1 else None
        measured = _launched(config, processes, options)
        results.append({"run": run, "processes": processes, "parallel": parallel, **measured})
    for row, config in zip(results, configs.values(), strict=True):
        alone = next((each for each in results if each["run"] == row["run"] and each["processes"] == 1), None)
        rule = (config.optimizer, config.hessian, config.gamma)
        peers = (
            each
            for each, other in zip(results, configs.values(), strict=True)
            if each["processes"] == 1 and (other.optimizer, other.hessian, other.gamma) == rule
        )
        reference = next(peers, None)
        first = next(each for each in results if each["processes"] == row["processes"])
        row["speed_up"] = alone and row["tokens_per_second"] / alone["tokens_per_second"]
        row["overhead"] = first["tokens_per_second"] / row["tokens_per_second"] - 1
        row["loss_difference"] = reference and max(
            abs(ours - theirs) for ours, theirs in zip(row["losses"], reference["losses"], strict=True)
        )
    return {
        "benchmark": "scaling",
        "settings": {**results[0].pop("settings"), "processes": options.processes, "runs": options.runs},
        "environment": results[0].pop("environment"),
        "results": [
            {k: v for k, v in row.items() if k not in ("settings", "environment")} for row in results
        ],
    }


def table(report: dict[str, Any]) -> Table:
    """Lay out the figures in at most 80 columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "processes"):
        made.add_column(heading)
    for heading in ("tokens/s", "times 1", "over first", "loss diff.", "peak GB"):
        made.add_column(heading, justify="right")
    for row in report["results"]:
        made.add_row(
            row["run"].replace("optimizer=", "").replace("micro_batch_size=", "passes of "),
            " ".join([str(row["processes"]), row["parallel"] or ""]),
            f"{row['tokens_per_second']:,.0f}",
            "-" if row["speed_up"] is None else f"{row['speed_up']:.2f}",
            f"{row['overhead']:+.1%}",
            "-" if row["loss_difference"] is None else f"{row['loss_difference']:.1e}",
            gigabytes(row["peak_gb"]),
        )
    return made


def notes(report: dict[str, Any]) -> str:
    """Say under what conditions the figures were measured."""
    settings, env = report["settings"], report["environment"]
    steps = len(report["results"][0]["losses"])
    return "\n".join(
        [
            f"tokens/s: of all processes, median of {settings['repeats']} repeats of "
            f"{settings['steps']} steps",
            "over first: time beyond that of the first run, on as many processes",
            f"loss diff.: the largest in {steps} steps to the optimizer's first run, on one process",
            f"last loss of the first run: {report['results'][0]['losses'][-1]:.4f}",
            "peak GB: of the process that takes most",
            *conditions(report),
            f"versions: Python {env['python']}, torch {env['torch']}",
        ]
    )


def _launched(config: RunConfig, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what `measure` returns on so many processes.

    Raises:
        RunError: they failed.
    """
    with TemporaryDirectory() as folder:
        task, answer = Path(folder) / "task.json", Path(folder) / "answer.json"
        settings = {key: value for key, value in vars(options).items() if isinstance(value, int | str | bool)}
        task.write_text(json.dumps({"config": to_json(config), "options": settings}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "-m", "sophia_train.benchmarks.scaling"]
        done = subprocess.run([*command, str(task), str(answer)])
        if done.returncode:
            raise RunError(
                f"{processes} processes of {config.optimizer['_target_']} ended with code {done.returncode}; "
                "see what they wrote above"
            )
        measured: dict[str, Any] = json.loads(answer.read_text())
        return measured


def measure(config: RunConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Train on the processes that there are, and return what that took, the same on each."""
    assert config.processes is not None
    gradient_type = GRADIENT_TYPES[config.gradient_type]
    accelerator = distributed.start(config.precision, config.processes, gradient_type)
    data: Data = build(config.data)
    distributed.main_process_first(accelerator, data.prepare)
    with trainers_of({"run": config}, accelerator, data) as trainers:
        trainer = trainers["run"]
        contestant = contestant_of("run", trainer)
        mine = argparse.Namespace(**options)
        take_turns([contestant], trainer, mine.steps, mine.repeats)
        seconds = statistics.median(contestant.seconds)
        tokens = mine.steps * config.batch_size * config.model.block_size
        peaks = [peak for peak in gather(contestant.peak_gb) if peak is not None]
        return {
            "tokens_per_second": tokens / seconds,
            "seconds": contestant.seconds,
            "losses": contestant.losses,
            "peak_gb": max(peaks, default=None),
            "settings": settings_of(mine, config, trainer),
            "environment": {**provenance(accelerator.device), "processes": config.processes},
        }


def main(arguments: Sequence[str]) -> int:
    """Do the task in a file, and write the answer to another; returns the exit code."""

    def work() -> None:
        task, answer = map(Path, arguments)
        content = json.loads(task.read_text())
        measured = measure(from_json(content["config"]), content["options"])
        if rank() == 0:
            answer.write_text(json.dumps(measured))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    return exit_code_of(work)


if __name__ == "__main__":
    distributed.end_process(main(sys.argv[1:]))
