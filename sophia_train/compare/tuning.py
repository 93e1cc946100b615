"""With how many trials the settings of each optimizer were found: records of `scripts/tune.py`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_train.compare.groups import Group, optimizer_name
from sophia_train.compare.runs import is_number, leaves, read_json
from sophia_train.errors import DataError, MissingInputError

FILE_NAME = "tuning.json"
FIRST_RUN = "trial_000"


@dataclass(frozen=True, kw_only=True)
class Study:
    """The tuning of one optimizer.

    Attributes:
        path: its folder, named for the choice of optimizer, such as `sophia_g`.
        optimizer: classes of optimizer and estimator, as `Group.optimizer` has them.
        flops: spent in all trials.
        best: settings that won, under dotted keys; empty if no trial came to its end.
        losses: validation loss in nats a token at the end of each trial, in their order; NaN for one that
            diverged or was given up.
    """

    path: Path
    optimizer: str
    flops: float
    best: Mapping[str, Any]
    losses: tuple[float, ...]

    @property
    def trials(self) -> int:
        """Number of them, however they ended."""
        return len(self.losses)

    @property
    def budget(self) -> str:
        """What was spent, in words."""
        return f"{self.trials} trial{'s' * (self.trials != 1)}, {self.flops:.2g} FLOPs"

    @property
    def best_losses(self) -> list[float]:
        """Lowest loss after each trial; NaN before the first that has one."""
        lowest, found = math.nan, []
        for loss in self.losses:
            lowest = loss if math.isnan(lowest) or loss < lowest else lowest
            found.append(lowest)
        return found


def read_studies(path: Path) -> list[Study]:
    """Read the folder of a study, which has one for each optimizer, or that of one optimizer.

    Raises:
        MissingInputError: there is no `tuning.json`, or not the run that it says was best.
        DataError: one was cut, altered, or is something else; names file and line.
    """
    files = sorted([*path.glob(FILE_NAME), *path.glob(f"*/{FILE_NAME}")])
    if not files:
        raise MissingInputError(f"{path} has no {FILE_NAME}; give a folder that scripts/tune.py wrote")
    return [_read(file) for file in files]


def studies_of(group: Group, studies: Sequence[Study]) -> list[Study]:
    """Find the tuning of a group: studies of its optimizer, of which those that found its very settings."""
    mine = [study for study in studies if study.optimizer == group.optimizer]
    settings = group.runs[0].settings
    exact = [study for study in mine if all(settings.get(key) == value for key, value in study.best.items())]
    return exact or mine


def _read(file: Path) -> Study:
    content = read_json(file, needed=True)
    flops: Any = content.get("flops")
    best, history = content.get("best"), content.get("history")
    if not (is_number(flops) and flops >= 0):
        raise _error(file, "flops", flops)
    if not (isinstance(history, list) and history):
        raise _error(file, "history", history)
    for number, entry in enumerate(history):
        if not (isinstance(entry, dict) and (entry.get("loss") is None or is_number(entry["loss"]))):
            raise _error(file, "trial", entry, number)
    if best is not None and not (
        isinstance(best, dict)
        and isinstance(best.get("run"), str)
        and isinstance(best.get("overrides"), list)
        and all(isinstance(text, str) for text in best["overrides"])
    ):
        raise _error(file, "best", best)
    run = file.parent / (best["run"] if best else FIRST_RUN)
    settings = leaves(read_json(run / "config.json", needed=True))
    tuned = [text.partition("=")[0] for text in best["overrides"]] if best else []
    return Study(
        path=file.parent,
        optimizer=optimizer_name(settings),
        flops=float(flops),
        best={key: settings.get(key) for key in tuned},
        losses=tuple(_final_loss(entry) for entry in history),
    )


def _final_loss(trial: Mapping[str, Any]) -> float:
    """The loss of a trial that came to its end; that of one that was given up is of the middle."""
    loss = trial.get("loss")
    return float(loss) if loss is not None and trial.get("state") == "complete" else math.nan


def _error(path: Path, key: str, value: Any, nth: int = 0) -> DataError:
    """Name the line of the nth such key, or the first line if it is not there."""
    before = path.read_text().split(f'"{key}":')[: nth + 2]
    line = sum(part.count("\n") for part in before[: nth + 1]) + 1 if len(before) > nth + 1 else 1
    what = f"{key}={json.dumps(value)}"
    return DataError(f"{path}, line {line}: {what} is not of a tuning study; restore the file")
