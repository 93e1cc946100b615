"""Run folders as what can be compared: settings, the curve of the validation loss, and what was measured."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

from sophia_train import checkpoint
from sophia_train.errors import ConfigError, DataError, MissingInputError
from sophia_train.models.gpt2 import GPT2Config
from sophia_train.state import may_change
from sophia_train.trackers.base import AXES
from sophia_train.trackers.jsonl import FILE_NAME, read_metrics

SPEED = frozenset(
    {
        "activation_checkpointing",
        "compile",
        "compile_cache",
        "micro_batch_size",
        "parallel",
        "processes",
        "save_in_background",
        "shard_processes",
    }
)
"""Settings of which only the seconds depend, up to rounding."""

REQUIRED = {"seed": int, "batch_size": int, "model.block_size": int, "optimizer._target_": str}
"""Settings without which nothing can be compared."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        path: its folder.
        settings: its resolved settings, nested ones under dotted keys.
        parameters: number of its model's, embeddings included.
        total_steps: length of its schedule.
        compared_step: where it is compared: the end of its schedule, or an earlier step that was asked for.
        curve: its evaluations in order: `step`, `tokens`, `seconds`, `flops`, and `val/loss` in nats a token,
            which may be NaN. Seconds are of steady training, by the medians of what was logged: start-up,
            compilation, evaluations and interruptions are not in them. Where no speed was logged, they are
            those of the run's clock.
        unclipped_fraction: mean over the logged steps, the win rate; NaN if it was not logged.
        hessian_share: mean share of the time that went into Hessian passes; NaN if it was not logged.
        fingerprints: of the training and the validation tokens, from the newest checkpoint; empty if there
            is none.
        environment: versions, commit, device; empty if it was not written.
        reason: how its last invocation ended, in the run's own words.
    """

    path: Path
    settings: Mapping[str, Any]
    parameters: int
    total_steps: int
    compared_step: int
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
        """Whether it was evaluated at the step where it is compared."""
        return self.last_step == self.compared_step

    @property
    def is_comparable(self) -> bool:
        """Whether it has a finite loss at the step where it is compared."""
        return self.is_complete and math.isfinite(self.final_loss)

    @property
    def final_loss(self) -> float:
        """Loss of the last evaluation, in nats a token."""
        return self.curve[-1]["val/loss"]


def read_run(path: Path, at_step: int | None = None) -> Run:
    """Read a run folder.

    Args:
        path: the folder.
        at_step: compare there, in the middle of the schedule, and see nothing of what came after; None for
            the end of the schedule.

    Raises:
        ConfigError: the run is shorter than `at_step`, or was not evaluated until then.
        MissingInputError: it has no `metrics.jsonl` or no `config.json`.
        DataError: one of its files was cut, altered, or is something else; names file and line.
    """
    records = _records(path / FILE_NAME)
    config = read_json(path / "config.json", needed=True)
    settings = leaves(config)
    try:
        total_steps = _total_steps(settings)
        parameters = _parameters(settings)
        for key, kind in REQUIRED.items():
            if type(settings[key]) is not kind:
                raise TypeError(f"{key}={settings[key]!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path / 'config.json'} is not of a run ({type(error).__name__}: {error}); give a run folder"
        ) from None
    if at_step is not None and at_step > total_steps:
        raise ConfigError(
            f"--at-step {at_step} is beyond the {total_steps} steps of {path}; choose a lower one"
        )
    compared_step = at_step or total_steps
    records = [record for record in records if record["step"] <= compared_step]
    curve = [
        {key: float(record[key]) for key in (*AXES, "val/loss")} for record in records if "val/loss" in record
    ]
    seconds = _seconds_per_token(records)
    if seconds is not None:
        curve = [{**point, "seconds": point["tokens"] * seconds} for point in curve]
    if not curve and at_step is not None:
        raise ConfigError(f"{path} was not evaluated up to --at-step {at_step}; choose a higher one")
    if not curve:
        raise DataError(f"{path / FILE_NAME} has no val/loss; let the run go on to its first evaluation")
    newest = checkpoint.latest(path / "checkpoints")
    return Run(
        path=path,
        settings=settings,
        parameters=parameters,
        total_steps=total_steps,
        compared_step=compared_step,
        curve=curve,
        unclipped_fraction=_mean(records, "optim/unclipped_fraction"),
        hessian_share=_mean(records, "perf/hessian_share"),
        fingerprints={} if newest is None else checkpoint.read_manifest(newest).get("data", {}),
        environment=read_json(path / "environment.json", needed=False),
        reason=str(read_json(path / "status.json", needed=False).get("reason", "not ended")),
    )


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
        wrong = [key for key in AXES if not is_number(record.get(key)) or not math.isfinite(record[key])]
        if "val/loss" in record and not is_number(record["val/loss"]):
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


def is_number(value: Any) -> bool:
    """Whether it is a number of JSON that a float can hold; True and False are none."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def read_json(path: Path, *, needed: bool) -> dict[str, Any]:
    """Read an object; an empty one if there is no file and none is needed.

    Raises:
        MissingInputError: it is needed and not there.
        DataError: it is no JSON object; names file and line.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        if needed:
            raise MissingInputError(f"{path} is not there; give the folder that has it") from None
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


def _parameters(settings: Mapping[str, Any]) -> int:
    """Count what `GPT2` has, without building it: a large one takes seconds."""
    sizes = {field.name: settings.get(f"model.{field.name}", field.default) for field in fields(GPT2Config)}
    model = GPT2Config(**sizes)
    C, bias = model.n_embd, model.bias
    block = 12 * C * C + 2 * C + 11 * C * bias  # attention 4 C^2, MLP 8 C^2, two norms; their biases
    return model.n_layer * block + (model.padded_vocab_size + model.block_size + 1 + bias) * C


def _seconds_per_token(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Add the medians of what passes for training and for the Hessian take; None if no speed was logged.

    Not every logged stretch has a refresh of the Hessian: those that have count by their number.
    """
    training, hessian = [], []
    for record in records:
        speed, share = (record.get(key, 0.0) for key in ("perf/tokens_per_second", "perf/hessian_share"))
        if is_number(speed) and is_number(share) and 0 < speed < math.inf and 0 <= share < 1:
            training.append((1 - share) / speed)
            hessian += [share / speed] * (share > 0)
    if not training:
        return None
    return median(training) + (median(hessian) * len(hessian) / len(training) if hessian else 0.0)


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [record[key] for record in records if is_number(record.get(key))]
    values = [value for value in values if math.isfinite(value)]
    return fmean(values) if values else math.nan
