"""What a run folder says of its run: how it stands, what it cost, what came out, which settings it had."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from sophia_train import checkpoint
from sophia_train.compare.runs import leaves
from sophia_train.config import RunConfig, build, to_json
from sophia_train.errors import DataError
from sophia_train.models.gpt2 import GPT2
from sophia_train.state import may_change
from sophia_train.trackers.jsonl import FILE_NAME, read_metrics


@dataclass(frozen=True)
class RunResult:
    """A run as its folder has it.

    Attributes:
        code: exit code of its last invocation that ended; None if there is none.
        tokens: target tokens seen.
        flops: spent, the Hessian's passes included.
        seconds: spent training, over all invocations.
        curve: validation loss in nats a token, by step; may be NaN.
    """

    DIVERGED: ClassVar[int] = DataError.code

    code: int | None
    tokens: int
    flops: float
    seconds: float
    curve: Mapping[int, float]

    @property
    def finished(self) -> bool:
        """Whether it has reached its end."""
        return self.code == 0

    @property
    def diverged(self) -> bool:
        """Whether it was given up since its numbers were not finite; it would be again."""
        return self.code == self.DIVERGED

    @property
    def validation_loss(self) -> float:
        """Loss of the last evaluation, in nats a token; infinite if it diverged or there is none."""
        loss = math.inf if self.diverged or not self.curve else self.curve[max(self.curve)]
        return math.inf if math.isnan(loss) else loss


def read_result(folder: Path) -> RunResult:
    """Read how the run in a folder stands; nothing has happened where nothing is.

    Raises:
        DataError: one of its files was altered.
    """
    status = _json(folder / "status.json")
    records = _records(folder)
    newest = checkpoint.latest(folder / "checkpoints")
    # A run that was stopped saves where it does not log; one that was killed logged what it did not save.
    places: list[dict[str, Any]] = [{"tokens": 0, "flops": 0.0, "seconds": 0.0}, *records[-1:]]
    if newest is not None:
        places.append(checkpoint.read_manifest(newest)["state"])
    last = max(places, key=lambda place: place["tokens"])
    return RunResult(
        code=status.get("code"),
        tokens=last["tokens"],
        flops=last["flops"],
        seconds=last["seconds"],
        curve=_curve(records),
    )


def read_curve(folder: Path) -> dict[int, float]:
    """Read the validation losses so far, by step, of a run that may be in progress.

    Raises:
        DataError: its metrics were altered.
    """
    return _curve(_records(folder))


def settings_digest(config: RunConfig) -> str:
    """Digest the settings that a run's result depends on, the seed aside: 16 hexadecimal digits."""
    counted = {
        key: value
        for key, value in leaves(to_json(config)).items()
        if not may_change(key) and key not in ("seed", "run_dir", "name")
    }
    text = json.dumps(counted, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def planned_flops(config: RunConfig) -> float:
    """Count the FLOPs of a whole run, the Hessian's passes included."""
    with torch.device("meta"):
        model = GPT2(config.model)
    estimator = build(config.hessian)
    hessian = estimator.passes * estimator.size(config.batch_size) / estimator.interval / config.batch_size
    return planned_tokens(config) * model.flops_per_token() * (1 + hessian)


def planned_tokens(config: RunConfig) -> int:
    """Count the target tokens of a whole run."""
    block_size = config.model.block_size
    return config.total_steps(block_size) * config.batch_size * block_size


def discard_weights(folder: Path) -> None:
    """Remove weights and optimizer state of a finished run; metrics, settings and manifests stay."""
    for path in (folder / "checkpoints").glob("*/*.safetensors"):
        path.unlink()


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / FILE_NAME
    return read_metrics(path) if path.exists() else []


def _curve(records: list[dict[str, Any]]) -> dict[int, float]:
    return {record["step"]: record["val/loss"] for record in records if "val/loss" in record}


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged; remove the folder to begin that run anew") from error
