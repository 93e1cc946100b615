"""How the settings of each optimizer were found, and at what expense: records of `scripts/tune.py`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_train.compare.groups import Group, optimizer_name
from sophia_train.compare.runs import Run, is_compared, is_number, leaves, read_json, read_run
from sophia_train.errors import DataError, MissingInputError

FILE_NAME = "tuning.json"
FIRST_RUN = "trial_000"

DIGITS = 8
"""How much of a digest is shown: enough to tell two data sets apart."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The tuning of one optimizer.

    Attributes:
        path: its folder, named for the choice of optimizer, such as `sophia_g`.
        optimizer: classes of optimizer and estimator, as `Group.optimizer` has them.
        flops: spent in all trials.
        trial_flops: what a whole trial was to spend.
        budget_trials: the budget, if it was given in trials.
        budget_flops: the budget, if it was given in FLOPs. Neither is on record for a study of a time when
            budgets were not.
        space: what each tuned setting could be, in the words of `--space`; empty if that is not on record.
        tried: values of each setting that has a range, in the order of trials.
        best: settings that won, under dotted keys; empty if no trial came to its end.
        best_run: that trial; None if none came to its end.
        losses: validation loss in nats a token at the end of each trial, in their order; NaN for one that
            diverged or was given up.
    """

    path: Path
    optimizer: str
    flops: float
    trial_flops: float
    budget_trials: int | None
    budget_flops: float | None
    space: Mapping[str, str]
    tried: Mapping[str, Sequence[float]]
    best: Mapping[str, Any]
    best_run: Run | None
    losses: tuple[float, ...]

    @property
    def trials(self) -> int:
        """Number of them, however they ended."""
        return len(self.losses)

    @property
    def budget(self) -> str:
        """What was spent, in words, and of how much where that is not the same."""
        given = max(self.trials, self.budget_trials or 0)
        trials = f"{self.trials} of {given}" if self.trials < given else f"{given}"
        flops = (
            f"{self.flops:.3g}" if self.budget_flops is None else f"{self.flops:.3g} of {self.budget_flops:g}"
        )
        return f"{trials} trial{'s' * (given > 1)}, {flops} FLOPs"

    @property
    def effort(self) -> tuple[str, float, float]:
        """What is the same for studies of equal budgets: trials, or where they were given, FLOPs.

        With the FLOPs go those that are left, if another whole trial fits into them: the search is not over.
        """
        if self.budget_flops is None:
            return "trials", self.trials, 0
        over = self.flops + self.trial_flops > self.budget_flops
        return "FLOPs", self.budget_flops, 0 if over else self.budget_flops - self.flops

    @property
    def best_losses(self) -> list[float]:
        """Lowest loss after each trial; NaN before the first that has one."""
        lowest, found = math.nan, []
        for loss in self.losses:
            lowest = loss if math.isnan(lowest) or loss < lowest else lowest
            found.append(lowest)
        return found

    def departures(self, run: Run) -> dict[str, tuple[Any, Any]]:
        """Tuned settings of which a run has another value, and that value and the one that was found."""
        return {} if self.best_run is None else _differing(run.settings, self.best_run.settings, self._tuned)

    def differences(self, run: Run) -> dict[str, tuple[Any, Any]]:
        """The same of all else that the loss depends on: other settings, steps, and digests of the data."""
        if self.best_run is None:
            return {}
        one, other = _conditions(run), _conditions(self.best_run)
        return _differing(one, other, [key for key in {**one, **other} if key not in self._tuned])

    @property
    def _tuned(self) -> list[str]:
        """Settings that were tuned, or are in a group of which there was a choice."""
        settings = {} if self.best_run is None else self.best_run.settings
        return [key for key in settings if any(f"{key}.".startswith(f"{each}.") for each in self.best)]


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
    """Find the tuning of a group: studies of its optimizer whose best trials are most like its runs.

    The tuned settings count first. That the group has them as they were found is for its `departures` to say.
    """
    run = group.runs[0]
    mine = [study for study in studies if study.optimizer == group.optimizer]
    distances = [
        (study.best_run is None, len(study.departures(run)), len(study.differences(run))) for study in mine
    ]
    return [study for study, distance in zip(mine, distances, strict=True) if distance == min(distances)]


def _read(file: Path) -> Study:
    content = read_json(file, needed=True)
    _check(file, content)
    space = {_key(key): words for key, words in (content.get("space") or {}).items()}
    budget, best = content.get("budget") or {}, content.get("best")
    overrides = best["overrides"] if best else []
    best_run = read_run(file.parent / best["run"]) if best else None
    first = file.parent / FIRST_RUN / "config.json"
    settings = best_run.settings if best_run else leaves(read_json(first, needed=True))
    return Study(
        path=file.parent,
        optimizer=optimizer_name(settings),
        flops=float(content["flops"]),
        trial_flops=float(content.get("trial_flops", 0.0)),
        budget_trials=budget.get("trials"),
        budget_flops=budget.get("flops"),
        space=space,
        tried=_tried(file, content["history"], space),
        best={_key(text): settings.get(_key(text), _value(text)) for text in overrides},
        best_run=best_run,
        losses=tuple(_final_loss(entry) for entry in content["history"]),
    )


def _check(file: Path, content: Mapping[str, Any]) -> None:
    """Check the types of what is read from a record; budget and space are not in those of long ago."""
    history = content.get("history")
    valid = {
        "flops": _is_amount(content.get("flops")),
        "trial_flops": _is_amount(content.get("trial_flops", 0.0)),
        "budget": content.get("budget") is None or _is_budget(content["budget"]),
        "space": content.get("space") is None or _is_space(content["space"]),
        "best": content.get("best") is None or _is_best(content["best"]),
        "history": isinstance(history, list) and len(history) > 0,
    }
    for key, fits in valid.items():
        if not fits:
            raise _error(file, key, content.get(key))
    for number, entry in enumerate(content["history"]):
        if not (isinstance(entry, dict) and (entry.get("loss") is None or is_number(entry["loss"]))):
            raise _error(file, "trial", entry, number)


def _is_amount(value: Any) -> bool:
    return is_number(value) and value >= 0


def _is_budget(value: Any) -> bool:
    """Whether it is a number of trials or of FLOPs, and not of both."""
    if not (isinstance(value, dict) and {*value} == {"trials", "flops"}):
        return False
    given = [each for each in value.values() if each is not None]
    return len(given) == 1 and _is_amount(given[0])


def _is_space(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(words, str) for words in value.values())


def _is_best(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("run"), str)
        and isinstance(value.get("overrides"), list)
        and all(isinstance(text, str) for text in value["overrides"])
    )


def _tried(
    file: Path, history: Sequence[Mapping[str, Any]], space: Mapping[str, str]
) -> dict[str, list[float]]:
    """The values of each setting that has a range; a choice, which has none, has a comma in its words."""
    tried: dict[str, list[float]] = {key: [] for key, words in space.items() if "," not in words}
    for number, entry in enumerate(history):
        try:
            for text in entry["overrides"]:
                if _key(text) in tried:
                    tried[_key(text)].append(float(_value(text)))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise _error(file, "trial", entry, number) from None
    return tried


def _conditions(run: Run) -> dict[str, Any]:
    """What the loss of a run depends on, the seed aside; data by the beginnings of their digests."""
    return {
        "steps": run.total_steps,
        "training data": run.fingerprints.get("train", "unknown")[:DIGITS],
        "validation data": run.fingerprints.get("validation", "unknown")[:DIGITS],
        **{key: value for key, value in run.settings.items() if is_compared(key) and key != "eval_interval"},
    }


def _differing(
    one: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    pairs = {key: (one.get(key, "not set"), other.get(key, "not set")) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _key(text: str) -> str:
    """The key of an override, or of a part of the space."""
    return text.partition("=")[0].lstrip("+")


def _value(text: str) -> str:
    return text.partition("=")[2]


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
