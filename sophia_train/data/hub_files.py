"""Files of the Hugging Face Hub as streams of documents, no row twice or never.

Parquet is read by ranges of bytes, the text column only; JSON lines as a stream.
"""

import functools
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sophia_train.data import parquet, text_files
from sophia_train.data.hub_client import Repository
from sophia_train.data.pieces import cut
from sophia_train.data.units import Document, Unit
from sophia_train.errors import UnavailableError

JSON_LINES = (".jsonl", ".json")
WINDOW_BYTES = 32 << 20
HOLE_BYTES = 1 << 20  # as much is fetched in vain rather than asked for apart
DECODE_TRIES = 3


class RangeFile(io.RawIOBase):
    """A file on the Hub that is read in windows of bounded size.

    Args:
        read: reads the bytes from one position up to another, all of them.
        size: of the file.
        ranges: bytes that will be needed, in order; windows cover these and small holes between them. What
            is outside is read as it is asked for.
    """

    def __init__(
        self, read: Callable[[int, int], bytearray], size: int, ranges: Sequence[tuple[int, int]]
    ) -> None:
        self._read, self._size = read, size
        self._ranges: list[tuple[int, int]] = []
        for start, stop in ranges:
            if self._ranges and 0 <= start - self._ranges[-1][1] <= HOLE_BYTES:
                start = self._ranges.pop()[0]
            self._ranges.append((start, min(stop, size)))
        self._window, self._window_start, self._position = bytearray(), 0, 0

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # noqa: D102
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        )
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Read as many bytes as there are, up to `size`; raises as `Repository.read`."""
        start = self._position
        stop = self._size if size is None or size < 0 else min(start + size, self._size)
        if stop <= start:
            return b""
        if start < self._window_start or stop > self._window_start + len(self._window):
            planned = [last for first, last in self._ranges if first <= start < last]
            last = min(start + WINDOW_BYTES, planned[0]) if planned else stop
            self._window = bytearray()  # before the next one is there
            self._window, self._window_start = self._read(start, max(stop, last)), start
        self._position = stop
        return bytes(self._window[start - self._window_start : stop - self._window_start])


@dataclass(frozen=True)
class HubFile:
    """A file of one commit."""

    repository: Repository
    commit: str
    path: str
    size: int

    def open(self, ranges: Sequence[tuple[int, int]] = ()) -> RangeFile:
        """Open the file; `ranges` as of `RangeFile`."""
        read = functools.partial(self.repository.read, self.commit, self.path, self.size)
        return RangeFile(read, self.size, ranges)

    def __str__(self) -> str:
        return f"{self.repository.name}/{self.path}"


@functools.lru_cache(maxsize=4)  # a file's units are mostly prepared one after the other
def footer(file: HubFile) -> Any:
    """Read what a Parquet file says about itself, from what was read last if it is the same file.

    Raises:
        Unreachable: the Hub cannot be read.
        DataError: it is damaged, whenever it is read.
    """
    for failures in itertools.count(1):
        try:
            return parquet.read_footer(file.open(), str(file))
        except parquet.Damaged:
            if failures == DECODE_TRIES:
                raise
            file.repository.wait(failures)
    raise AssertionError


@dataclass(frozen=True)
class HubUnit(Unit):
    """A slice of a Parquet file, or a whole file of JSON lines.

    Args:
        name: unique.
        stored_bytes: how much it is.
        file: where it is.
        column: that has the text.
        start: of the slice; the row groups whose text begins in it belong to it.
        stop: its end.
        first_row: of the file, in the corpus; -1 where rows are not counted.
    """

    name: str
    stored_bytes: int
    file: HubFile
    column: str
    start: int
    stop: int
    first_row: int = -1

    def documents(self) -> Iterator[Document]:
        """Stream the rows as documents, called `path:row`; JSON lines from 1 on, Parquet from 0 on.

        Bytes that do not decode are fetched again.

        Raises:
            Unreachable: the Hub cannot be read.
            DataError: a file is damaged, or a row is no text.
            MissingInputError: there is no such column.
        """
        read = self._parquet_rows if kind_of(self.file.path) == ".parquet" else self._json_rows
        for row, text in self._decoded(read):
            place = self.first_row + row if self.first_row >= 0 else -1
            yield Document(f"{self.file.path}:{row}", cut(text), place)

    def _decoded(self, read: Callable[[], Iterator[tuple[int, str]]]) -> Iterator[tuple[int, str]]:
        """Go through the rows, and after damage again through those that are left."""
        done = seen = failures = 0  # rows handed on, and a digest of them
        while True:
            try:
                again = 0
                for number, row in enumerate(read()):
                    if number < done:
                        again = hash((again, row))
                        continue
                    if again != seen:  # what was handed on was damaged, too, and decoded all the same
                        raise UnavailableError(f"{self.file} reads differently each time; start again")
                    yield row
                    done, failures = done + 1, 0
                    again = seen = hash((seen, row))
                if again != seen:
                    raise UnavailableError(f"{self.file} reads differently each time; start again")
                return
            except parquet.Damaged:
                footer.cache_clear()  # it may be what is wrong
                failures += 1
                if failures == DECODE_TRIES:
                    raise
                self.file.repository.wait(failures)

    def _parquet_rows(self) -> Iterator[tuple[int, str]]:
        metadata = footer(self.file)
        column = parquet.locate(metadata, self.column, str(self.file), self.start, self.stop)
        yield from parquet.texts(self.file.open(column.chunks), str(self.file), metadata, column)

    def _json_rows(self) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(text_files.lines(_unpacked(self.file)), start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[self.column]
            except (ValueError, TypeError, KeyError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise parquet.Damaged(
                    f'{self.file}:{number} is not a JSON object with a string "{self.column}"; '
                    "set data.text_column, or choose other data.files"
                )
            yield number, text


def kind_of(path: str) -> str | None:
    """Return `.parquet` or `.jsonl` by the name of a file, whether packed or not, or None."""
    suffixes = PurePosixPath(path.lower()).suffixes
    if suffixes[-1:] == [".parquet"]:
        return ".parquet"
    if suffixes and suffixes[-1] in text_files.COMPRESSIONS:
        suffixes.pop()
    return ".jsonl" if suffixes and suffixes[-1] in JSON_LINES else None


def slices(file: HubFile, size: int) -> Iterator[tuple[int, int]]:
    """Cut a Parquet file at multiples of `size`; yields first bytes and those after the last."""
    if kind_of(file.path) != ".parquet":
        size = max(1, file.size)
    for start in range(0, file.size, size):
        yield start, min(start + size, file.size)


def _unpacked(file: HubFile) -> Iterator[bytes]:
    try:
        suffix = PurePosixPath(file.path.lower()).suffix
        yield from text_files.unpacked(file.open([(0, file.size)]), suffix)
    except text_files.UNPACKING_ERRORS as error:
        raise parquet.Damaged(f"{file} cannot be unpacked ({error}); choose other data.files") from None
