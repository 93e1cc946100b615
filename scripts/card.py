"""Write the card of a run: what it was, what came out, what it cost, and how to run it again.

    python scripts/card.py RUN...

A run writes `card.md` itself when it is finished; this is for runs that were interrupted, or are older. All
of it is from the run's folder, and what that does not hold is left out: the losses of the unigram and the
bigram model are there if the run was finished. Draws `loss.png`, too, where it is missing or older than the
metrics.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sophia_train.command_line import Parser
from sophia_train.compare.card import CURVE, read_baselines, write_card
from sophia_train.compare.curves import plot_run
from sophia_train.config import compose, run_config, to_json
from sophia_train.errors import exit_code_of
from sophia_train.trackers.jsonl import FILE_NAME, read_metrics
from sophia_train.trackers.summary import summarize


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    runs = parser.parse_args(arguments).runs
    defaults = to_json(run_config(compose()))
    for run in runs:
        if _lacks_curve(run):
            plot_run(run, read_baselines(run))
        sys.stdout.write(f"{write_card(run, defaults=defaults)}\n")


def _lacks_curve(run: Path) -> bool:
    metrics, picture = run / FILE_NAME, run / CURVE
    if not metrics.exists() or summarize(read_metrics(metrics)).final_val_loss is None:
        return False
    return not picture.exists() or picture.stat().st_mtime < metrics.stat().st_mtime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
