"""Looks into token files, whole or in the making, in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sophia_train.data import manifest
from sophia_train.data.base import SPLITS
from sophia_train.data.manifest import DTYPES, Manifest, Shard
from sophia_train.data.parts import PartsFolder
from sophia_train.data.token_files import PATTERNS, Tokens, TokenShard, check_shard, files_of, read_header
from sophia_train.data.units import Unit
from sophia_train.errors import MissingInputError, RunError

CHUNK_TOKENS = 1 << 22
MOST_TOKENS = 32 * CHUNK_TOKENS  # of a split that are read; of more, as many in windows at even distances
SEARCH_TOKENS = 1 << 20  # how far the next document is looked for


def missing_units(folder: Path, units: Sequence[Unit]) -> list[int]:
    """List the units, by number, that the preparation of `folder` still lacks."""
    if (folder / manifest.FILE_NAME).exists():
        return []
    done = {path.stem for path in PartsFolder(folder, units, {}).path.glob("part_*.json")}
    return [index for index in range(len(units)) if f"part_{index:05d}" not in done]


def find_tokens(path: Path) -> tuple[Manifest | None, dict[str, Tokens]]:
    """Find the tokens at `path`: a prepared folder, a folder of nanoGPT's or llm.c's, or one `.bin` file.

    Returns:
        The manifest, if there is one, and the tokens of each split, or of the file under its name.

    Raises:
        MissingInputError: there are none.
        DataError: a file is truncated.
    """
    if not path.exists():
        raise MissingInputError(f"{path} does not exist; give a prepared folder or a .bin file")
    if path.is_file():
        return None, {path.name: Tokens([read_header(path)])}
    if (path / manifest.FILE_NAME).exists():
        record = Manifest.read(path)
        dtype = DTYPES[record.dtype]
        found = {
            split: [TokenShard(path / shard.file, dtype, 0, shard.tokens) for shard in record.shards[split]]
            for split in SPLITS
        }
        for shard in (shard for shards in found.values() for shard in shards):
            check_shard(shard, None)
        return record, {split: Tokens(found[split]) for split in SPLITS}
    files = {split: files_of(path, split) for split in SPLITS}
    if not any(files.values()):
        raise MissingInputError(
            f"{path} has no {manifest.FILE_NAME} and no {' or '.join(PATTERNS.values())} file; "
            "give a folder with either, or one .bin file"
        )
    return None, {split: Tokens([read_header(p) for p in paths]) for split, paths in files.items() if paths}


def damage(folder: Path) -> Iterator[tuple[Shard, RunError | None]]:
    """Compare every shard of a prepared folder with its manifest; yields what is wrong with each, or None.

    Raises:
        MissingInputError, DataError: there is no manifest, or it is damaged.
    """
    record = Manifest.read(folder)
    for shard in (*record.shards["train"], *record.shards["validation"]):
        try:
            tokens = TokenShard(folder / shard.file, DTYPES[record.dtype], 0, shard.tokens)
            check_shard(tokens, shard.sha256)
            yield shard, None
        except RunError as error:
            yield shard, error


@dataclass
class Contents:
    """What counting finds in a split.

    Args:
        tokens: of the split, of which `read` were counted.
        frequencies: how often each id is there.
        lengths: documents by length without end of text: [0] of none, [k] of 2^(k-1) to 2^k - 1 tokens. Where
            not all was read, those that lie in a window as a whole.
        longest: length of the longest of these.
        length_sum: of all their lengths.
    """

    tokens: int
    read: int = 0
    frequencies: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(64, dtype=np.int64))
    longest: int = 0
    length_sum: int = 0

    @property
    def documents(self) -> int:
        """How many documents there are in `lengths`."""
        return int(self.lengths.sum())

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Count documents of these lengths."""
        if len(lengths):
            bins = np.frexp(lengths.astype(np.float64))[1]  # bits of the number
            self.lengths += np.bincount(bins, minlength=len(self.lengths))
            self.longest = max(self.longest, int(lengths.max()))
            self.length_sum += int(lengths.sum())

    def add_frequencies(self, ids: np.ndarray) -> None:
        """Count tokens."""
        counts = np.bincount(ids, minlength=len(self.frequencies))
        counts[: len(self.frequencies)] += self.frequencies
        self.frequencies = counts
        self.read += len(ids)


def count(tokens: Tokens, end_of_text: int, most: int = MOST_TOKENS, chunk: int = CHUNK_TOKENS) -> Contents:
    """Count documents and tokens.

    End of text before each document, as here and in llm.c, and after each, as in nanoGPT, are told apart by
    the first token.

    Args:
        tokens: of a split.
        end_of_text: its id.
        most: read no more tokens than this, and at least one chunk.
        chunk: tokens held at a time.
    """
    contents = Contents(len(tokens))
    if not len(tokens):
        return contents
    starts = range(0, len(tokens), chunk)
    if len(tokens) > most:
        n_windows = max(1, most // chunk)
        starts = [int(start) for start in np.linspace(0, len(tokens) - chunk, n_windows)]  # type: ignore[assignment]
    precedes = int(tokens.read(0, 1)[0]) == end_of_text
    since: int | None = None  # tokens since the last end of text; None where none was seen
    position = 0
    for start in starts:
        if start == 0:
            since = None if precedes else 0
        elif start != position:
            since = None
        ids = tokens.read(start, min(chunk, len(tokens) - start))
        position = start + len(ids)
        contents.add_frequencies(ids)
        ends = np.flatnonzero(ids == end_of_text)
        if len(ends):
            lengths = np.diff(ends) - 1
            if since is not None:
                lengths = np.append(lengths, since + ends[0])
            contents.add_lengths(lengths)
            since = len(ids) - 1 - int(ends[-1])
        elif since is not None:
            since += len(ids)
    if position == len(tokens) and since is not None and (since or precedes):
        contents.add_lengths(np.array([since]))
    return contents


def document_at(tokens: Tokens, end_of_text: int, position: int, most: int) -> tuple[int, list[int]] | None:
    """Read the start of the first document that begins at a position or after it.

    Where none begins within a million tokens, what is at the position is read.

    Returns:
        Where it begins and up to `most` ids of it; None at the end of the tokens.
    """
    ids = tokens.read(position, min(SEARCH_TOKENS, len(tokens) - position))
    ends = np.flatnonzero(ids == end_of_text)
    at_start = position == 0 and not (len(ends) and ends[0] == 0)
    begin = position if at_start or not len(ends) else position + int(ends[0]) + 1
    if begin >= len(tokens):
        return None
    document = tokens.read(begin, min(most, len(tokens) - begin))
    ends = np.flatnonzero(document == end_of_text)
    return begin, document[: ends[0] if len(ends) else None].tolist()
