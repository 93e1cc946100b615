"""Compare runs: final loss with intervals over seeds, speed-up to a target loss, and what is unequal.

    python scripts/compare.py RUN... [--baseline RUN] [--target LOSS] [--out DIR]

Runs that differ in nothing but the seed are one group. The first one's group, or that of --baseline, is what
the others are compared with; models of another size are compared with the group of its optimizer at that
size. Prints Markdown; --out writes report.md, report.html, which is one file for any browser, and the figures
as PNG and SVG.

  loss        validation loss at the end of the schedule; a run that was cut before is listed, and not in it
  less ...    mean difference over shared seeds; detectable is what so many seeds would show, with 80 % power
  speed-up    of runs of several lengths: the baseline's tokens over those of the schedule that ends at its
              loss; on the way: what the baseline spends until its final loss, or --target, over what each run
              does, mid-schedule; a bound, such as < 1.00, where a run never gets there
  seconds     of steady training, without start-up, evaluations and checkpoints
  unequal     everything that differs between groups and is not the optimizer or its rates; with --tuning, the
              way their settings were found, too
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from sophia_train.command_line import Parser, whole_number
from sophia_train.compare.contents import contents
from sophia_train.compare.document import markdown
from sophia_train.compare.groups import group_runs
from sophia_train.compare.reference import choose
from sophia_train.compare.report import Report, compare_sizes
from sophia_train.compare.runs import read_run
from sophia_train.compare.tuning import read_studies
from sophia_train.errors import exit_code_of


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--baseline", type=Path, metavar="RUN", help="a run of the group to compare with (the first RUN)"
    )
    parser.add_argument(
        "--target", type=loss, metavar="LOSS", help="of the speed-up (the baseline's final loss)"
    )
    parser.add_argument(
        "--at-step",
        type=whole_number,
        metavar="N",
        help="compare there, mid-schedule, and say so everywhere (the end of each schedule)",
    )
    parser.add_argument(
        "--reference",
        nargs="+",
        metavar="NAME",
        help="published results to draw beside the runs, or none (paper released, for runs on OpenWebText)",
    )
    parser.add_argument(
        "--tuning",
        type=Path,
        nargs="+",
        default=[],
        metavar="STUDY",
        help="folders that scripts/tune.py wrote",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write report and figures here")
    options = parser.parse_args(arguments)
    paths = {path.resolve(): path for path in (*options.runs, options.baseline) if path is not None}
    runs = [read_run(path, options.at_step) for path in paths.values()]
    groups = group_runs(runs)
    first = (options.baseline or options.runs[0]).resolve()
    baseline = next(group for group in groups if any(run.path.resolve() == first for run in group.runs))
    studies = [study for path in options.tuning for study in read_studies(path)]
    comparisons = compare_sizes(groups, baseline, options.target, studies)
    report = Report(comparisons, options.at_step, studies, choose(runs, options.reference))
    if options.out:
        from sophia_train.compare.publish import publish  # matplotlib, which the tables do not need

        publish(report, options.out)
    sys.stdout.write(markdown(contents(report)))


def loss(text: str) -> float:
    """Read a loss in nats a token: a positive number."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a loss above 0")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
