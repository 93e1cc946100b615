"""The parts of a preparation in progress: what a unit comes to, committed on its own.

    .NAME.parts/                 beside the folder NAME that is to be
        plan.json                what is being prepared: a start with anything else is refused
        train_00007.bin          tokens of unit 7, for each split that has some
        validation_00007.bin
        part_00007.json          commits unit 7: counts and digests, and one of itself; written last

A killed preparation goes on from these, on one machine or on several that share the folder. Several may work
on the same unit: they write the same, each under names of its own until it is on the disk.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sophia_train import durable
from sophia_train.data.base import SPLITS, Split
from sophia_train.data.manifest import DTYPES, Shard
from sophia_train.data.tokenizers import Tokenizer
from sophia_train.data.units import SplitRule, Unit
from sophia_train.errors import DataError

BUFFER_TOKENS = 1 << 20
RESERVE_TOKENS = 1 << 24

Report = Callable[[int, int, int], None]
"""Called with documents, tokens and bytes of text of the unit so far."""


@dataclass(frozen=True)
class Part:
    """What a unit came to."""

    unit: str
    documents: dict[Split, int]
    shards: dict[Split, Shard | None]  # None for a split without tokens
    text_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens of both splits."""
        return sum(shard.tokens for shard in self.shards.values() if shard)


