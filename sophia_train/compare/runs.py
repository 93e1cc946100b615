"""Run folders as what can be compared: settings, the curve of the validation loss, and what was measured."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sophia_train import checkpoint
from sophia_train.errors import ConfigError, DataError, MissingInputError
from sophia_train.state import may_change
from sophia_train.trackers.base import AXES
from sophia_train.trackers.jsonl import FILE_NAME, read_metrics

SPEED = frozenset({"activation_checkpointing", "compile", "compile_cache", "micro_batch_size", "processes"})
"""Settings of which only the seconds depend, up to rounding."""

REQUIRED = {"seed": int, "batch_size": int, "model.block_size": int, "optimizer._target_": str}
"""Settings without which nothing can be compared."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        path: its folder.
        settings: its resolved settings, nested ones under dotted keys.
        total_steps: length of its schedule.
        curve: its evaluations in order: `step`, `tokens`, `seconds`, `flops`, and `val/loss` in nats a token,
            which may be NaN.
        unclipped_fraction: mean over the logged steps, the win rate; NaN if it was not logged.
        hessian_share: mean share of the time that went into Hessian passes; NaN if it was not logged.
        fingerprints: of the training and the validation tokens, from the newest checkpoint; empty if there
            is none.
        environment: versions, commit, device; empty if it was not written.
        reason: how its last invocation ended, in the run's own words.
    """

    path: Path
    settings: Mapping[str, Any]
    total_steps: int
    curve: Sequence[Mapping[str, float]]
    unclipped_fraction: float
    hessian_share: float
    fingerprints: Mapping[str, str]
    environment: Mapping[str, Any]
    reason: str

    @property
    def seed(self) -> int:
        """What the weights, the order of the data and all else that is random were drawn with."""
        return int(self.settings["seed"])

    @property
    def last_step(self) -> int:
        """Completed steps at the last evaluation."""
        return int(self.curve[-1]["step"])

    @property
    def is_complete(self) -> bool:
        """Whether it was evaluated at the end of its schedule."""
        return self.last_step == self.total_steps

    @property
    def is_comparable(self) -> bool:
        """Whether it has a finite loss at the end of its schedule."""
        return self.is_complete and math.isfinite(self.final_loss)

    @property
    def final_loss(self) -> float:
        """Loss of the last evaluation, in nats a token."""
        return self.curve[-1]["val/loss"]


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
        """Those with a finite loss at the end of their schedule, by seed."""
        return {run.seed: run for run in self.runs if run.is_comparable}


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        MissingInputError: it has no `metrics.jsonl` or no `config.json`.
        DataError: one of its files was cut, altered, or is something else; names file and line.
    """
    records = _records(path / FILE_NAME)
    config = _json(path / "config.json", needed=True)
    curve = [
        {key: float(record[key]) for key in (*AXES, "val/loss")} for record in records if "val/loss" in record
    ]
    if not curve:
        raise DataError(f"{path / FILE_NAME} has no val/loss; let the run go on to its first evaluation")
    settings = leaves(config)
    try:
        total_steps = _total_steps(settings)
        for key, kind in REQUIRED.items():
            if type(settings[key]) is not kind:
                raise TypeError(f"{key}={settings[key]!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path / 'config.json'} is not of a run ({type(error).__name__}: {error}); give a run folder"
        ) from None
    newest = checkpoint.latest(path / "checkpoints")
    return Run(
        path=path,
        settings=settings,
        total_steps=total_steps,
        curve=curve,
        unclipped_fraction=_mean(records, "optim/unclipped_fraction"),
        hessian_share=_mean(records, "perf/hessian_share"),
        fingerprints={} if newest is None else checkpoint.read_manifest(newest).get("data", {}),
        environment=_json(path / "environment.json", needed=False),
        reason=str(_json(path / "status.json", needed=False).get("reason", "not ended")),
    )


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Put runs that differ in nothing but the seed together, in the order of each group's first run.

    Names, folders, the machine, and settings that change the speed only do not count; the data's place does
    not where a checkpoint says which tokens they were.

    Raises:
        ConfigError: two runs of a group have the same seed: they are one sample, not two.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_identity(run), []).append(run)
    members = [tuple(sorted(each, key=lambda run: run.seed)) for each in found.values()]
    for each in members:
        for first, second in zip(each, each[1:], strict=False):
            if first.seed == second.seed:
                raise ConfigError(
                    f"{first.path} and {second.path} have the same settings and seed={first.seed}; "
                    "leave one of them out"
                )
    return [Group(label, each) for label, each in zip(_labels(members), members, strict=True)]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def is_compared(key: str) -> bool:
    """Whether the validation loss may depend on a setting, the seed aside."""
    if key in ("eval_interval", "init_from"):  # a run may go on with others; another run may not be compared
        return True
    counted = ("max_steps", "max_tokens")  # as the length that follows from them
    return not (may_change(key) or key == "seed" or key in counted)


