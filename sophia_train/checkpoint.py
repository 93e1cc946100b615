"""Checkpoints: safetensors and a JSON manifest with SHA-256 digests; loading one runs no code.

    checkpoints/step_00000100/
        model.safetensors      parameters by name, those to evaluate and to use
        training.safetensors   parameters that training goes on with, for optimizers with others than those
        optimizer.safetensors  tensors of the optimizer's state, named parameter/key
        manifest.json          step, run state, the rest of the optimizer's state, config, digests

Several processes write at the same time, each the rows of its part: model-00001-of-00004.safetensors. Any
number of processes can load them. A checkpoint is written to a temporary folder, synced, and renamed: it is
there whole, or not at all.
"""

import errno
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from sophia_train import durable
from sophia_train.checkpoint_files import Rows, SavedTensors, file_name, fingerprint
from sophia_train.checkpoint_state import load_state, state_of
from sophia_train.collectives import gather, rank, together, world_size
from sophia_train.errors import ConfigError, DataError, MissingInputError, RunError, as_run_error
from sophia_train.optim import shards
from sophia_train.optim.evaluation_weights import evaluation_weights, has_evaluation_weights

FORMAT_VERSION = 1
_FIX = "remove this checkpoint's folder to go on from an older one"

Tensors = dict[str, Tensor]


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, extra: Mapping[str, Any]) -> Path:
    """Write a checkpoint and read it back: a `Save`, begun and finished.

    Returns:
        The checkpoint's folder.
    """
    return Save(folder, step, model, optimizer, extra).finish()


class Save:
    """A checkpoint on its way to the disk; all processes of a run begin it, and finish it, together.

    Args:
        folder: the run's checkpoints folder, the same for all processes.
        step: completed steps; names the checkpoint.
        model: the unwrapped model.
        optimizer: any torch optimizer over the model's parameters; its state may be nested.
        extra: JSON for the manifest: run state, config, versions.
        in_background: copy everything, and write the copy while the training goes on.

    Raises:
        OSError: there is no room for it, or there is a checkpoint of this step.
        TypeError: the optimizer's state holds what a checkpoint cannot.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        extra: Mapping[str, Any],
        *,
        in_background: bool = False,
    ) -> None:
        self.path = folder / f"step_{step:08d}"
        self._files, optimizer_state = _snapshot(model, optimizer, copied=in_background)
        self._manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            **extra,
            "optimizer_class": _class_name(optimizer),
            "optimizer": optimizer_state,
        }
        size = sum(gather(sum(tensor.nbytes for file in self._files.values() for tensor in file.values())))
        begun = together(lambda: durable.begin_folder(self.path, size) if rank() == 0 else None)
        assert begun[0] is not None
        self._temporary = begun[0]
        self._fingerprints: dict[str, Any] = {}
        self._error: OSError | RunError | None = None
        self._thread = threading.Thread(target=self._write, daemon=True) if in_background else None
        if self._thread is None:
            self._write()
        else:
            self._thread.start()

    @property
    def written(self) -> bool:
        """Whether this process has written its part, or failed to."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> Path:
        """Wait for what is still being written and read back, and commit the checkpoint.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError, DataError: writing failed on some process, or what was read back differs from what was
                written; nothing is left of the checkpoint.
        """
        if self._thread is not None:
            self._thread.join()
        try:
            fingerprints = dict(file for files in together(self._result) for file in files.items())
            together(lambda: self._commit(fingerprints) if rank() == 0 else None)
        except BaseException:
            if rank() == 0:
                durable.abandon_folder(self._temporary)
            raise
        return self.path

    def _write(self) -> None:
        try:
            for name, tensors in self._files.items():
                path = self._temporary / name
                durable.before("write", path)
                save_file(tensors, path)
                with path.open("rb") as file:
                    durable.sync_file(file)
                self._fingerprints[name] = fingerprint(path)
                _compare(path, tensors)
        except SafetensorError as error:
            self._error = OSError(errno.EIO, str(error), str(path))
        except (OSError, RunError) as error:
            self._error = error
        except Exception as error:  # of which nobody else would hear, on a thread of its own
            self._error = as_run_error(error)
        self._files = {}

    def _result(self) -> dict[str, Any]:
        if self._error is not None:
            raise self._error
        return self._fingerprints

    def _commit(self, fingerprints: Mapping[str, Any]) -> None:
        manifest = {**self._manifest, "files": dict(sorted(fingerprints.items()))}
        manifest["sha256"] = _manifest_digest(manifest)
        durable.write_json(self._temporary / "manifest.json", manifest)
        durable.finish_folder(self._temporary, self.path)
        read_manifest(self.path)


def _compare(path: Path, written: Tensors) -> None:
    """Check that a file holds the bits that were written to it.

    Raises:
        DataError: it does not.
    """
    found = SavedTensors([path])
    for name, tensor in written.items():
        if name not in found or not torch.equal(_bits(found[name][:]), _bits(tensor)):
            raise DataError(f"{path} does not hold what was written to it ({name} differs); check the disk")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


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
        raise DataError(f"{path} has format_version={version}, this program reads {FORMAT_VERSION}; {_FIX}")
    if digest != _manifest_digest(manifest):
        raise DataError(f"{manifest_path} is not what was saved (its sha256 differs); {_FIX}")
    return dict(manifest)


