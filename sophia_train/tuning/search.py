"""What to try next, and what to give up: both pure functions of the trials so far.

The first trials are spread over the space; from then on Optuna chooses. Nothing but the trials goes in, so a
search that was interrupted goes on as if it had not been, and needs no storage of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from sophia_train.seeds import derive
from sophia_train.tuning.space import Space, override, parameters, value_at

State = Literal["complete", "pruned", "failed"]

STARTUP_TRIALS = 4
"""Trials that are spread over the space, and that have to be there before one is given up."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a search.

    Attributes:
        overrides: the tuned settings.
        loss: validation loss at its end, in nats a token; infinite if it failed.
        flops: what it spent, to its end or until it was given up.
        seconds: how long its process took.
        state: "complete", "pruned" (given up as worse than others at the same step) or "failed" (diverged).
        curve: validation loss by step; may be NaN.
    """

    overrides: Sequence[str]
    loss: float
    flops: float
    seconds: float
    state: State
    curve: Mapping[int, float] = field(default_factory=dict)


def propose(space: Space, trials: Sequence[Trial], seed: int) -> list[str]:
    """Draw the settings of the next trial: a Latin hypercube first, then tree-structured Parzen estimators.

    The first `STARTUP_TRIALS` have one trial in each quarter of every range, and choices as evenly as they
    can be had. They come from the seed, the key of each setting and the trial's number alone: those of two
    optimizers have the same values in the settings that they share, or the same place in another range.

    Source: McKay et al., Technometrics 1979; Bergstra et al., NeurIPS 2011, as Optuna's `TPESampler`.
    """
    if len(trials) < STARTUP_TRIALS:
        return [
            override(key, value_at(distribution, _place(key, len(trials), seed)), distribution)
            for key, distribution in space.items()
        ]
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=STARTUP_TRIALS, seed=derive(seed, "tuning", len(trials)) % 2**32
    )
    drawn = _study(space, trials, sampler=sampler).ask(dict(space))
    return [override(key, drawn.params[key], distribution) for key, distribution in space.items()]


def is_hopeless(
    space: Space,
    trials: Sequence[Trial],
    overrides: Sequence[str],
    curve: Mapping[int, float],
    first_step: int,
) -> bool:
    """Whether a trial is to be given up: at some step its best loss so far is above the others' median.

    Args:
        space: what is searched.
        trials: those that have ended.
        overrides: the tuned settings of the trial in progress.
        curve: its validation loss, by step.
        first_step: the first step at which it may be given up.
    """
    pruner = optuna.pruners.MedianPruner(STARTUP_TRIALS, n_warmup_steps=first_step)
    study = _study(space, trials, pruner=pruner)
    study.enqueue_trial(parameters(overrides, space))
    trial = study.ask(dict(space))
    for step, loss in sorted(curve.items()):
        trial.report(loss, step)
        if trial.should_prune():
            return True
    return False


def _place(key: str, number: int, seed: int) -> float:
    """Choose where in its distribution a setting is in one of the first trials, in [0, 1).

    Trial n of N is at (s(n) + u) / N: the permutation s and the offset u, in [0, 1), are the setting's own.
    That the offset is one for all n is what spreads a choice of few values evenly, too.
    """
    strata = sorted(range(STARTUP_TRIALS), key=lambda trial: derive(seed, "tuning", key, trial))
    offset = derive(seed, "tuning", key) % 2**32 / 2**32
    return (strata[number] + offset) / STARTUP_TRIALS


def _study(space: Space, trials: Sequence[Trial], **options: Any) -> optuna.Study:
    study = optuna.create_study(direction="minimize", **options)
    study.add_trials([_frozen(trial, space) for trial in trials])
    return study


def _frozen(trial: Trial, space: Space) -> FrozenTrial:
    """Write a trial as Optuna has it; one that failed is complete, and as bad as can be."""
    return create_trial(
        state=TrialState.PRUNED if trial.state == "pruned" else TrialState.COMPLETE,
        value=math.inf if trial.state == "failed" else trial.loss,
        params=parameters(trial.overrides, space),
        distributions=dict(space),
        intermediate_values=dict(trial.curve),
    )
