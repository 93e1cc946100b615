"""Compare runs: final loss with intervals over seeds, speed-up to a target loss, and what is unequal.

    python scripts/compare.py RUN... [--baseline RUN] [--target LOSS]

Runs that differ in nothing but the seed are one group. The first one's group, or that of --baseline, is what
the others are compared with. Prints Markdown.

  loss        validation loss at the end of the schedule; a run that was cut before is listed, and not in it
  less ...    mean difference over shared seeds; detectable is what so many seeds would show, with 80 % power
  speed-up    cost at which the baseline's mean curve is at --target, over that of each run; a bound, such as
              < 1.00, where a run never gets there
  unequal     everything that differs between groups and is not the optimizer or its rates
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from sophia_train.command_line import Parser
from sophia_train.compare.report import compare_groups, markdown
from sophia_train.compare.runs import group_runs, read_run
from sophia_train.errors import exit_code_of


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--baseline", type=Path, metavar="RUN", help="a run of the group to compare with (the first RUN)"
    )
    parser.add_argument(
        "--target", type=loss, metavar="LOSS", help="of the speed-up (the baseline's mean final loss)"
    )
    options = parser.parse_args(arguments)
    paths = {path.resolve(): path for path in (*options.runs, options.baseline) if path is not None}
    groups = group_runs(read_run(path) for path in paths.values())
    first = (options.baseline or options.runs[0]).resolve()
    baseline = next(group for group in groups if any(run.path.resolve() == first for run in group.runs))
    sys.stdout.write(markdown(compare_groups(groups, baseline, options.target)))


def loss(text: str) -> float:
    """Read a loss in nats a token: a positive number."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a loss above 0")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
