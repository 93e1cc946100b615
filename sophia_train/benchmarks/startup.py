"""How long a run takes from its command to its first step, with an empty compile cache and a filled one."""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.table import Table

from sophia_train.benchmarks.turns import SEED, provenance
from sophia_train.config import RunConfig, compose, run_config
from sophia_train.errors import RunError
from sophia_train.trackers.jsonl import FILE_NAME

RUNS = ["compile=true", "compile=blocks"]
LOOK = 0.02  # seconds between two looks at what a run has written


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Start each of `options.runs` twice or more, all with the compile cache of its own first start.

    Each start is a whole `python -m sophia_train`, ended once its first step is in its metrics: imports,
    data, model, the validation before the first step, compilation, and that step.

    Raises:
        ConfigError: an override is wrong.
        RunError: a run ended before its first step.
    """
    size = "null" if options.micro_batch_size is None else options.micro_batch_size
    with TemporaryDirectory() as place:
        folder = Path(place)
        arguments = [
            "data=token_files",
            f"data.path={folder}",
            "data.tokenizer=bytes",
            f"model={options.model}",
            f"batch_size={options.batch_size}",
            f"micro_batch_size={size}",
            "max_steps=1000",
            "schedule.warmup_steps=100",
            "log_interval=1",
            "tracker=jsonl",
            f"seed={SEED}",
        ]
        configs = [run_config(compose([*arguments, *run.split()])) for run in options.runs]
        _write_words(configs[0], folder)
        results = []
        for number, run in enumerate(options.runs):
            cache = f"compile_cache={folder / f'cache_{number}'}"
            cold, *warm = (
                seconds_to_first_step([*arguments, *run.split(), cache], folder / f"run_{number}_{start}")
                for start in range(1 + options.repeats)
            )
            results.append({"run": run, "cold_seconds": cold, "warm_seconds": warm})
    return {
        "benchmark": "startup",
        "settings": {
            "model": options.model,
            "batch_size": options.batch_size,
            "micro_batch_size": options.micro_batch_size,
            "runs": options.runs,
            "repeats": options.repeats,
            "seed": SEED,
        },
        "environment": provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "results": results,
    }


def table(report: dict[str, Any]) -> Table:
    """Lay out the figures in at most 80 columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("")
    for heading in ("cold, s", "warm, s", "all warm ones"):
        made.add_column(heading, justify="right")
    for row in report["results"]:
        warm = row["warm_seconds"]
        each = " ".join(f"{seconds:.1f}" for seconds in warm)
        made.add_row(row["run"], f"{row['cold_seconds']:.1f}", f"{statistics.median(warm):.1f}", each)
    return made


def notes(report: dict[str, Any]) -> str:
    """Say under what conditions the figures were measured."""
    settings, env = report["settings"], report["environment"]
    size = settings["micro_batch_size"]
    passes = "as in training" if size is None else str(size)
    return "\n".join(
        [
            "from the command to the first step in metrics.jsonl; imported modules have been read before",
            "cold: with an empty compile_cache; warm: median of later starts, with what the first left there",
            f"model: {settings['model']}, batch: {settings['batch_size']} sequences, a pass: {passes}",
            f"device: {env['device']}, {env['threads']} threads",
            f"versions: Python {env['python']}, torch {env['torch']}",
        ]
    )


def seconds_to_first_step(arguments: list[str], run_dir: Path) -> float:
    """Start a run, wait for its first step, and kill it.

    Raises:
        RunError: it ended before; with the last line of what it had to say.
    """
    command = [sys.executable, "-m", "sophia_train", *arguments, f"run_dir={run_dir}"]
    metrics, output = run_dir / FILE_NAME, run_dir.with_suffix(".txt")
    with output.open("wb") as file:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            while _lines(metrics) < 2:  # the first is that of step 0, the validation's
                if process.poll() is not None:
                    said = output.read_text().splitlines() or [f"code {process.returncode}"]
                    raise RunError(f"{' '.join(command[1:])}: ended before its first step: {said[-1]}")
                time.sleep(LOOK)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _write_words(config: RunConfig, folder: Path) -> None:
    """Write random bytes as token files: those of the first steps, and a pass to validate on."""
    generator, block_size = np.random.default_rng(SEED), config.model.block_size
    sequences = {"train": 2 * config.batch_size, "val": 1}
    for split, count in sequences.items():
        words = generator.integers(256, size=count * block_size + 1, dtype="<u2")
        words.tofile(folder / f"{split}.bin")
