"""The search of one optimizer, each trial a run in a folder of its own; and of several with equal budgets."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sophia_train import durable
from sophia_train.config import compose, run_config
from sophia_train.errors import ConfigError, Interrupted
from sophia_train.processes import Processes, exit_code, failure, quoted, start_run, was_interrupted
from sophia_train.run_results import (
    RunResult,
    discard_weights,
    planned_flops,
    read_curve,
    read_result,
    settings_digest,
)
from sophia_train.state import may_change
from sophia_train.tuning.record import (
    FORMAT_VERSION,
    STUDY,
    Budget,
    best_of,
    check_identity,
    read_trials,
    trial_folder,
    write_trials,
)
from sophia_train.tuning.search import State, Trial, is_hopeless, propose
from sophia_train.tuning.space import Space, describe, ends, override

OURS = ("name", "run_dir", "optimizer", "resume")
"""Settings that each trial has its own of."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What the searches of all optimizers share.

    Attributes:
        folder: has theirs.
        overrides: fixed settings of the runs.
        seed: of the search; that of the runs is among their settings.
        pruning: whether trials are given up that look hopeless from the middle of their schedule on.
        keep_weights: whether the weights of trials stay.
    """

    folder: Path
    overrides: Sequence[str]
    seed: int = 0
    pruning: bool = True
    keep_weights: bool = True

    def check(self) -> None:
        """Check the fixed settings, and that what is in the folder was searched with the same.

        Raises:
            ConfigError: a setting is each trial's own, or the folder belongs to another study.
            DataError: its record is damaged.
        """
        for text in self.overrides:
            if (key := _key(text)) in OURS:
                raise ConfigError(f"{text}: each trial has its own {key}; leave it out")
        check_identity(self.folder / STUDY, self._identity())

    def write(self) -> None:
        """Write the record of the study."""
        record = {"format_version": FORMAT_VERSION, **self._identity()}
        durable.write_json(self.folder / STUDY, record)

    def _identity(self) -> dict[str, Any]:
        return {
            "overrides": sorted(text for text in self.overrides if not may_change(_key(text))),
            "seed": self.seed,
            "pruning": self.pruning,
        }


class OptimizerStudy:
    """The search of one optimizer; what its folder holds already is taken up.

    Args:
        settings: those of all optimizers' searches.
        optimizer: as in `optimizer=...`.
        space: what is searched.

    Raises:
        ConfigError: a setting or a part of the space is wrong, or the folder belongs to another search.
        DataError: the record in the folder is damaged.
    """

    def __init__(self, settings: StudySettings, optimizer: str, space: Space) -> None:
        self.settings = settings
        self.optimizer = optimizer
        self.space = space
        self.folder = settings.folder / optimizer
        self.fixed = ["keep_checkpoints=1", *settings.overrides, f"optimizer={optimizer}"]
        self.config = run_config(compose(self.fixed))
        self._check_space()
        self.identity = {
            "config": settings_digest(self.config),
            "run_seed": self.config.seed,
            "space": {key: describe(distribution) for key, distribution in space.items()},
        }
        self.trials, self.budget = read_trials(self.folder, self.identity)

    @cached_property
    def trial_flops(self) -> float:
        """What one whole trial costs, with the optimizer's own settings."""
        return planned_flops(self.config)

    @property
    def flops(self) -> float:
        """What all trials have spent."""
        return sum(trial.flops for trial in self.trials)

    @property
    def best(self) -> Trial | None:
        """The trial with the lowest loss at its end, if one has come to its end."""
        number = best_of(self.trials)
        return None if number is None else self.trials[number]

    def take_budget(self, budget: Budget) -> None:
        """Put a budget on record; one that is below what was spent already changes nothing."""
        if budget != self.budget and budget.covers(len(self.trials), self.flops):
            self.budget = budget
            if self.trials:
                self._write()

    def has_budget(self, budget: Budget) -> bool:
        """Whether another whole trial fits into the budget."""
        if budget.trials is not None:
            return len(self.trials) < budget.trials
        assert budget.flops is not None
        return self.flops + self.trial_flops <= budget.flops

    def run_trial(self, processes: Processes, deadline: float = math.inf) -> None:
        """Run the next trial, or go on with it if it was interrupted, and record it.

        Args:
            processes: to start it among.
            deadline: by the monotonic clock, in seconds; none is begun that would not end before, as far as
                those before it tell.

        Raises:
            Interrupted: a signal came, or there is no time left.
            RunError: it failed, other than by diverging; with its error and exit code.
        """
        folder = trial_folder(self.folder, len(self.trials))
        began = time.monotonic()
        slowest = max((trial.seconds for trial in self.trials), default=0.0)
        if processes.told_to_stop or began + slowest >= deadline:
            raise Interrupted(f"stopped before {folder}; run it again to go on")
        overrides = propose(self.space, self.trials, self.settings.seed)
        state = self._run(folder, overrides, processes, deadline)
        result = read_result(folder)
        self.trials.append(
            Trial(
                overrides=overrides,
                loss=result.validation_loss,
                flops=result.flops,
                seconds=max(result.seconds, time.monotonic() - began),
                state=state,
                curve=result.curve,
            )
        )
        self._write()
        if not self.settings.keep_weights:
            discard_weights(folder)

    def _write(self) -> None:
        write_trials(self.folder, self.optimizer, self.identity, self.trials, self.budget, self.trial_flops)

    def _run(self, folder: Path, overrides: Sequence[str], processes: Processes, deadline: float) -> State:
        """Run a trial until it ends or is given up; returns which it was."""
        name = f"{self.optimizer}_{folder.name}"
        words = [*self.fixed, *overrides, quoted("name", name), quoted("run_dir", folder)]
        process = start_run(processes, words, folder)
        pruned = False
        while process not in processes.ended():
            pruned = pruned or self._is_hopeless(folder, overrides)
            if pruned or time.monotonic() >= deadline:
                processes.stop(process)
        code = exit_code(process)
        if code == 0:
            return "complete"  # be it that it was too late to stop it
        if code == RunResult.DIVERGED and read_result(folder).diverged:
            return "failed"
        if not was_interrupted(code):
            raise failure(folder, code)
        if not pruned:
            raise Interrupted(f"stopped in {folder}; run it again to go on")
        return "pruned"

    def _is_hopeless(self, folder: Path, overrides: Sequence[str]) -> bool:
        if not self.settings.pruning:
            return False
        half = self.config.total_steps(self.config.model.block_size) // 2
        return is_hopeless(self.space, self.trials, overrides, read_curve(folder), half)

    def _check_space(self) -> None:
        """Compose a run at both ends of every range, and with each choice."""
        for key, distribution in self.space.items():
            for value in ends(distribution):
                try:
                    compose([*self.fixed, override(key, value, distribution)])
                except ConfigError as error:
                    raise ConfigError(f"--space {key} for {self.optimizer}: {error}") from error


def tune(studies: Sequence[OptimizerStudy], budget: Budget, seconds: float | None = None) -> None:
    """Run trials until each optimizer has spent its budget; the one that has spent least is next.

    Args:
        studies: one of each optimizer.
        budget: of each.
        seconds: of this invocation; None is no limit.

    Raises:
        Interrupted: something is left.
        RunError: a run failed, other than by diverging.
    """
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    for study in studies:
        study.take_budget(budget)
    with Processes() as processes:
        while unspent := [study for study in studies if study.has_budget(budget)]:
            by_trials = budget.trials is not None
            least = min(unspent, key=lambda study: len(study.trials) if by_trials else study.flops)
            least.run_trial(processes, deadline)


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]
