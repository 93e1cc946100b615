"""Checkpoints: safetensors and a JSON manifest with SHA-256 digests; loading one runs no code.

    checkpoints/step_00000100/
        model.safetensors      parameters by name, those to evaluate and to use
        training.safetensors   parameters that training goes on with, for optimizers with others than those
        optimizer.safetensors  tensors of the optimizer's state, named parameter/key
        manifest.json          step, run state, the rest of the optimizer's state, config, digests

A checkpoint is written to a temporary folder, synced, and renamed: it is there whole, or not at all.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sophia_train import durable
from sophia_train.errors import ConfigError, DataError, MissingInputError
from sophia_train.optim.evaluation_weights import evaluation_weights, has_evaluation_weights

FORMAT_VERSION = 1
_TENSOR, _ORDER = "__tensor__", "__order__"
_FIX = "remove this checkpoint's folder to go on from an older one"


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, extra: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` and verify what the disk holds.

    Args:
        folder: the run's checkpoints folder.
        step: completed steps; names the checkpoint.
        model: the unwrapped model.
        optimizer: any torch optimizer over the model's parameters; its state may be nested.
        extra: JSON for the manifest: run state, config, versions.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: writing failed, as on a full disk, or there is a checkpoint of this step; nothing is left of
            the new one.
        DataError: what was read back differs from what was written.
    """
    tensors: dict[str, Tensor] = {}
    optimizer_state = _flatten(_state_by_name(model, optimizer), "", tensors)
    training = {name: _on_cpu(p) for name, p in model.named_parameters()}
    parts = {
        "model.safetensors": training,
        "optimizer.safetensors": {name: _on_cpu(tensor) for name, tensor in tensors.items()},
    }
    if has_evaluation_weights(optimizer):
        parts["training.safetensors"] = {name: tensor.clone() for name, tensor in training.items()}
        with evaluation_weights(optimizer):
            parts["model.safetensors"] = {name: _on_cpu(p).clone() for name, p in model.named_parameters()}
    path = folder / f"step_{step:08d}"
    size = sum(tensor.nbytes for part in parts.values() for tensor in part.values())
    with durable.commit_folder(path, reserve=size) as temporary:
        for name, part in parts.items():
            durable.before("write", temporary / name)
            save_file(part, temporary / name)
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            **extra,
            "optimizer_class": _class_name(optimizer),
            "optimizer": optimizer_state,
            "files": {name: _fingerprint(temporary / name) for name in parts},
        }
        manifest["sha256"] = _manifest_digest(manifest)
        durable.write_json(temporary / "manifest.json", manifest)
    verify(path)
    return path


def latest(folder: Path) -> Path | None:
    """Find the newest checkpoint of a run, or None."""
    return next(reversed(_all(folder)), None)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what killed processes left behind."""
    for path in _all(folder)[:-keep]:
        durable.remove_folder(path)
    durable.remove_leftovers(folder)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest, without looking at the files that it lists.

    Raises:
        MissingInputError: it is not there.
        DataError: it is damaged, altered, or of another format.
    """
    manifest_path = path / "manifest.json"
    try:
        manifest = json.loads(manifest_path.read_text())
        digest = manifest.pop("sha256")
        version = manifest["format_version"]
    except FileNotFoundError:
        raise MissingInputError(f"checkpoint {path} has no manifest.json; {_FIX}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{manifest_path} is damaged; {_FIX}") from None
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format_version={version}, this program reads {FORMAT_VERSION}")
    if digest != _manifest_digest(manifest):
        raise DataError(f"{manifest_path} is not what was saved (its sha256 differs); {_FIX}")
    return dict(manifest)


def verify(path: Path) -> dict[str, Any]:
    """Check a checkpoint against its digests.

    Returns:
        Its manifest.

    Raises:
        MissingInputError: a file is not there.
        DataError: a file or the manifest was altered.
    """
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        try:
            found = _fingerprint(path / name)
        except FileNotFoundError:
            raise MissingInputError(f"checkpoint file {path / name} is missing; {_FIX}") from None
        if found != expected:
            raise DataError(
                f"checkpoint file {path / name} is not what was saved (its sha256 differs); {_FIX}"
            )
    return manifest


