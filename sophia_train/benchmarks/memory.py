"""The peak memory of training steps on a GPU, each model and run in a process of its own.

`python -m sophia_train.benchmarks.memory MODEL [OVERRIDE] ...` is such a process; it prints JSON.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table

from sophia_train.benchmarks.turns import SEED, gigabytes, on_device, provenance, trainers_of
from sophia_train.config import RunConfig, compose, run_config
from sophia_train.distributed import start
from sophia_train.errors import RunError, UnavailableError, exit_code_of

MODELS = ["gpt2_125m", "gpt2_355m", "gpt2_770m", "gpt2_1_5b"]
RUNS = ["optimizer=adamw", "optimizer=sophia_g"]
STEPS = 2  # the second one has all of the optimizer's state


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each of `options.models` with each of `options.runs`, overrides of a run.

    Each has a process of its own: what one leaves of the GPU's memory, and how cut up, is nothing to others.

    Raises:
        ConfigError: a model or an override is wrong.
        UnavailableError: there is no GPU.
        RunError: a process failed for another reason than memory.
    """
    overrides = {
        (model, run): _overrides(run, options.micro_batch_size)
        for model in options.models
        for run in options.runs
    }
    for (model, _), each in overrides.items():
        config_of(model, each)
    if not torch.cuda.is_available():
        raise UnavailableError(
            "it is a GPU's memory that is measured, and there is none here; use a machine with a GPU"
        )
    results = [
        {"model": model, "run": run, **in_process_of_its_own(model, each)}
        for (model, run), each in overrides.items()
    ]
    return {
        "benchmark": "memory",
        "settings": {
            "models": options.models,
            "runs": options.runs,
            "micro_batch_size": options.micro_batch_size,
            "steps": STEPS,
            "seed": SEED,
        },
        "environment": {
            **provenance(torch.device("cuda")),
            "device_bytes": torch.cuda.get_device_properties(0).total_memory,
        },
        "results": results,
    }


def table(report: dict[str, Any]) -> Table:
    """Lay out the figures in at most 80 columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("")
    made.add_column("")
    for heading in ("a pass", "peak GB", "reserved GB"):
        made.add_column(heading, justify="right")
    for row in report["results"]:
        run = row["run"].replace("optimizer=", "").replace("hessian=", "").replace("hessian.", "")
        size = row["micro_batch_size"]
        figures = ["out of memory", ""]
        if not row["out_of_memory"]:
            figures = [gigabytes(row["peak_gb"]), gigabytes(row["reserved_gb"])]
        made.add_row(row["model"], run, "-" if size is None else str(size), *figures)
    return made


def notes(report: dict[str, Any]) -> str:
    """Say under what conditions the figures were measured."""
    env = report["environment"]
    return "\n".join(
        [
            f"peak: the most that tensors had in {STEPS} steps; the Hessian is refreshed in each",
            "reserved: the most that was taken for them; the CUDA context comes to that",
            "a pass: sequences; a step has several, as in training",
            f"device: {env['device']}, {env['device_bytes'] / 1e9:.1f} GB",
            f"versions: Python {env['python']}, torch {env['torch']}",
        ]
    )


def config_of(model: str, overrides: Sequence[str]) -> RunConfig:
    """Settings of a run of two steps, with a refresh of the Hessian in both if it has any.

    Raises:
        ConfigError: a setting is wrong.
    """
    settings = [
        f"model={model}",
        "schedule=constant",
        "schedule.warmup_steps=0",
        f"max_steps={STEPS}",
        f"seed={SEED}",
        *overrides,
    ]
    config = run_config(compose(settings))
    if "interval" not in config.hessian:
        return config
    return run_config(compose([*settings, "hessian.interval=1"]))


def in_process_of_its_own(model: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return what `measure` returns in a new process.

    Raises:
        RunError: it failed; what it had to say is on stderr.
    """
    command = [sys.executable, "-m", "sophia_train.benchmarks.memory", model, *overrides]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # stderr is seen
    if process.returncode:
        run = " ".join([model, *overrides])
        raise RunError(f"{run}: its process ended with code {process.returncode}; see what it wrote above")
    measured: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return measured


def measure(config: RunConfig) -> dict[str, Any]:
    """Train some steps on random words, and return what memory that took.

    Returns:
        `out_of_memory`; `micro_batch_size`, None if it came to no step; `losses` of the steps; `peak_gb` and
        `reserved_gb` of this process's tensors, None on a CPU.
    """
    accelerator = start(config.precision, 1)
    size: int | None = None
    losses: list[float] = []

    def work() -> None:
        nonlocal size
        with trainers_of({"run": config}, accelerator) as trainers:
            trainer = trainers["run"]
            size = trainer.replica.micro_batch_size
            for step in range(STEPS):
                losses.append(trainer.train_step(on_device(trainer, step)).loss)

    out_of_memory = runs_out_of_memory(work)
    on_gpu = accelerator.device.type == "cuda"
    return {
        "out_of_memory": out_of_memory,
        "micro_batch_size": size,
        "losses": losses,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if on_gpu else None,
    }


def runs_out_of_memory(work: Callable[[], None]) -> bool:
    """Do `work`, and say whether the GPU's memory was too small; every other error passes."""
    try:
        work()
    except Exception as error:
        reason: BaseException | None = error
        while reason is not None:  # a compiler, for one, puts errors of its own around it
            if isinstance(reason, torch.OutOfMemoryError):
                return True
            reason = reason.__cause__ or reason.__context__
        raise
    return False


def main(arguments: Sequence[str]) -> int:
    """Measure the model and the overrides that the arguments are, and print JSON; returns the exit code."""

    def work() -> None:
        model, *overrides = arguments
        print(json.dumps(measure(config_of(model, overrides))))

    return exit_code_of(work)


def _overrides(run: str, micro_batch_size: int | None) -> list[str]:
    if micro_batch_size is None:
        return run.split()
    # two passes: in the second, the gradient of the first is there already
    return [f"micro_batch_size={micro_batch_size}", f"batch_size={2 * micro_batch_size}", *run.split()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
