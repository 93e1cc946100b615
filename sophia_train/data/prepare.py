"""Turn a corpus into a prepared folder of token shards: in parallel, resumable, committed whole.

Units are prepared apart, by any number of processes and machines, into parts (`parts.py`); when all are
there, the folder is put together of them and appears with its manifest in one rename. The bytes depend on the
corpus and the settings only.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sophia_train import durable
from sophia_train.data import manifest
from sophia_train.data.base import SPLITS, Progress, Split
from sophia_train.data.manifest import DTYPES, TAIL, Manifest, Shard
from sophia_train.data.parts import Part, PartsFolder, ShardWriter, dtype_of, link
from sophia_train.data.token_files import TokenShard, check_shard
from sophia_train.data.tokenizers import Tokenizer
from sophia_train.data.units import SplitRule, Unit
from sophia_train.data.workers import prepare_units
from sophia_train.errors import ConfigError, DataError, MissingInputError, OutputError, StorageError

COPY_TOKENS = 1 << 20


def prepare(
    folder: Path,
    units: Sequence[Unit],
    tokenizer: Tokenizer,
    *,
    source: str,
    revision: str,
    rule: SplitRule,
    validation_shard_tokens: int = 100_000_000,
    workers: int = 1,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> None:
    """Prepare `folder`, unless that is done; what an earlier call has done of it is not done again.

    Args:
        folder: where to; must not hold anything else.
        units: of the corpus, in order.
        tokenizer: encodes them; ids are stored in 16 bits where the vocabulary fits.
        source: what the documents are, for the manifest.
        revision: which state of them.
        rule: which documents are held out. If that leaves a split empty, the last tokens are held out.
        validation_shard_tokens: tokens of a file of the validation split; one of training is a unit.
        workers: processes at work.
        share: (i, n) prepares units i, i + n, i + 2n, ... only, and leaves the rest to other calls; the call
            with (0, 1) does what is left and puts the folder together.
        progress: called now and then with documents, tokens and bytes of text so far, and at the end.

    Raises:
        ConfigError: there is no such share, or no worker.
        DataError: there are no documents, or a preparation with other settings was begun here, or what there
            is of it is damaged.
        OutputError: `folder` cannot be written.
        StorageError: the disk is full or fails.
        MissingInputError: a part that was done is gone.
        Interrupted: a worker was killed.
        KeyboardInterrupt: at once, workers included; units that are done are kept.
    """
    if not 0 <= share[0] < share[1]:
        raise ConfigError(
            f"shard={share[0]}/{share[1]} is not one of 0/{share[1]} to {share[1] - 1}/{share[1]}"
        )
    if workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    tokenizer.encode("")  # a vocabulary that cannot be had ends this before anything is written
    plan = {
        "source": source,
        "revision": revision,
        "tokenizer": tokenizer.name,
        "split_rule": rule.describe(),
        "validation_fraction": rule.fraction,
    }
    parts = PartsFolder(folder, units, plan)
    alone = share == (0, 1)
    with _storage_errors(folder), _turn(folder, alone) as is_last:
        if (folder / manifest.FILE_NAME).exists():
            if is_last():
                parts.remove()  # what a kill has left right after the last rename
            return
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        try:
            parts.begin(alone)
            prepare_units(parts, tokenizer, rule, workers, share, progress)
            if alone:
                _put_together(folder, parts, tokenizer, plan, validation_shard_tokens)
        finally:
            if not parts.any_done() and is_last():  # nothing to go on from
                parts.remove()
        if alone:
            parts.remove()


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill right after the last rename has left beside a prepared folder, if that can be."""
    parts = PartsFolder(folder, [], {})
    if parts.path.exists() or _lock_of(folder).exists():
        with contextlib.suppress(OSError), _turn(folder, alone=True):
            parts.remove()


