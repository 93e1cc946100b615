"""What a run is called beside others: for tags, and for the group of those that differ in the seed alone."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from sophia_train.trackers.base import RunInfo

COMPARED = (
    "batch_size",
    "data",
    "gamma",
    "gradient_clip",
    "gradient_type",
    "hessian",
    "max_steps",
    "max_tokens",
    "model",
    "optimizer",
    "precision",
    "schedule",
    "eval_tokens",
    "strict",
)
"""Settings, and groups of them, that set runs apart; neither the seed nor what changes no result."""


def labels(run: RunInfo) -> dict[str, str]:
    """Name a run's `optimizer`, `model`, `data` and `experiment`; what its settings lack is left out.

    Such as `Sophia GNB`, `12x768` (layers x width), `fineweb-edu` and `gpt2_125m_sophia_g`: the run's name
    without what a sweep adds to it.
    """
    found = {
        "optimizer": _optimizer(run.config),
        "model": _model(run.config.get("model", {})),
        "data": _data(run.config.get("data", {})),
        "experiment": re.split(r"-[\w.]+=", run.name)[0],
    }
    return {kind: label for kind, label in found.items() if label}


def group_name(run: RunInfo) -> str:
    """Name the group of the runs that differ in the seed alone: optimizer, model and a digest of the rest."""
    compared = {key: run.config.get(key) for key in COMPARED}
    text = json.dumps(compared, sort_keys=True, default=str)
    names = labels(run)
    words = [names[kind] for kind in ("optimizer", "model") if kind in names]
    return " ".join([*words, hashlib.blake2b(text.encode(), digest_size=4).hexdigest()])


def optimizer_label(optimizer: str, estimator: str, others: Iterable[str]) -> str:
    """Name optimizers and estimator by their classes, such as `AdamW`, `Sophia GNB` or `Muon + AdamW`."""
    first = optimizer if estimator == "NoHessian" else f"{optimizer} {estimator}".strip()
    return " + ".join([first, *sorted(others)])


def _optimizer(config: Mapping[str, Any]) -> str:
    optimizer, estimator = config.get("optimizer", {}), _class(config.get("hessian", {}))
    others = {_class(other) for other in (optimizer.get("others") or {}).values()}
    return optimizer_label(_class(optimizer), estimator, others)


def _model(model: Mapping[str, Any]) -> str:
    shape = [str(model[key]) for key in ("n_layer", "n_embd") if key in model]
    return "x".join(shape) if len(shape) == 2 else ""


def _data(data: Mapping[str, Any]) -> str:
    place = data.get("repo") or data.get("path")
    return PurePath(str(place)).name if place else _class(data)


def _class(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_", "")).rpartition(".")[2]
