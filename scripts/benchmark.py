"""Measure this project's speed beside a yardstick, in one process, taking turns.

    python scripts/benchmark.py train [--model NAME] [--batch-size N] [--steps N] [--repeats N] ...
    python scripts/benchmark.py hessian [--runs "optimizer=sophia_g hessian.groups=8" ...] ...
    python scripts/benchmark.py loader [--data "data=token_files data.path=FOLDER"] [--model NAME] ...
    python scripts/benchmark.py data PATH [--workers N] [--repeats N]

`train`: our training step with AdamW and with Sophia-G, next to transformers' GPT-2 in a plain PyTorch loop.
`hessian`: what each optimizer adds to AdamW's step and memory, the Hessian's passes included.
`loader`: what reading tokens costs of a step, next to a batch that is there already.
`data`: preparing text, next to nanoGPT's recipe and to the tokenizer alone.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sophia_train import durable
from sophia_train.benchmarks import data, hessian, loader, train
from sophia_train.command_line import Parser, whole_number
from sophia_train.errors import exit_code_of


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for module, name in ((train, "train"), (hessian, "hessian"), (loader, "loader")):
        command = commands.add_parser(name, help=str(module.__doc__))
        command.set_defaults(benchmark=module)
        _add_options(command)
        if module is hessian:
            command.add_argument(
                "--runs",
                nargs="+",
                default=hessian.RUNS,
                metavar="OVERRIDES",
                help="next to AdamW (%(default)s)",
            )
        if module is loader:
            command.add_argument(
                "--data", default="", metavar="OVERRIDES", help="whose tokens to read (random words)"
            )
    command = commands.add_parser("data", help=str(data.__doc__))
    command.set_defaults(benchmark=data)
    command.add_argument("path", help="text as of data.path")
    command.add_argument("--workers", type=whole_number, default=1, metavar="N", help="(%(default)s)")
    command.add_argument("--repeats", type=whole_number, default=3, metavar="N", help="timed (%(default)s)")
    command.add_argument("--scratch", type=Path, metavar="FOLDER", help="where to write (the system's)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
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
    add("--compile", action="store_true", help="compile the models")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
