"""Tune optimizers, each with the same budget.

    python scripts/tune.py --out STUDY --optimizers adamw,sophia_g --trials 8
        --space optimizer.lr=log:1e-4..5e-3 --space schedule.warmup_steps=50,100,200
        --space sophia_g:optimizer.gamma=log:0.005..0.5
        -- data=token_files data.path=books model=gpt2_30m max_steps=1000

What stands behind -- is the same for all runs, in the words of `python -m sophia_train`. Each trial is a run
of its own, in STUDY/OPTIMIZER/trial_000. STUDY/OPTIMIZER/tuning.json says what was to be spent, what was
tried, what it cost, and what came out. The first four trials are spread over the space, one in each quarter
of a range, and are the same for each optimizer; from then on Optuna goes where the losses so far point to.

A space in front of which there is OPTIMIZER: holds for that one only, and instead of one for all. Ranges are
LOW..HIGH, log:LOW..HIGH by factors, whole numbers if both ends are; anything else is a choice of values.

Trials that diverge count, and so do those that are given up: from the middle of their schedule on, if at one
of their evaluations (eval_interval) the validation loss is above the median of the others at that step. Run
the same command again to go on after an interruption; with more trials or FLOPs, to search on.

Ends with 0 if the budget is spent, 75 if something is left, and as a run that failed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sophia_train.command_line import Parser, before_and_after_dashes, positive_number, whole_number
from sophia_train.errors import ConfigError, UnavailableError, exit_code_of
from sophia_train.processes import owned

if TYPE_CHECKING:
    from sophia_train.tuning.study import OptimizerStudy


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    options, overrides = _parse(arguments)
    try:
        from sophia_train.tuning.record import Budget
        from sophia_train.tuning.space import parse_spaces
        from sophia_train.tuning.study import OptimizerStudy, StudySettings, tune
    except ImportError as error:
        raise UnavailableError("Optuna is not installed; run `pip install 'sophia_train[tune]'`") from error

    spaces = parse_spaces(options.space, options.optimizers)
    settings = StudySettings(
        folder=options.out,
        overrides=overrides,
        seed=options.seed,
        pruning=not options.no_pruning,
        keep_weights=not options.discard_weights,
    )
    settings.check()
    budget = Budget(options.trials, options.flops)
    studies = [OptimizerStudy(settings, optimizer, space) for optimizer, space in spaces.items()]
    for study in studies:
        if budget.flops is not None and budget.flops < study.trial_flops:
            raise ConfigError(
                f"--flops={budget.flops:g} does not pay for one trial of {study.optimizer}; "
                f"use {study.trial_flops:.3g} or more, or a smaller max_steps="
            )
    with owned(options.out):
        settings.write()
        try:
            tune(studies, budget, options.seconds)
        finally:
            Console(highlight=False).print(table(studies))


def table(studies: "Sequence[OptimizerStudy]") -> Table:
    """Draw what each optimizer has spent, and what its best trial came to."""
    drawn = Table("optimizer", "trials", "FLOPs", "best val loss", "with", box=None, pad_edge=False)
    for study in studies:
        found = ("", "") if study.best is None else (f"{study.best.loss:.4f}", " ".join(study.best.overrides))
        drawn.add_row(study.optimizer, str(len(study.trials)), f"{study.flops:.3g}", *found)
    return drawn


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="STUDY", help="folder of the search")
    parser.add_argument(
        "--optimizers", type=names, required=True, metavar="NAME[,NAME]", help="as in optimizer="
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--trials", type=whole_number, metavar="N", help="of each optimizer")
    budget.add_argument("--flops", type=positive_number, metavar="F", help="of each optimizer")
    parser.add_argument(
        "--space", action="append", required=True, metavar="[OPTIMIZER:]KEY=VALUES", help="what is tuned"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the search, not of the runs (0)")
    parser.add_argument("--no-pruning", action="store_true", help="let every trial come to its end")
    parser.add_argument(
        "--seconds",
        type=positive_number,
        metavar="N",
        help="of this invocation; begin no trial that would not end in it",
    )
    parser.add_argument(
        "--discard-weights", action="store_true", help="keep of a trial what is small: not its weights"
    )
    own, overrides = before_and_after_dashes(arguments)
    return parser.parse_args(own), overrides


def names(text: str) -> list[str]:
    """Read names that are separated by commas: at least one, none twice."""
    found = text.split(",")
    if len(set(found)) < len(found) or not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different names")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
