"""Turn documents into a prepared folder of token shards, committed whole or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sophia_train import durable
from sophia_train.data import manifest
from sophia_train.data.base import SPLITS, Progress, Split
from sophia_train.data.manifest import DTYPES, Manifest, Shard
from sophia_train.data.token_files import Tokens, TokenShard
from sophia_train.data.tokenizers import Tokenizer
from sophia_train.errors import DataError, OutputError, StorageError

BUFFER_TOKENS = 1 << 20


class Document(NamedTuple):
    """One text, in pieces that bound the memory it takes; its key decides its split."""

    key: str
    pieces: Iterable[str | bytes]


def prepare(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    source: str,
    revision: str,
    validation_fraction: float,
    shard_tokens: int,
    progress: Progress | None = None,
) -> None:
    """Tokenise `documents` into `folder`, each preceded by end of text as in llm.c, unless that is done.

    The folder appears with its manifest in one rename, so a killed preparation leaves nothing that could be
    mistaken for data, and starting it again gives the same bytes. Memory holds one piece and its tokens.

    Args:
        folder: where to; must not hold anything else.
        documents: read once, in order.
        tokenizer: encodes them; ids are stored in 16 bits where the vocabulary fits.
        source: what the documents are, for the manifest.
        revision: which state of them.
        validation_fraction: the share of documents, by a hash of their keys, that is held out. If that leaves
            a split empty, the last tokens are held out instead.
        shard_tokens: tokens per file.
        progress: called after every piece.

    Raises:
        DataError: there are no documents.
        OutputError: `folder` cannot be written.
        StorageError: the disk is full or fails.
    """
    tokenizer.encode("")  # a vocabulary that cannot be had ends this before anything is written
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with _storage_errors(folder), _only_one(folder):
        if (folder / manifest.FILE_NAME).exists():
            return
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        with durable.commit_folder(folder) as temporary:
            writers = {split: _ShardWriter(temporary, split, dtype, shard_tokens) for split in SPLITS}
            counts: dict[Split, int] = dict.fromkeys(SPLITS, 0)
            tokens = text_bytes = 0
            for document in documents:
                split = split_of(document.key, validation_fraction)
                counts[split] += 1
                tokens += writers[split].append([tokenizer.end_of_text])
                for piece in document.pieces:
                    tokens += writers[split].append(tokenizer.encode(piece))
                    text_bytes += len(piece if isinstance(piece, bytes) else piece.encode(errors="replace"))
                    if progress:
                        progress(sum(counts.values()), tokens, text_bytes)
            shards = {split: writers[split].close() for split in SPLITS}
            rule = "documents"
            if not all(shards.values()):
                whole = shards["train"] or shards["validation"]
                if not whole:
                    raise DataError(f"{source} has no documents, so there is nothing to prepare in {folder}")
                rule = "tail"
                shards, counts = _hold_out_tail(
                    temporary, whole, dtype, shard_tokens, validation_fraction, tokenizer.end_of_text
                )
            Manifest(
                source=source,
                revision=revision,
                tokenizer=tokenizer.name,
                vocab_size=tokenizer.vocab_size,
                end_of_text=tokenizer.end_of_text,
                dtype=dtype,
                split_rule=rule,
                validation_fraction=validation_fraction,
                documents=counts,
                shards=shards,
            ).write(temporary)


def split_of(key: str, validation_fraction: float) -> Split:
    """Choose the split of a document by its key alone, the same on every machine and in any order."""
    digest = hashlib.blake2b(key.encode("utf-8", errors="surrogateescape"), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "little") < validation_fraction * 2**64 else "train"


class _ShardWriter:
    """Write one split's tokens into shards of equal size, hashed on the way."""

    def __init__(self, folder: Path, split: Split, dtype: str, shard_tokens: int) -> None:
        self._folder, self._split = folder, split
        self._dtype = np.dtype(DTYPES[dtype])
        self._shard_tokens = shard_tokens
        self._buffer: list[np.ndarray] = []
        self._buffered = 0
        self._written = 0  # tokens in the shard that is open
        self._shards: list[Shard] = []

    def append(self, ids: list[int] | np.ndarray) -> int:
        """Add tokens; returns how many."""
        self._buffer.append(np.asarray(ids, dtype=self._dtype))
        self._buffered += len(ids)
        if self._buffered >= BUFFER_TOKENS:
            self._flush()
        return len(ids)

    def close(self) -> list[Shard]:
        """Finish the last shard and return all."""
        self._flush(last=True)
        self._finish_shard()
        return self._shards

    def _flush(self, last: bool = False) -> None:
        ids = np.concatenate([np.empty(0, self._dtype), *self._buffer])
        self._buffer, self._buffered = [], 0
        while len(ids):
            if not self._written:
                self._begin_shard(min(len(ids), self._shard_tokens) if last else self._shard_tokens)
            part, ids = np.split(ids, [self._shard_tokens - self._written])
            durable.before("write", self._path)
            with self._path.open("r+b") as file:
                file.seek(self._written * self._dtype.itemsize)
                file.write(part.data)
            self._digest.update(part.data)
            self._written += len(part)
            if self._written == self._shard_tokens:
                self._finish_shard()

    def _begin_shard(self, reserve: int) -> None:
        self._path = self._folder / f"{self._split}_{len(self._shards):05d}.bin"
        self._digest = hashlib.sha256()
        with self._path.open("wb") as file:
            durable.reserve(file, reserve * self._dtype.itemsize)

    def _finish_shard(self) -> None:
        if self._written:
            os.truncate(self._path, self._written * self._dtype.itemsize)  # what was reserved in vain
            self._shards.append(Shard(self._path.name, self._written, self._digest.hexdigest()))
            self._written = 0


def _hold_out_tail(
    folder: Path, whole: list[Shard], dtype: str, shard_tokens: int, fraction: float, end_of_text: int
) -> tuple[dict[Split, list[Shard]], dict[Split, int]]:
    """Write the shards of one split again as two: all but the last tokens, and the last."""
    moved = [
        TokenShard((folder / s.file).rename(folder / f"whole_{s.file}"), DTYPES[dtype], 0, s.tokens)
        for s in whole
    ]
    tokens = Tokens(moved)
    held_out = max(1, round(len(tokens) * fraction))
    ranges: dict[Split, range] = {
        "train": range(0, len(tokens) - held_out, BUFFER_TOKENS),
        "validation": range(len(tokens) - held_out, len(tokens), BUFFER_TOKENS),
    }
    shards: dict[Split, list[Shard]] = {}
    documents: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    for split, starts in ranges.items():
        writer = _ShardWriter(folder, split, dtype, shard_tokens)
        for start in starts:
            ids = tokens.read(start, min(BUFFER_TOKENS, starts.stop - start))
            writer.append(ids)
            documents[split] += int(np.count_nonzero(ids == end_of_text))
        shards[split] = writer.close()
    for shard in moved:
        shard.path.unlink()
    return shards, documents


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; a second process waits here, and then finds the folder prepared."""
    lock = folder.with_name(f".{folder.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released by the system, however this process ends
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                try:
                    yield
                finally:
                    lock.unlink()
                return
        # else its last owner removed it while this process waited: take the new one


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if folder.exists() and error.errno == errno.EEXIST:
            raise OutputError(
                f"data.folder={folder} is there but not prepared data; remove it or choose another folder"
            ) from None
        reason = f"data.folder={folder} cannot be written ({error.strerror or error})"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise OutputError(f"{reason}; choose another data.folder") from error
        raise StorageError(f"{reason}; free some space, then start again") from error
