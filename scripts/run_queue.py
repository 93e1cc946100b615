"""Work off a queue of runs, at once or bit by bit.

    python scripts/run_queue.py FILE --out DIR [--seconds N] [--parallel N] [-- OVERRIDE ...]

FILE says in YAML which runs there are, in the words of `python -m sophia_train -m`:

    common: data=token_files data.path=books model=gpt2_30m max_steps=4000
    runs:
      adamw: optimizer=adamw optimizer.lr=3e-3 seed=1,2,3
      sophia: optimizer=sophia_g seed=1,2,3 hessian=gnb,gnb_paper

Each run is a process of its own, in DIR/NAME. Run the same command again and it leaves out the runs that are
finished, or diverged, and goes on with those that were interrupted. DIR/results.jsonl has a row for each that
has ended. What stands behind -- holds for all runs, such as data.path=... of this machine.

Ends with 0 if all is done, 75 if something is left, and as a run that failed.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sophia_train.command_line import Parser, before_and_after_dashes, positive_number, whole_number
from sophia_train.errors import exit_code_of

if TYPE_CHECKING:
    from sophia_train.run_queue import RunQueue


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE", help="the queue")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs' folders")
    parser.add_argument(
        "--seconds",
        type=positive_number,
        metavar="N",
        help="of this invocation; begin no run that would not end in it",
    )
    parser.add_argument(
        "--parallel", type=whole_number, default=1, metavar="N", help="runs beside each other (1)"
    )
    parser.add_argument(
        "--discard-weights", action="store_true", help="keep of a finished run what is small: not its weights"
    )
    own, overrides = before_and_after_dashes(arguments)
    options = parser.parse_args(own)
    deadline = math.inf if options.seconds is None else time.monotonic() + options.seconds
    # These import torch, which takes seconds: they count.
    from sophia_train.processes import owned
    from sophia_train.run_queue import RunQueue, read_queue

    runs = read_queue(options.file, options.out, overrides)
    with owned(options.out):
        queue = RunQueue(
            runs,
            options.out,
            parallel=options.parallel,
            deadline=deadline,
            keep_weights=not options.discard_weights,
        )
        try:
            queue.run()
        finally:
            Console(highlight=False).print(table(queue))


def table(queue: "RunQueue") -> Table:
    """Draw how each run of a queue stands."""
    drawn = Table("run", "", box=None, pad_edge=False)
    for header in ("val loss", "tokens", "seconds"):
        drawn.add_column(header, justify="right")
    for row in queue.standings():
        loss = "" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        drawn.add_row(row["name"], row["state"], loss, f"{row['tokens']:,}", f"{row['seconds']:.0f}")
    return drawn


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
