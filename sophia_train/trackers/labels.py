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

NOT_COMPARED = frozenset({"data.folder", "data.path", "hessian.micro_batch_size"})
"""What in those groups a resumed run may have another value of; the same tokens may lie in several places."""

TRIALS = "purpose:tuning"
"""Tag of the runs that search for settings, which are no samples of the settings that were found."""


def labels(run: RunInfo) -> dict[str, str]:
    """Name a run's `optimizer`, `model`, `setup`, `data`, `experiment`; what its settings lack is left out.

    Such as `Sophia GNB`, `12x768` (layers x width), `Sophia GNB 12x768 2,000 steps`, `fineweb-edu` and
    `gpt2_125m_sophia_g`: the run's name without what a sweep adds to it. A trial of `scripts/tune.py`, known
    by its name, also has the `purpose` that is `tuning`.
    """
    optimizer, model = _optimizer(run.config), _model(run.config.get("model", {}))
    found = {
        "optimizer": optimizer,
        "model": model,
        "setup": " ".join(filter(None, [optimizer, model, f"{run.total_steps:,} steps"])),
        "data": _data(run.config.get("data", {})),
        "experiment": re.split(r"-[\w.]+=", run.name)[0],
        "purpose": "tuning" if re.search(r"_trial_\d{3,}$", run.name) else "",
    }
    return {kind: label for kind, label in found.items() if label}


def group_name(run: RunInfo) -> str:
    """Name the group of the runs that differ in the seed alone: their setup, and a digest of the rest."""
    text = json.dumps([_compared(run.config), dict(run.data)], sort_keys=True, default=str)
    return f"{labels(run)['setup']} {hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def optimizer_label(optimizer: str, estimator: str, others: Iterable[str]) -> str:
    """Name optimizers and estimator by their classes, such as `AdamW`, `Sophia GNB` or `Muon + AdamW`."""
    first = optimizer if estimator == "NoHessian" else f"{optimizer} {estimator}".strip()
    return " + ".join([first, *sorted(others)])


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    compared = {}
    for group in COMPARED:
        content = config.get(group)
        if isinstance(content, Mapping):
            content = {key: content[key] for key in content if f"{group}.{key}" not in NOT_COMPARED}
        compared[group] = content
    return compared


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