def _put_together(
    folder: Path, parts: PartsFolder, tokenizer: Tokenizer, plan: dict[str, Any], validation_shard_tokens: int
) -> None:
    """Make the folder of the parts, which stay as they are until it is there."""
    done: list[Part] = []
    for index in range(len(parts.units)):
        part = parts.find(index)
        if part is None:
            raise MissingInputError(f"{parts.path} has lost what was done of it; start again")
        done.append(part)
    documents: dict[Split, int] = {split: sum(part.documents[split] for part in done) for split in SPLITS}
    if not any(documents.values()):
        parts.remove()
        raise DataError(f"{plan['source']} has no documents, so there is nothing to prepare in {folder}")
    dtype = DTYPES[dtype_of(tokenizer)]
    shards = {split: [shard for part in done if (shard := part.shards[split])] for split in SPLITS}
    for shard in shards["train"] + shards["validation"]:
        check_shard(TokenShard(parts.path / shard.file, dtype, 0, shard.tokens), shard.sha256)
    split_rule = plan["split_rule"]
    kept, held_out = shards["train"], shards["validation"]
    n_kept, held_out_from = sum(shard.tokens for shard in kept), 0
    if not (kept and held_out):
        kept = held_out = kept or held_out
        split_rule = TAIL
        tokens = sum(shard.tokens for shard in kept)
        n_kept = held_out_from = tokens - max(1, min(tokens - 1, round(tokens * plan["validation_fraction"])))
        tail = _read(parts.path, kept, n_kept, tokens, dtype)
        begun = sum(int(np.count_nonzero(ids == tokenizer.end_of_text)) for ids in tail)
        documents = {"train": sum(documents.values()) - begun, "validation": begun}
    if folder.is_dir():  # and empty, or this would not have begun
        folder.rmdir()
    with durable.commit_folder(folder) as temporary:
        train: list[Shard] = []
        for shard in kept:
            path = temporary / f"train_{len(train):05d}.bin"
            if n_kept >= shard.tokens:
                link(parts.path / shard.file, path)
                train.append(dataclasses.replace(shard, file=path.name))
            elif n_kept > 0:
                train.append(_write(path, _read(parts.path, [shard], 0, n_kept, dtype), tokenizer))
            n_kept -= shard.tokens
        validation: list[Shard] = []
        stop = sum(shard.tokens for shard in held_out)
        for start in range(held_out_from, stop, validation_shard_tokens):
            path = temporary / f"validation_{len(validation):05d}.bin"
            end = min(start + validation_shard_tokens, stop)
            validation.append(_write(path, _read(parts.path, held_out, start, end, dtype), tokenizer))
        Manifest(
            source=plan["source"],
            revision=plan["revision"],
            tokenizer=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            dtype=dtype_of(tokenizer),
            split_rule=split_rule,
            validation_fraction=plan["validation_fraction"],
            documents=documents,
            shards={"train": train, "validation": validation},
            text_bytes=sum(part.text_bytes for part in done),
        ).write(temporary)


def _read(folder: Path, shards: Sequence[Shard], start: int, stop: int, dtype: str) -> Iterator[np.ndarray]:
    """Read tokens `start` to `stop` of shards that follow each other, bounded at a time, and not mapped."""
    for shard in shards:
        first, last = max(0, start), min(stop, shard.tokens)
        for at in range(first, last, COPY_TOKENS):
            count = min(COPY_TOKENS, last - at)
            yield np.fromfile(folder / shard.file, dtype, count, offset=at * np.dtype(dtype).itemsize)
        start, stop = start - shard.tokens, stop - shard.tokens


def _write(path: Path, tokens: Iterable[np.ndarray], tokenizer: Tokenizer) -> Shard:
    writer = ShardWriter(path, dtype_of(tokenizer))
    try:
        for ids in tokens:
            writer.append(ids)
        shard = writer.close()
    except BaseException:
        writer.discard()
        raise
    assert shard is not None
    return shard


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextlib.contextmanager
def _turn(folder: Path, alone: bool) -> Iterator[Callable[[], bool]]:
    """Hold the folder's lock; yields what says, when the work is over, whether nobody else is at work.

    Shares of a job array work beside each other, but none beside a call that puts the folder together: who
    comes second waits here, and then finds what the first has done.
    """
    lock = _lock_of(folder)
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock.open("a+b") as file:  # NFS shares a lock with readers only, and gives it alone to writers
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)  # released however this process ends

            def is_last() -> bool:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return False  # and the one who has it will be asked this after us
                return True

            if _is_at(lock, file):
                try:
                    yield is_last
                finally:
                    if is_last():
                        lock.unlink(missing_ok=True)
                return
        # else its last owner removed it while this process waited: take the new one


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if folder.exists() and error.errno == errno.EEXIST:
            raise OutputError(
                f"data.folder={folder} is there but not prepared data; remove it or choose another folder"
            ) from None
        problem = error.strerror or str(error)
        if error.errno == errno.ENOSPC and "needed" not in problem:  # met in spite of what was reserved
            problem += f": {_free_bytes(folder):,} bytes free"
        reason = f"data.folder={folder} cannot be written ({problem})"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise OutputError(f"{reason}; choose another data.folder") from error
        raise StorageError(f"{reason}; free some space, then start again") from error


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