def _records(path: Path) -> list[dict[str, Any]]:
    """Read all metrics; a file whose end is missing is an error here, where a resume would repair it."""
    if not path.is_file():
        raise MissingInputError(f"{path} is not there; give the folder of a run")
    records = read_metrics(path)
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        raise DataError(
            f"{path}, line {len(records) + 1}: the file ends within it; resume the run, or remove that line"
        )
    before = -1
    for number, record in enumerate(records, 1):
        wrong = [key for key in AXES if not _is_number(record.get(key)) or not math.isfinite(record[key])]
        if "val/loss" in record and not _is_number(record["val/loss"]):
            wrong.append("val/loss")
        if wrong:
            raise DataError(f"{path}, line {number}: no number for {', '.join(wrong)}; give a run's own file")
        if record["step"] <= before:
            raise DataError(
                f"{path}, line {number}: step {record['step']} after step {before}; "
                "restore the file of a single run"
            )
        before = record["step"]
    return records


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _json(path: Path, *, needed: bool) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        if needed:
            raise MissingInputError(f"{path} is not there; give the folder of a run") from None
        return {}
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: {error.msg}; restore the file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}, line 1: not text; restore the file") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}, line 1: not a JSON object; restore the file")
    return content


def _total_steps(settings: Mapping[str, Any]) -> int:
    """Length of the schedule, as the trainer has it: the lesser of `max_steps` and `max_tokens`."""
    lengths = []
    if settings["max_steps"] is not None:
        lengths.append(int(settings["max_steps"]))
    if settings["max_tokens"] is not None:
        tokens = settings["batch_size"] * settings["model.block_size"]
        lengths.append(max(1, settings["max_tokens"] // tokens))
    return min(lengths)


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [record[key] for record in records if _is_number(record.get(key))]
    values = [value for value in values if math.isfinite(value)]
    return fmean(values) if values else math.nan


def _identity(run: Run) -> str:
    same = {key: value for key, value in run.settings.items() if is_compared(key)}
    data = run.fingerprints or run.settings.get("data.path")
    return json.dumps([same, run.total_steps, data], sort_keys=True)


def _labels(members: Sequence[Sequence[Run]]) -> list[str]:
    """Name each group for its optimizer and estimator and, among those alike, for what else differs."""
    first = [each[0] for each in members]
    names = [_optimizer(run) for run in first]
    labels = []
    for name, run in zip(names, first, strict=True):
        alike = [other for other, others_name in zip(first, names, strict=True) if others_name == name]
        settings = [_shown(other) for other in alike]
        keys = sorted({key for each in settings for key in each})
        differing = [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]
        mine = _shown(run)
        parts = [f"{key.removeprefix('optimizer.')}={mine.get(key)}" for key in differing]
        labels.append(" ".join([name, *parts]))
    doubles = {label for label in labels if labels.count(label) > 1}  # the same settings on other tokens
    return [
        f"{label} ({run.path.name})" if label in doubles else label
        for label, run in zip(labels, first, strict=True)
    ]


def _optimizer(run: Run) -> str:
    name, estimator = (
        str(run.settings.get(f"{part}._target_", "")).rpartition(".")[2] for part in ("optimizer", "hessian")
    )
    return name if estimator in ("", "NoHessian") else f"{name} {estimator}"


def _shown(run: Run) -> dict[str, Any]:
    return {
        "steps": run.total_steps,
        **{key: value for key, value in run.settings.items() if is_compared(key)},
    }
