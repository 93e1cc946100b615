"""What is unequal between groups of runs, beyond the optimizer and its rates."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sophia_train.compare.groups import Group
from sophia_train.compare.runs import SPEED, Run, is_compared
from sophia_train.compare.tuning import Study, studies_of

UNKNOWN = "unknown: no checkpoint"

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


@dataclass(frozen=True)
class Finding:
    """One thing that is not the same for all runs.

    Attributes:
        what: names it.
        values: what each group has, by its label; several where its runs differ.
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
    """Compare what was spent on finding the settings of each group; nothing on record is no agreement."""
    if not studies:
        return []
    budgets = {
        group.label: [study.budget for study in studies_of(group, studies)] or ["not recorded"]
        for group in groups
    }
    trials = {label: sorted({budget.partition(",")[0] for budget in each}) for label, each in budgets.items()}
    found = {trial for each in trials.values() for trial in each}
    return [Finding("tuning budget", budgets)] if len(found) > 1 else []


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
