"""Measure this project's speed and memory beside a yardstick, taking turns.

    python scripts/benchmark.py train [--nanogpt CHECKOUT] [--model NAME] [--batch-size N] [--steps N] ...
    python scripts/benchmark.py optimizer [--models NAME ...] [--official CHECKOUT] [--compile] ...
    python scripts/benchmark.py hessian [--runs "optimizer=sophia_g hessian.groups=8" ...] ...
    python scripts/benchmark.py memory [--models NAME ...] [--runs "optimizer=adamw" ...] ...
    python scripts/benchmark.py loader [--data "data=token_files data.path=FOLDER"] [--model NAME] ...
    python scripts/benchmark.py scaling [--processes 1 2 ...] [--parallel fsdp] [--model NAME] ...
    python scripts/benchmark.py startup [--runs "compile=blocks" ...] [--model NAME] [--repeats N] ...
    python scripts/benchmark.py data PATH [--workers N] [--repeats N]

Each says with --help what it takes, and writes JSON with --json FILE, too.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from rich.console import Console

from sophia_train import durable
from sophia_train.benchmarks import data, hessian, loader, memory, optimizer, scaling, startup, train
from sophia_train.command_line import Parser, whole_number
from sophia_train.errors import exit_code_of

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

JSON_HELP = "write the figures there, too"


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(metavar="command", dest="command", required=True)
    step_by_step = {"train": train, "hessian": hessian, "loader": loader, "scaling": scaling}
    for name, module in step_by_step.items():
        command = commands.add_parser(name, help=str(module.__doc__))
        command.set_defaults(benchmark=module)
        _add_options(command)
        if module is train:
            command.add_argument(
                "--nanogpt", type=Path, metavar="CHECKOUT", help="of karpathy/nanoGPT (transformers instead)"
            )
        if module in (hessian, scaling):
            add = command.add_argument
            add("--runs", nargs="+", default=module.RUNS, metavar="OVERRIDES", help="(%(default)s)")
        if module is scaling:
            add("--processes", nargs="+", type=whole_number, default=scaling.PROCESSES, metavar="N")
            add("--parallel", choices=["ddp", "fsdp", "hsdp"], default="ddp", help="(%(default)s)")
        if module is loader:
            command.add_argument(
                "--data", default="", metavar="OVERRIDES", help="whose tokens to read (random words)"
            )
    _add_optimizer(commands)
    _add_memory(commands)
    _add_startup(commands)
    _add_data(commands)
    options = parser.parse_args(arguments)
    report = options.benchmark.report(options)
    Console(highlight=False, width=80).print(options.benchmark.table(report))
    Console(highlight=False, soft_wrap=True).print(options.benchmark.notes(report), markup=False)
    if options.json is not None:
        durable.write_json(options.json, report)


def _add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", default="gpt2_nano", metavar="NAME", help="of configs/model (%(default)s)")
    add("--batch-size", type=whole_number, default=32, metavar="N", help="sequences (%(default)s)")
    add("--micro-batch-size", type=whole_number, metavar="N", help="sequences of a pass (as in training)")
    add("--steps", type=whole_number, default=10, metavar="N", help="of one repeat (%(default)s)")
    add("--repeats", type=whole_number, default=5, metavar="N", help="timed (%(default)s)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="(%(default)s)")
    add(
        "--compile",
        choices=["false", "true", "blocks"],
        nargs="?",
        const="true",
        default="false",
        help="the models, or each block by itself (%(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help=JSON_HELP)


def _add_optimizer(commands: Commands) -> None:
    command = commands.add_parser("optimizer", help=str(optimizer.__doc__))
    command.set_defaults(benchmark=optimizer)
    add = command.add_argument
    add("--models", nargs="+", default=optimizer.MODELS, metavar="NAME", help=_models(optimizer.MODELS))
    add("--official", type=Path, metavar="CHECKOUT", help="of Liuhong99/Sophia, to be measured, too")
    add("--repeats", type=whole_number, default=20, metavar="N", help="calls timed (%(default)s)")
    add("--compile", action="store_true", help="a compiled rule, too, as always on a GPU")
    add("--json", type=Path, metavar="FILE", help=JSON_HELP)


def _models(default: Sequence[str]) -> str:
    return f"of configs/model ({' '.join(default)})"


def _add_memory(commands: Commands) -> None:
    command = commands.add_parser("memory", help=str(memory.__doc__).partition("\n")[0])
    command.set_defaults(benchmark=memory)
    add = command.add_argument
    add("--models", nargs="+", default=memory.MODELS, metavar="NAME", help=_models(memory.MODELS))
    add("--runs", nargs="+", default=memory.RUNS, metavar="OVERRIDES", help="of a run (%(default)s)")
    add(
        "--micro-batch-size",
        type=whole_number,
        metavar="N",
        help="sequences of a pass, of which a step has two (as in training with 480 a step)",
    )
    add("--json", type=Path, metavar="FILE", help=JSON_HELP)


def _add_startup(commands: Commands) -> None:
    command = commands.add_parser("startup", help=str(startup.__doc__))
    command.set_defaults(benchmark=startup)
    add = command.add_argument
    add("--model", default="gpt2_nano", metavar="NAME", help="of configs/model (%(default)s)")
    add("--batch-size", type=whole_number, default=32, metavar="N", help="sequences (%(default)s)")
    add("--micro-batch-size", type=whole_number, metavar="N", help="sequences of a pass (as in training)")
    add("--runs", nargs="+", default=startup.RUNS, metavar="OVERRIDES", help="of a run (%(default)s)")
    add("--repeats", type=whole_number, default=1, metavar="N", help="warm starts (%(default)s)")
    add("--json", type=Path, metavar="FILE", help=JSON_HELP)


def _add_data(commands: Commands) -> None:
    command = commands.add_parser("data", help=str(data.__doc__))
    command.set_defaults(benchmark=data)
    add = command.add_argument
    add("path", help="text as of data.path")
    add("--workers", type=whole_number, default=1, metavar="N", help="(%(default)s)")
    add("--repeats", type=whole_number, default=3, metavar="N", help="timed (%(default)s)")
    add("--scratch", type=Path, metavar="FOLDER", help="where to write (the system's)")
    add("--json", type=Path, metavar="FILE", help=JSON_HELP)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
