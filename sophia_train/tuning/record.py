"""What a search writes down: in `study.json` what optimizers share, in `tuning.json` the trials of one."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sophia_train import durable
from sophia_train.errors import ConfigError, DataError
from sophia_train.run_results import read_result
from sophia_train.tuning.search import Trial

STUDY, TUNING = "study.json", "tuning.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Budget:
    """What each optimizer may spend: trials or FLOPs, one of them."""

    trials: int | None = None
    flops: float | None = None

    def covers(self, trials: int, flops: float) -> bool:
        """Whether it is enough for so many trials, which spent so much."""
        if self.trials is not None:
            return trials <= self.trials
        assert self.flops is not None
        return flops <= self.flops


def check_identity(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Read a record, if there is one, and check that it is of the same search.

    Args:
        path: of the record.
        identity: what it must say.

    Returns:
        The record; empty if there is none.

    Raises:
        ConfigError: it is of another search.
        DataError: it is damaged.
    """
    try:
        record = dict(json.loads(path.read_text()))
        found = {key: record[key] for key in identity}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged; restore it, or choose another --out") from error
    for key, value in identity.items():
        if found[key] != value:
            raise ConfigError(
                f"{key} is {json.dumps(value)}, but {path} was made with {json.dumps(found[key])}; "
                "choose another --out, or set it back to go on"
            )
    return record


def read_trials(folder: Path, identity: Mapping[str, Any]) -> tuple[list[Trial], Budget | None]:
    """Read the trials of one optimizer, none if there is no record; their curves are in their run folders.

    Returns:
        The trials, and the budget that they are of; None if the record is of a time when it had none.

    Raises:
        ConfigError: the record is of another search.
        DataError: it is damaged.
    """
    record = check_identity(folder / TUNING, identity)
    try:
        budget = Budget(**record["budget"]) if record.get("budget") is not None else None
        return [_trial(folder, entry) for entry in record.get("history", [])], budget
    except (TypeError, KeyError) as error:
        raise DataError(f"{folder / TUNING} is damaged; restore it, or choose another --out") from error


def write_trials(
    folder: Path,
    optimizer: str,
    identity: Mapping[str, Any],
    trials: Sequence[Trial],
    budget: Budget | None,
    trial_flops: float,
) -> None:
    """Write the record of one optimizer.

    A loss that is not finite, that of a diverged trial, is null. FLOPs are those of all trials, however they
    ended; `trial_flops` are those of a whole one, as planned, by which a budget of FLOPs is spent or not.
    """
    history = [
        {
            "trial": number,
            "overrides": list(trial.overrides),
            "loss": trial.loss if math.isfinite(trial.loss) else None,
            "flops": trial.flops,
            "seconds": trial.seconds,
            "state": trial.state,
        }
        for number, trial in enumerate(trials)
    ]
    best: dict[str, Any] | None = None
    if (number := best_of(trials)) is not None:
        run = trial_folder(folder, number).name
        best = {"overrides": history[number]["overrides"], "loss": history[number]["loss"], "run": run}
    durable.write_json(
        folder / TUNING,
        {
            "format_version": FORMAT_VERSION,
            "optimizer": optimizer,
            **identity,
            "trials": len(trials),
            "flops": sum(trial.flops for trial in trials),
            "budget": None if budget is None else asdict(budget),
            "trial_flops": trial_flops,
            "best": best,
            "history": history,
        },
    )


def best_of(trials: Sequence[Trial]) -> int | None:
    """Number of the trial with the lowest loss at its end; None if none has come to its end."""
    complete = [number for number, trial in enumerate(trials) if trial.state == "complete"]
    return min(complete, key=lambda number: trials[number].loss, default=None)


def trial_folder(folder: Path, number: int) -> Path:
    """The run folder of a trial."""
    return folder / f"trial_{number:03d}"


def _trial(folder: Path, entry: Mapping[str, Any]) -> Trial:
    return Trial(
        overrides=entry["overrides"],
        loss=math.inf if entry["loss"] is None else entry["loss"],
        flops=entry["flops"],
        seconds=entry["seconds"],
        state=entry["state"],
        curve=read_result(trial_folder(folder, entry["trial"])).curve,
    )
