"""The tensors of a checkpoint as files: cut into parts of their rows, one for each process that writes.

A kind of tensors (the model's, say) is `model.safetensors`, or `model-00001-of-00004.safetensors` and so on,
where every tensor has its first rows in the first file. What has no rows is in the first file alone.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sophia_train.errors import DataError


class Rows(Protocol):
    """A tensor, or what reads one: its shape is known, its rows can be had."""

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Some of its rows."""


class SavedTensor:
    """A tensor in the files of a checkpoint, which is read when rows are asked for.

    Args:
        name: its name there.
        files: those of its parts, in order.
    """

    def __init__(self, name: str, files: list[Any]) -> None:
        self.name = name
        self.files = files
        shapes = [file.get_slice(name).get_shape() for file in files]
        self.lengths = [shape[0] if shape else 1 for shape in shapes]
        self.shape = torch.Size([sum(self.lengths), *shapes[0][1:]] if shapes[0] else [])

    def __getitem__(self, rows: slice) -> Tensor:
        """Read some rows; of a tensor without rows, all of it."""
        if not self.shape:
            return self.files[0].get_tensor(self.name)
        start, stop, _ = rows.indices(self.shape[0])
        found, first = [], 0
        for file, length in zip(self.files, self.lengths, strict=True):
            low, high = max(start - first, 0), min(stop - first, length)
            if low < high:
                whole = (low, high) == (0, length)
                found.append(file.get_tensor(self.name) if whole else file.get_slice(self.name)[low:high])
            first += length
        if not found:
            return self.files[0].get_slice(self.name)[:0]
        return found[0] if len(found) == 1 else torch.cat(found)


class SavedTensors(Mapping[str, SavedTensor]):
    """All tensors of a kind.

    Args:
        paths: its files, in order.

    Raises:
        DataError: a file is not a safetensors file.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[str, list[Any]] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise DataError(f"{path} is not a safetensors file: {error}") from None
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                self._files.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> SavedTensor:
        """Find a tensor by its name."""
        return SavedTensor(name, self._files[name])

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._files)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._files)


def file_name(kind: str, part: int, parts: int) -> str:
    """Name of the file with one of the parts of a kind."""
    return f"{kind}.safetensors" if parts == 1 else f"{kind}-{part + 1:05d}-of-{parts:05d}.safetensors"


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
