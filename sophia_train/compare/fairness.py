"""What is unequal between groups of runs, beyond the optimizer and its rates."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sophia_train.compare.groups import Group
from sophia_train.compare.runs import SPEED, Run, is_compared
from sophia_train.compare.tuning import Study, studies_of

UNKNOWN = "unknown: no checkpoint"
NOT_RECORDED, NOT_FOUND = "not recorded", "none: not what its tuning found"

WORDS = {
    "batch_size": "batch, sequences",
    "eval_tokens": "validation tokens",
    "gradient_clip": "gradient clip",
    "init_from": "starting weights",
    "schedule._target_": "schedule's shape",
    "schedule.final_lr_fraction": "schedule's end",
    "schedule.warmup_steps": "warm-up, steps",
}
"""Names of settings that everybody looks for; another setting goes by its key."""

NEVER_DECAYED = {"embeddings", "head", "norms", "biases", "vectors"}
"""Kinds of parameters that no optimizer decays here."""


Tuning = Mapping[str, Sequence[tuple[Study, Run]]]
"""The studies of each group, by its label, and a run of the group with each of them."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not the same for all runs.

    Attributes:
        what: names it.
        values: what each group has, by its label; several where its runs differ, and no label where there is
            nothing to say of it.
    """

    what: str
    values: Mapping[str, Sequence[str]]


def unequal(groups: Sequence[Group], studies: Sequence[Study] = ()) -> list[Finding]:
    """List all that is unequal between groups, or within one, other than the optimizer and its rates.

    Free are the settings of `optimizer`, `hessian` and `gamma`, except which parameters are decayed. Data
    that cannot be compared, for want of a checkpoint, is listed, too.

    Args:
        groups: at least one.
        studies: the tuning that is on record; where there is none, budgets are not compared.
    """
    facts = {group.label: [_facts(run) for run in group.runs] for group in groups}
    everything = dict.fromkeys(what for each in facts.values() for fact in each for what in fact)
    findings = []
    for what in everything:
        values = {
            label: sorted({str(fact.get(what, "not set")) for fact in each}) for label, each in facts.items()
        }
        found = {value for each in values.values() for value in each}
        if len(found) > 1 or UNKNOWN in found:
            findings.append(Finding(what, values))
    return findings + _tuning(groups, studies) + _seeds(groups) + _mid_schedule(groups) + _cut(groups)


def _facts(run: Run) -> dict[str, Any]:
    settings = run.settings
    batch_tokens = settings["batch_size"] * settings["model.block_size"]
    facts = {
        "steps": run.total_steps,
        "tokens": run.total_steps * batch_tokens,
        "training data": run.fingerprints.get("train", UNKNOWN),
        "validation data": run.fingerprints.get("validation", UNKNOWN),
        "decayed parameters": _decayed(settings),
    }
    for key, value in settings.items():
        if is_compared(key) and not key.startswith(("optimizer.", "hessian.", "gamma.")):
            facts[WORDS.get(key, key)] = value
    for key in sorted(SPEED):
        if key in settings:
            facts[f"{key} (seconds only)"] = settings[key]
    facts["device"] = run.environment.get("device", "unknown")  # precision=auto and seconds depend on it
    facts["commit"] = run.environment.get("commit", "unknown")
    facts["torch"] = run.environment.get("torch", "unknown")
    return facts


def _decayed(settings: Mapping[str, Any]) -> str:
    """Describe which matrices are decayed: all, none, or those of some of several optimizers."""
    takers: dict[str, Any] = {"the rest": settings.get("optimizer.weight_decay")}
    for key, words in settings.items():
        if key.startswith("optimizer.others.") and key.endswith(".parameters"):
            wanted = [word for word in words if word not in NEVER_DECAYED]
            if wanted:
                takers[", ".join(wanted)] = settings.get(f"{key.removesuffix('.parameters')}.weight_decay")
    if "matrices" in takers:
        takers.pop("the rest")  # which is no matrix
    words_of = {
        who: "by the default" if rate is None else "decayed" if rate else "not decayed"
        for who, rate in takers.items()
    }
    if len(set(words_of.values())) == 1:
        return f"matrices {next(iter(words_of.values()))}"
    return "; ".join(f"{who} {word}" for who, word in words_of.items())


def _seeds(groups: Iterable[Group]) -> list[Finding]:
    """Compare the sets of seeds, which are starting weights and orders of the data, and their number."""
    seeds = {group.label: [str(run.seed) for run in group.runs] for group in groups}
    findings = []
    if len({tuple(each) for each in seeds.values()}) > 1:
        findings.append(Finding("seeds (weights, order of the data)", seeds))
    if len({len(each) for each in seeds.values()}) > 1:
        counts = {label: [str(len(each))] for label, each in seeds.items()}
        findings.append(Finding("number of seeds", counts))
    return findings


def _tuning(groups: Iterable[Group], studies: Sequence[Study]) -> list[Finding]:
    """Compare how the settings of each group were found; what is not on record is no agreement."""
    if not studies:
        return []
    tuning = {
        group.label: [(study, group.runs[0]) for study in studies_of(group, studies)] for group in groups
    }
    findings = [
        Finding("tuning", _say(tuning, _departures)),
        *_budgets(tuning),
        *_spaces(tuning),
        Finding("tuning with other settings than the runs have", _say(tuning, _differences)),
        Finding("best of tuning at an edge of what was tried", _say(tuning, _edges)),
    ]
    return [finding for finding in findings if finding.values]


def _budgets(tuning: Tuning) -> Iterator[Finding]:
    """Compare what was spent on finding the settings of each group."""
    paid = {
        label: [study for study, run in each if not any(_departures(study, run))]
        for label, each in tuning.items()
    }
    words = {
        label: sorted({study.budget for study in each}) or [NOT_FOUND if tuning[label] else NOT_RECORDED]
        for label, each in paid.items()
    }
    found = [study for each in paid.values() for study in each]
    if len({study.effort for study in found}) > 1 or not all(paid.values()):
        yield Finding("tuning budget", words)
    elif len({study.trials for study in found}) > 1:
        yield Finding("trials within the same budget", words)


def _spaces(tuning: Tuning) -> Iterator[Finding]:
    """Compare what was tuned, and between which values.

    Other values of the same setting are said and not judged: optimizers differ in what suits them.
    """
    spaces = [study.space for each in tuning.values() for study, _ in each if study.space]
    if len({len(space) for space in spaces}) > 1:
        yield Finding("number of tuned settings", _say(tuning, _tuned))
    for key in dict.fromkeys(key for space in spaces for key in space):
        if len({space[key] for space in spaces if key in space}) > 1:
            yield Finding(f"tuning searched {key} in", _say(tuning, partial(_searched, key)))


def _say(tuning: Tuning, words: Callable[[Study, Run], Iterable[str]]) -> dict[str, list[str]]:
    """Collect what there is to say of each group; a group of which there is nothing is left out."""
    said = {
        label: sorted({text for study, run in each for text in words(study, run)})
        for label, each in tuning.items()
    }
    return {label: texts for label, texts in said.items() if texts}


def _departures(study: Study, run: Run) -> Iterator[str]:
    """Say where a run has not what tuning found."""
    if study.best_run is None:
        yield "its tuning found nothing: no trial came to its end"
    elif departures := study.departures(run):
        mine = " and ".join(f"{key}={value}" for key, (value, _) in departures.items())
        best = " and ".join(str(value) for _, value in departures.values())
        yield f"ran with {mine}, its tuning found {best}"


def _differences(study: Study, run: Run) -> Iterator[str]:
    """Say where the trials had not what a run has, the tuned settings aside."""
    for key, (value, trials) in study.differences(run).items():
        yield f"{key}={trials} (runs: {value})"


def _edges(study: Study, run: Run) -> Iterator[str]:
    """Say which of the best values have nothing that was tried beyond them; a higher one may be better."""
    for key, tried in study.tried.items():
        for name, end in (("lowest", min), ("highest", max)):
            if key in study.best and study.best[key] == end(tried, default=None):
                yield f"{key}={study.best[key]} is the {name} that was tried of {study.space[key]}"


def _tuned(study: Study, run: Run) -> Iterator[str]:
    """Say how many settings were tuned, and which."""
    if study.space:
        yield f"{len(study.space)}: {', '.join(study.space)}"


def _searched(key: str, study: Study, run: Run) -> Iterator[str]:
    """Say between which values a setting was tuned."""
    if key in study.space:
        yield study.space[key]


def _mid_schedule(groups: Iterable[Group]) -> list[Finding]:
    """Name where in its schedule each group is compared, if one is before its end."""
    if all(run.compared_step == run.total_steps for group in groups for run in group.runs):
        return []
    places = {
        group.label: sorted({f"step {run.compared_step:,} of {run.total_steps:,}" for run in group.runs})
        for group in groups
    }
    return [Finding("mid-schedule", places)]


def _cut(groups: Iterable[Group]) -> list[Finding]:
    """Name the runs that ended before their schedule did, and so before the learning rate had decayed."""
    lengths = {
        group.label: [
            f"{run.path.name} at step {run.last_step} of {run.compared_step}"
            for run in group.runs
            if not run.is_complete
        ]
        for group in groups
    }
    return [Finding("schedule cut", lengths)] if any(lengths.values()) else []
