"""Token files on disk: prepared folders, nanoGPT `.bin` and llm.c `.bin`, read through one view."""

import dataclasses
import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sophia_train.data import manifest
from sophia_train.data.base import SPLITS, Data, Progress, Split
from sophia_train.data.manifest import DTYPES, Manifest
from sophia_train.errors import DataError, MissingInputError

LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_BYTES = 20240520, 1, 256 * 4
SCAN_TOKENS = 1 << 22
OPEN_FILES = 256  # of one split; a process may commonly have 1,024
N_SAMPLES, SAMPLE_TOKENS = 64, 1024  # what a fingerprint reads
PATTERNS: dict[Split, str] = {"train": "*train*.bin", "validation": "*val*.bin"}  # of nanoGPT's and llm.c's


class TokenShard(NamedTuple):
    """Where the tokens of one file are: `tokens` of `dtype` from byte `offset` on."""

    path: Path
    dtype: str
    offset: int
    tokens: int


class Tokens:
    """The tokens of one split: any number of memory-mapped files, read as if they were one array.

    Files are mapped when they are read; the most recent ones stay, for a map keeps its file open.
    """

    def __init__(self, shards: Sequence[TokenShard]) -> None:
        self.shards = [shard for shard in shards if shard.tokens]  # nothing can be mapped of an empty file
        self._ends = np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)
        self._maps: dict[int, np.ndarray] = {}  # the least recent first
        self._lock = threading.Lock()  # the loader's thread is not the only one that reads

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    @property
    def n_shards(self) -> int:
        """How many files the tokens are in."""
        return len(self.shards)

    def read(self, start: int, count: int) -> np.ndarray:
        """Read `count` tokens from position `start` as int64 [count].

        Raises:
            IndexError: they are not all there.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        out = np.empty(count, dtype=np.int64)
        done = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while done < count:
            array = self._array(shard)
            first = start + done - (int(self._ends[shard]) - len(array))
            part = array[first : first + count - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return out

    def _array(self, shard: int) -> np.ndarray:
        with self._lock:
            array = self._maps.pop(shard, None)
            if array is None:
                path, dtype, offset, tokens = self.shards[shard]
                # as a plain array, since slicing a memmap object costs more than the read
                array = np.asarray(np.memmap(path, dtype, "r", offset, (tokens,)))
                if len(self._maps) >= OPEN_FILES:
                    del self._maps[next(iter(self._maps))]
            self._maps[shard] = array
            return array

    def fingerprint(self) -> str:
        """Digest of the number of tokens and of 64 samples of them, the same however they are sharded."""
        digest = hashlib.sha256(str(len(self)).encode())
        for start in np.linspace(0, max(0, len(self) - SAMPLE_TOKENS), N_SAMPLES, dtype=np.int64):
            digest.update(self.read(int(start), min(SAMPLE_TOKENS, len(self))).astype("<i8").tobytes())
        return digest.hexdigest()


def open_prepared(
    folder: Path, split: Split, tokenizer: str, verify: bool, share: tuple[int, int] = (0, 1)
) -> Tokens:
    """Open one split of a prepared folder.

    Args:
        folder: with a manifest.
        split: which one.
        tokenizer: the name that the manifest must have.
        verify: compare every shard with its SHA-256, besides its size.
        share: number i and count n: compare only this one's of n shares of them.

    Raises:
        MissingInputError: the folder is not prepared, or a shard is missing.
        DataError: a shard is truncated or altered, or the tokenizer is another one.
    """
    record = Manifest.read(folder)
    if record.tokenizer != tokenizer:
        raise DataError(
            f"{folder} was prepared with tokenizer={record.tokenizer}, not with data.tokenizer={tokenizer}; "
            f"set data.tokenizer to {record.tokenizer}, or use another folder"
        )
    shards = [TokenShard(folder / s.file, DTYPES[record.dtype], 0, s.tokens) for s in record.shards[split]]
    part, parts = share
    for number, (shard, saved) in enumerate(zip(shards, record.shards[split], strict=True)):
        check_shard(shard, saved.sha256 if verify and number % parts == part else None)
    return Tokens(shards)


def check_shard(shard: TokenShard, sha256: str | None) -> None:
    """Check a prepared shard's size and, unless `sha256` is None, its content; raises as `open_prepared`."""
    size, expected = _size(shard.path), shard.tokens * np.dtype(shard.dtype).itemsize
    fix = f"copy it again, or remove {shard.path.parent} and prepare it anew"
    if size != expected:
        raise DataError(f"{shard.path} is truncated or altered: {size:,} bytes, not {expected:,}; {fix}")
    if sha256 is not None:
        with shard.path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise DataError(f"{shard.path} is altered: its SHA-256 is not the manifest's; {fix}")


