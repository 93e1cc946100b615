"""Runs that differ in nothing but the seed, as one group with a name."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sophia_train.compare.runs import Run, is_compared
from sophia_train.errors import ConfigError
from sophia_train.trackers.labels import optimizer_label

SHAPE = ("model.n_layer", "model.n_embd")
"""Settings that make the size of a model; losses are compared among models of one size."""

NAMED_SETTINGS = 3
"""Most settings that a label lists; a group with more is named for the folder of its first run."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed, by increasing seed.

    Attributes:
        label: names what sets it apart from the other groups.
        runs: at least one.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def complete(self) -> dict[int, Run]:
        """Those with a finite loss where they are compared, by seed."""
        return {run.seed: run for run in self.runs if run.is_comparable}

    @property
    def final_loss(self) -> float | None:
        """Mean loss of the complete runs, in nats a token; None if there is none."""
        losses = [run.final_loss for run in self.complete.values()]
        return fmean(losses) if losses else None

    @property
    def optimizer(self) -> str:
        """Classes of its optimizer and estimator, such as `Sophia GNB`."""
        return optimizer_name(self.runs[0].settings)

    @property
    def total_steps(self) -> int:
        """Length of its schedule."""
        return self.runs[0].total_steps

    @property
    def compared_step(self) -> int:
        """Where it is compared: the end of its schedule, or an earlier step that was asked for."""
        return self.runs[0].compared_step

    @property
    def parameters(self) -> int:
        """Size of its model, embeddings included."""
        return self.runs[0].parameters

    @property
    def shape(self) -> tuple[Any, ...]:
        """What models of one size have in common."""
        return shape_of(self.runs[0])


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Put runs that differ in nothing but the seed together.

    The groups of an optimizer stand together, by decreasing length, else in the order of their first runs.
    Names, folders, the machine, and settings that change the speed only do not count; the data's place does
    not where a checkpoint says which tokens they were.

    Raises:
        ConfigError: two runs of a group have the same seed: they are one sample, not two.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_identity(run), []).append(run)
    optimizers = list(dict.fromkeys(optimizer_name(each[0].settings) for each in found.values()))
    members = sorted(
        (tuple(sorted(each, key=lambda run: run.seed)) for each in found.values()),
        key=lambda each: (optimizers.index(optimizer_name(each[0].settings)), -each[0].total_steps),
    )
    for each in members:
        for first, second in zip(each, each[1:], strict=False):
            if first.seed == second.seed:
                raise ConfigError(
                    f"{first.path} and {second.path} have the same settings and seed={first.seed}; "
                    "leave one of them out"
                )
    return [Group(label, each) for label, each in zip(_labels(members), members, strict=True)]


def by_size(groups: Iterable[Group]) -> list[list[Group]]:
    """Part groups by the size of their models, the smallest first."""
    found: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        found.setdefault(group.shape, []).append(group)
    return sorted(found.values(), key=lambda each: each[0].parameters)


def counterpart(group: Group, others: Sequence[Group]) -> Group | None:
    """Find the group that takes the place of another one at another size, or that one itself.

    Returns:
        Of those with its optimizer and a finite loss where they are compared, the one that differs from it
        in the fewest settings, the model's aside; None if there is none.
    """
    if any(other is group for other in others):
        return group
    alike = [other for other in others if other.optimizer == group.optimizer and other.complete]
    return min(alike, key=lambda other: _differing(group, other), default=None)


def shape_of(run: Run) -> tuple[Any, ...]:
    """Layers and width of a run's model."""
    return tuple(run.settings.get(key) for key in SHAPE)


def optimizer_name(settings: Mapping[str, Any]) -> str:
    """Name the classes of optimizers and estimator, such as `AdamW`, `Sophia GNB` or `Muon + AdamW`.

    Args:
        settings: of a run, under dotted keys.
    """
    classes = {
        key: str(value).rpartition(".")[2] for key, value in settings.items() if key.endswith("._target_")
    }
    others = {name for key, name in classes.items() if key.startswith("optimizer.others.")}
    estimator = classes.get("hessian._target_", "NoHessian")
    return optimizer_label(classes.get("optimizer._target_", ""), estimator, others)


def size_name(parameters: int) -> str:
    """Write a size as people say it: 124M, 1.56B."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return str(parameters)


def _differing(one: Group, other: Group) -> int:
    """Count the settings, the model's aside, that two groups do not share."""
    first, second = one.runs[0].settings, other.runs[0].settings
    keys = {key for key in {*first, *second} if not key.startswith("model.")}
    return sum(first.get(key) != second.get(key) for key in keys)


def _identity(run: Run) -> str:
    same = {key: value for key, value in run.settings.items() if is_compared(key)}
    data = run.fingerprints or run.settings.get("data.path")
    return json.dumps([same, run.total_steps, data], sort_keys=True)


def _labels(members: Sequence[Sequence[Run]]) -> list[str]:
    """Name each group for its optimizer, its size and length if there are several, and what else it has."""
    first = [each[0] for each in members]
    several_sizes = len({shape_of(run) for run in first}) > 1
    several_lengths = len({run.total_steps for run in first}) > 1
    names = [
        optimizer_name(run.settings)
        + (f" {size_name(run.parameters)}" if several_sizes else "")
        + (f" {run.total_steps:,} steps" if several_lengths else "")
        for run in first
    ]
    labels = []
    for name, run in zip(names, first, strict=True):
        alike = [other for other, others_name in zip(first, names, strict=True) if others_name == name]
        settings = [_shown(other) for other in alike]
        keys = sorted({key for each in settings for key in each})
        differing = [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]
        mine = _shown(run)
        parts = [f"{key.removeprefix('optimizer.')}={_value(mine.get(key))}" for key in differing]
        labels.append(
            " ".join([name, *parts]) if len(parts) <= NAMED_SETTINGS else f"{name} ({run.path.name})"
        )
    doubles = {label for label in labels if labels.count(label) > 1}  # the same settings on other tokens
    return [
        f"{label} ({run.path.name})" if label in doubles else label
        for label, run in zip(labels, first, strict=True)
    ]


def _shown(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if is_compared(key)}


def _value(value: Any) -> str:
    """Write a setting in as many digits as tell it from others in practice."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