class PartsFolder:
    """The folder of a preparation in progress.

    Args:
        folder: the folder that is to be prepared; the parts are beside it.
        units: of the corpus, in order.
        plan: JSON that says what is being prepared.
    """

    def __init__(self, folder: Path, units: Sequence[Unit], plan: dict[str, Any]) -> None:
        self.path = folder.with_name(f".{folder.name}.parts")
        self.units = units
        names = hashlib.sha256("\0".join(unit.name for unit in units).encode(errors="surrogateescape"))
        self.plan = {**plan, "units": len(units), "unit_names": names.hexdigest()}

    def begin(self, alone: bool) -> None:
        """Make the folder, or take up what is in it.

        Args:
            alone: nobody else is at work in it, so that what a killed process has left can be removed.

        Raises:
            DataError: it was begun with another plan, and some unit of that is done.
            OSError: it cannot be written.
        """
        if alone and not self.any_done():
            self.remove()
        self.path.mkdir(parents=True, exist_ok=True)
        if alone:
            durable.remove_leftovers(self.path)
        path = self.path / "plan.json"
        if not path.exists():
            durable.write_json(path, self.plan, temporary=durable.one_of_many(path))
        try:
            begun = json.loads(path.read_bytes())
        except ValueError:
            begun = None
        if not isinstance(begun, dict):
            raise DataError(f"{path} is damaged; remove {self.path} to begin anew")
        for key in {**begun, **self.plan}:
            if begun.get(key) != self.plan.get(key):
                raise DataError(
                    f"{self.path} was begun with {key}={begun.get(key)}, not {self.plan.get(key)}; "
                    "remove it, or choose another data.folder"
                )

    def any_done(self) -> bool:
        """Whether there is anything to go on from."""
        return any(self.path.glob("part_*.json"))

    def find(self, index: int) -> Part | None:
        """Read what unit `index` came to, if it is done.

        Raises:
            DataError: its record is damaged, or of another unit or plan.
        """
        path = self._record(index)
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            content = None
        digest = content.pop("sha256", None) if isinstance(content, dict) else None
        if digest != self._digest(index, content):
            raise DataError(f"{path} is damaged or of another preparation; remove {self.path} to begin anew")
        shards = {split: content["shards"][split] and Shard(**content["shards"][split]) for split in SPLITS}
        return Part(**{**content, "shards": shards})

    def commit(self, index: int, part: Part) -> None:
        """Record what unit `index` came to, which must be on the disk: with this it is done."""
        content = dataclasses.asdict(part)
        record = self._record(index)
        content["sha256"] = self._digest(index, content)
        durable.write_json(record, content, temporary=durable.one_of_many(record))

    def remove(self) -> None:
        """Remove the folder, as far as that can be."""
        if self.path.exists():
            durable.before("rmtree", self.path)
            shutil.rmtree(self.path, ignore_errors=True)  # another process may be at it, too

    def _record(self, index: int) -> Path:
        return self.path / f"part_{index:05d}.json"

    def _digest(self, index: int, content: Any) -> str:
        text = json.dumps([self.plan, index, content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def prepare_unit(
    parts: PartsFolder, index: int, tokenizer: Tokenizer, rule: SplitRule, report: Report
) -> Part:
    """Tokenise one unit, each document preceded by end of text as in llm.c, and commit it.

    Memory holds one piece, its tokens, and a buffer for each split.

    Raises:
        DataError: the text cannot be read; so do other errors of the unit's pass through.
        OSError: writing failed; the unit is not done, and no temporary file is left of it.
    """
    unit = parts.units[index]
    writers = {
        split: ShardWriter(parts.path / f"{split}_{index:05d}.bin", dtype_of(tokenizer)) for split in SPLITS
    }
    documents: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    tokens = text_bytes = 0
    try:
        for document in unit.documents():
            split = rule.split_of(document)
            documents[split] += 1
            tokens += writers[split].append([tokenizer.end_of_text])
            for piece in document.pieces:
                tokens += writers[split].append(tokenizer.encode_array(piece))
                text_bytes += len(piece if isinstance(piece, bytes) else piece.encode(errors="replace"))
                report(sum(documents.values()), tokens, text_bytes)
        part = Part(unit.name, documents, {s: writers[s].close() for s in SPLITS}, text_bytes)
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    parts.commit(index, part)
    return part


def dtype_of(tokenizer: Tokenizer) -> str:
    """The smallest of the stored types that holds a tokenizer's ids."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Writes tokens into one file, under a temporary name until it is closed, hashed on the way.

    Disk space is reserved ahead of what is written, so that a full disk is met between writes. `append` and
    `close` raise `OSError`, and then `discard` is to be called.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self._temporary = durable.one_of_many(path)
        self._dtype = np.dtype(DTYPES[dtype])
        self._buffer = np.empty(BUFFER_TOKENS, self._dtype)
        self._buffered = self._written = self._reserved = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None

    def append(self, ids: Sequence[int] | np.ndarray) -> int:
        """Add tokens; returns how many."""
        array = np.asarray(ids, dtype=self._dtype)
        if self._buffered + len(array) > len(self._buffer):
            self._write(self._buffer[: self._buffered])
            self._buffered = 0
        if len(array) > len(self._buffer):
            self._write(array)
        else:
            self._buffer[self._buffered : self._buffered + len(array)] = array
            self._buffered += len(array)
        return len(array)

    def close(self) -> Shard | None:
        """Bring the file to the disk under its name; None, and no file, if there were no tokens."""
        self._write(self._buffer[: self._buffered])
        self._buffered = 0
        if self._file is None:
            return None
        self._file.truncate(self._written * self._dtype.itemsize)  # what was reserved in vain
        durable.sync_file(self._file)
        self._file.close()
        durable.rename(self._temporary, self.path)
        return Shard(self.path.name, self._written, self._digest.hexdigest())

    def discard(self) -> None:
        """Remove what was written, unless it has its name already."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of what could not be written
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _write(self, ids: np.ndarray) -> None:
        if not len(ids):
            return
        if self._file is None:
            durable.before("open", self._temporary)
            self._file = self._temporary.open("wb")
        if self._written + len(ids) > self._reserved:
            more = max(len(ids), min(RESERVE_TOKENS, self._written))  # small files reserve little
            self._reserved = self._written + more
            durable.reserve(self._file, self._reserved * self._dtype.itemsize)
        durable.before("write", self._temporary)
        self._file.write(ids.data)
        self._digest.update(ids.data)
        self._written += len(ids)


def link(source: Path, target: Path) -> None:
    """Give a file a second name; where the file system has no links, a copy."""
    durable.before("link", target)
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as original, target.open("wb") as copy:
            durable.reserve(copy, os.fstat(original.fileno()).st_size)
            shutil.copyfileobj(original, copy)