def verify(path: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Check a checkpoint, or one of `parts` shares of its files, against its digests.

    Returns:
        Its manifest.

    Raises:
        MissingInputError: a file is not there.
        DataError: a file or the manifest was altered.
    """
    manifest = read_manifest(path)
    for name, expected in list(manifest["files"].items())[part::parts]:
        try:
            found = fingerprint(path / name)
        except FileNotFoundError:
            raise MissingInputError(f"checkpoint file {path / name} is missing; {_FIX}") from None
        if found != expected:
            raise DataError(
                f"checkpoint file {path / name} is not what was saved (its sha256 differs); {_FIX}"
            )
    return manifest


def restore(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load a verified checkpoint into a model and an optimizer of the same shapes, sharded or not.

    Returns:
        The manifest.

    Raises:
        ConfigError: the checkpoint is of another model or optimizer.
        DataError, MissingInputError: as `verify`.
    """
    manifest = _verify_together(path)
    weights = tensors_of(path, manifest, "training") or tensors_of(path, manifest, "model")
    load_parameters(model, weights, str(path))
    try:
        if manifest["optimizer_class"] != _class_name(optimizer):
            raise ValueError(f"it is of {manifest['optimizer_class']}")
        load_state(model, optimizer, manifest["optimizer"], tensors_of(path, manifest, "optimizer"))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"optimizer state in {path} does not fit {_class_name(optimizer)}: {error}"
        ) from None
    return manifest


@torch.no_grad()
def load_parameters(model: nn.Module, weights: Mapping[str, Rows], source: str) -> None:
    """Copy weights by name into a model; into a sharded one the rows that this process keeps.

    Raises:
        ConfigError: names or shapes differ; the message names the first difference.
    """
    parameters = dict(model.named_parameters())
    for name in [*parameters, *weights]:
        if name not in weights or name not in parameters:
            where = "the model" if name in weights else source
            raise ConfigError(f"{source} holds another model: {name} is not in {where}; set model= to match")
        theirs, ours = list(weights[name].shape), list(parameters[name].shape)
        if theirs != ours:
            raise ConfigError(
                f"{source} holds another model: {name} is {theirs} there and {ours} here; set model= to match"
            )
    for name, parameter in parameters.items():
        shards.local(parameter).copy_(weights[name][shards.rows_of(parameter)])


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
        raise MissingInputError(
            f"{path} is neither a checkpoint nor a run folder with one; name one of those"
        )
    return found


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify the weights of a checkpoint, or of a run's newest one; all processes call it together.

    Returns:
        The parameters by name, and the manifest.

    Raises:
        DataError, MissingInputError: as `verify`, on all processes.
    """
    checkpoint = find(path)
    manifest = _verify_together(checkpoint)
    return {name: saved[:] for name, saved in tensors_of(checkpoint, manifest, "model").items()}, manifest


def tensors_of(path: Path, manifest: Mapping[str, Any], kind: str) -> SavedTensors:
    """Find the tensors of a kind ("model", "training", "optimizer") in the files that a manifest lists.

    Raises:
        DataError: a file is not a safetensors file.
    """
    return SavedTensors(path / name for name in sorted(manifest["files"]) if name.startswith(kind))


def _verify_together(path: Path) -> dict[str, Any]:
    """Verify a checkpoint, each process some of its files."""
    return together(lambda: verify(path, rank(), world_size()))[rank()]


def _class_name(optimizer: Optimizer) -> str:
    parts = getattr(optimizer, "optimizers", [optimizer])  # of a MixedOptimizer
    return " + ".join(type(part).__name__ for part in parts)


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _snapshot(model: nn.Module, optimizer: Optimizer, copied: bool) -> tuple[dict[str, Tensors], Any]:
    """Gather this process's part of what is to be saved, by file, and the rest of the optimizer's state."""
    parameters = dict(model.named_parameters())
    optimizer_state, of_optimizer = state_of(model, optimizer)
    part, parts = rank(), world_size()
    if shards.is_sharded(parameters.values()):
        part, parts = shards.place_of(parameters.values())
        if not shards.in_first_copy(parameters.values()):
            return {}, optimizer_state

    def own(tensors: Mapping[str, Tensor], copied: bool) -> Tensors:
        rows = {name: _own_rows(tensor, part, parts) for name, tensor in tensors.items()}
        kept = {name: tensor for name, tensor in rows.items() if part == 0 or tensor.numel()}
        return {name: tensor.detach().to("cpu", copy=copied).contiguous() for name, tensor in kept.items()}

    kinds = {"model": own(parameters, copied), "optimizer": own(of_optimizer, copied)}
    if has_evaluation_weights(optimizer):
        kinds["training"] = own(parameters, copied=True)
        with evaluation_weights(optimizer):
            kinds["model"] = own(parameters, copied=True)
    return {file_name(kind, part, parts): tensors for kind, tensors in kinds.items()}, optimizer_state


def _own_rows(tensor: Tensor, part: int, parts: int) -> Tensor:
    """The rows of a tensor that a process writes; it is sharded that way, or the same on all processes."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if tensor.ndim == 0:
        return tensor if part == 0 else tensor.new_empty(0)
    return tensor[shards.chunk(len(tensor), part, parts)]


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