def restore(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load a verified checkpoint into a model and an optimizer of the same shapes.

    Returns:
        The manifest.

    Raises:
        ConfigError: the checkpoint is of another model or optimizer.
        DataError, MissingInputError: as `verify`.
    """
    manifest = verify(path)
    trained = "training" if "training.safetensors" in manifest["files"] else "model"
    load_parameters(model, _load(path / f"{trained}.safetensors"), str(path))
    tensors = _load(path / "optimizer.safetensors")
    try:
        if manifest["optimizer_class"] != _class_name(optimizer):
            raise ValueError(f"it is of {manifest['optimizer_class']}")
        by_name = _unflatten(manifest["optimizer"], tensors)
        _load_state_by_name(model, optimizer, by_name)
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"optimizer state in {path} does not fit {_class_name(optimizer)}: {error}"
        ) from None
    return manifest


@torch.no_grad()
def load_parameters(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights by name into a model.

    Raises:
        ConfigError: names or shapes differ; the message names the first difference.
    """
    parameters = dict(model.named_parameters())
    for name in [*parameters, *weights]:
        if name not in weights or name not in parameters:
            where = "the model" if name in weights else source
            raise ConfigError(f"{source} holds another model: {name} is not in {where}; set model= to match")
        if weights[name].shape != parameters[name].shape:
            raise ConfigError(
                f"{source} holds another model: {name} is {list(weights[name].shape)} there and "
                f"{list(parameters[name].shape)} here; set model= to match"
            )
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def exists(path: Path) -> bool:
    """Whether a path is a checkpoint or a run folder with one."""
    return (path / "manifest.json").is_file() or latest(path / "checkpoints") is not None


def find(path: Path) -> Path:
    """Find the checkpoint that a path stands for: itself, or the newest of a run folder.

    Raises:
        MissingInputError: there is none.
    """
    if (path / "manifest.json").is_file():
        return path
    found = latest(path / "checkpoints")
    if found is None:
        raise MissingInputError(f"{path} is neither a checkpoint nor a run folder with one")
    return found


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify the weights of a checkpoint, or of a run's newest one.

    Returns:
        The parameters by name, and the manifest.
    """
    checkpoint = find(path)
    manifest = verify(checkpoint)
    return _load(checkpoint / "model.safetensors"), manifest


def _class_name(optimizer: Optimizer) -> str:
    parts = getattr(optimizer, "optimizers", [optimizer])  # of a MixedOptimizer
    return " + ".join(type(part).__name__ for part in parts)


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path} is not a safetensors file: {error}") from None


def _state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """State dict of an optimizer with parameters under their names instead of numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()
    groups = [{**g, "params": [order[number] for number in g["params"]]} for g in state["param_groups"]]
    states = {order[number]: s for number, s in state["state"].items() if s}  # reading one may make it, empty
    return {"state": states, "param_groups": groups}


def _load_state_by_name(model: nn.Module, optimizer: Optimizer, by_name: dict[str, Any]) -> None:
    """Take up a saved state; parameters without one, as those without a gradient so far, have none then."""
    current = _state_by_name(model, optimizer)["param_groups"]
    numbers = {name: n for n, name in enumerate(name for group in current for name in group["params"])}
    if [g["params"] for g in by_name["param_groups"]] != [g["params"] for g in current]:
        raise ValueError("its parameter groups differ")
    groups = [{**g, "params": [numbers[name] for name in g["params"]]} for g in by_name["param_groups"]]
    state = {numbers[name]: s for name, s in by_name["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for name, parameter in model.named_parameters():
        if name in by_name["state"]:  # torch has cast it all to the type of the parameter
            optimizer.state[parameter] = _as_saved(by_name["state"][name], optimizer.state[parameter])


def _as_saved(saved: Any, loaded: Any) -> Any:
    """What was saved, on the devices to which torch has loaded it."""
    if isinstance(saved, Tensor):
        return saved.to(loaded.device)
    if isinstance(saved, dict):
        return {key: _as_saved(value, loaded[key]) for key, value in saved.items()}
    if isinstance(saved, list):
        return [_as_saved(*pair) for pair in zip(saved, loaded, strict=True)]
    return saved


def _flatten(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Turn nested state into JSON, moving its tensors into `tensors` under their paths."""
    if isinstance(tree, Tensor):
        tensors[prefix] = tree
        return {_TENSOR: prefix} | ({} if tree.is_contiguous() else {_ORDER: _memory_order(tree)})
    if isinstance(tree, dict):
        return {
            key: _flatten(value, f"{prefix}/{key}" if prefix else str(key), tensors)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [_flatten(value, f"{prefix}/{index}", tensors) for index, value in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"optimizer state {prefix} is a {type(tree).__name__}, which a checkpoint cannot hold")


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return _laid_out(tensors[tree[_TENSOR]], tree.get(_ORDER))
        return {key: _unflatten(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_unflatten(value, tensors) for value in tree]
    return tree


def _memory_order(tensor: Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest in memory, where a file has them in their own order."""
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda dimension: -strides[dimension])


def _laid_out(tensor: Tensor, order: list[int] | None) -> Tensor:
    """Lay a tensor out as it was: products of matrices round differently for another layout."""
    if order is None:
        return tensor
    return tensor.permute(order).contiguous().permute([order.index(each) for each in range(tensor.ndim)])