@dataclass(frozen=True, kw_only=True)
class TokenFiles(Data):
    """Token files that exist already, of any format found at `path`.

    Args:
        tokenizer: what the tokens were made with.
        path: a prepared folder (with `manifest.json`), a folder of `*train*.bin` and `*val*.bin` files, or
            one `.bin` file. A `.bin` file has llm.c's header or, as in nanoGPT, none; both hold uint16.
        validation_path: the `.bin` file to validate on, when `path` is one file.
        verify: read every file once before use: digests in a prepared folder, ids in range elsewhere.
    """

    tokenizer: str = "gpt2"
    path: str
    validation_path: str | None = None
    verify: bool = True

    def prepare(self, progress: Progress | None = None) -> None:
        """Check that both splits are there: token files need no preparation."""
        if not self._is_prepared():
            for split in SPLITS:
                self._files(split)

    def open(self, split: Split, share: tuple[int, int] = (0, 1)) -> Tokens:
        """Open the tokens of one split.

        Args:
            split: which one.
            share: number i and count n: verify only this one's of n shares of the files.

        Raises:
            MissingInputError: a file is not there.
            DataError: a file is truncated, altered, or has ids outside the tokenizer's vocabulary.
        """
        if self._is_prepared():
            return open_prepared(self._path, split, self.tokenizer_name, self.verify, share)
        tokens = Tokens([read_header(path) for path in self._files(split)])
        if self.verify:
            part, parts = share
            self._check_ids(tokens.shards[part::parts])
        return tokens

    def describe(self) -> str:
        """Say in one line what the data is, how many tokens, and where."""
        data = dataclasses.replace(self, verify=False)
        train, validation = (len(data.open(split)) for split in SPLITS)
        return f"token files, {train:,} + {validation:,} tokens ({self.tokenizer_name}) in {self.path}"

    @property
    def _path(self) -> Path:
        return Path(self.path).expanduser()

    def _is_prepared(self) -> bool:
        if not self._path.exists():
            raise MissingInputError(f"data.path={self.path} does not exist; give a folder or a .bin file")
        return (self._path / manifest.FILE_NAME).exists()

    def _files(self, split: Split) -> list[Path]:
        path = self._path
        if path.is_dir():
            if files := files_of(path, split):
                return files
            raise MissingInputError(
                f"data.path={path} has no {manifest.FILE_NAME} and no {PATTERNS[split]} file; "
                "give a folder with either"
            )
        if self.validation_path is None:
            raise MissingInputError(
                f"data.path={path} is one file; set data.validation_path to the .bin file to validate on"
            )
        return [path if split == "train" else Path(self.validation_path).expanduser()]

    def _check_ids(self, shards: Sequence[TokenShard]) -> None:
        vocab_size = self.load_tokenizer().vocab_size
        for shard in shards:
            whole = Tokens([shard])
            for start in range(0, len(whole), SCAN_TOKENS):
                largest = int(whole.read(start, min(SCAN_TOKENS, len(whole) - start)).max())
                if largest >= vocab_size:
                    raise DataError(
                        f"{shard.path} holds token {largest}, but data.tokenizer={self.tokenizer} has only "
                        f"{vocab_size}; set the tokenizer it was made with, or copy it again if it is damaged"
                    )


def files_of(folder: Path, split: Split) -> list[Path]:
    """List a split's files, by name, in a folder of nanoGPT's or llm.c's; there may be none."""
    return sorted(folder.glob(PATTERNS[split]))


def read_header(path: Path) -> TokenShard:
    """Find the tokens of a `.bin` file: all of it, or what follows llm.c's header.

    That header is 256 int32: magic number, version, number of tokens, and zeros.

    Raises:
        MissingInputError: the file is not there.
        DataError: its size and its header, or whole 16-bit tokens, do not agree.
    """
    size = _size(path)
    with path.open("rb") as file:
        header = np.frombuffer(file.read(12), dtype="<i4", count=3 if size >= 12 else 0)
    if len(header) and header[0] == LLMC_MAGIC:
        version, tokens = int(header[1]), int(header[2])
        if version != LLMC_VERSION:
            raise DataError(
                f"{path} has an llm.c header of version {version}; only {LLMC_VERSION} is known here"
            )
        if size != LLMC_HEADER_BYTES + 2 * tokens:
            raise DataError(
                f"{path} is truncated or altered: its header says {tokens:,} tokens, which is "
                f"{LLMC_HEADER_BYTES + 2 * tokens:,} bytes, not {size:,}; copy it again"
            )
        return TokenShard(path, "<u2", LLMC_HEADER_BYTES, tokens)
    if size % 2 or not size:
        raise DataError(f"{path} is truncated: {size:,} bytes are not whole 16-bit tokens; copy it again")
    return TokenShard(path, "<u2", 0, size // 2)


def _size(path: Path) -> int:
    if not path.is_file():
        raise MissingInputError(f"{path} is missing; copy it again or prepare the data anew")
    if not os.access(path, os.R_OK):
        raise MissingInputError(f"{path} cannot be read; mend its permissions")
    return path.stat().st_size
