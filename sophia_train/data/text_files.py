"""Text files as streams of documents: plain or JSON lines, also compressed, in bounded memory."""

import codecs
import contextlib
import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import zstandard

from sophia_train.data.pieces import cut, pieces
from sophia_train.data.units import Document, Unit
from sophia_train.errors import DataError, MissingInputError

KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
UNPACKING_ERRORS = (gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError, EOFError)
CHUNK_BYTES = 1 << 20
MOST_UNITS = 8192  # about: each becomes a file


def kind_of(path: PurePath) -> str | None:
    """Return which of `KINDS` a file is by its name, whether compressed or not, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] and suffixes[-1] in COMPRESSIONS
    kind = suffixes[-2] if packed and len(suffixes) > 1 else "".join(suffixes[-1:])
    return kind if kind in KINDS and not (packed and kind == ".parquet") else None


def find(path: str) -> dict[str, Path]:
    """Find the text files at `path`: a file, a folder with all below it that is not hidden, or a glob.

    Returns:
        The files by their name relative to the folder or to the fixed part of the glob, sorted by it.

    Raises:
        MissingInputError: there are none.
    """
    root = Path(path).expanduser()
    if root.is_file():
        root, files = root.parent, [root]
    elif root.is_dir():
        files = [file for file in root.rglob("*") if file.is_file() and not _hidden(file.relative_to(root))]
    elif glob.has_magic(path):
        files = [Path(file) for file in glob.glob(str(root), recursive=True) if Path(file).is_file()]
        while glob.has_magic(str(root)):
            root = root.parent
    else:
        raise MissingInputError(f"data.path={path} does not exist; give a file, a folder or a glob")
    found = {file.relative_to(root).as_posix(): file for file in files if kind_of(file)}
    if not found:
        raise MissingInputError(
            f"data.path={path} has no text; wanted: {' '.join(KINDS)}, also with {' '.join(COMPRESSIONS)}"
        )
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Files(Unit):
    """Text files, each of which begins in this unit and ends in it.

    Args:
        files: by the names that their documents have.
        as_bytes: whether files are one document each, read as they are, whatever their names say.
    """

    files: dict[str, Path]
    stored_bytes: int
    as_bytes: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the first file."""
        return next(iter(self.files))

    def documents(self) -> Iterator[Document]:
        """Stream the documents sorted by file name; raises as `documents` and `chunks`."""
        if not self.as_bytes:
            yield from documents(self.files)
            return
        for name, path in self.files.items():
            yield Document(name, chunks(path))


@dataclass(frozen=True)
class Rows(Unit):
    """The rows of a JSON lines file that begin in a range of its bytes.

    The key of a row says the byte where it begins, `file@byte`: its line is known only to those who have read
    all that is before it.

    Args:
        file: its name, in the keys.
        path: where it is; it must not be packed.
        start: the first byte of the range.
        stop: the byte after the last.
    """

    file: str
    path: Path
    start: int
    stop: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """File and first byte."""
        return f"{self.file}@{self.start}"

    @property
    def stored_bytes(self) -> int:  # type: ignore[override]
        """Bytes of the range."""
        return self.stop - self.start

    def documents(self) -> Iterator[Document]:
        """Stream the rows.

        Raises:
            DataError: naming the file and the byte where a bad row begins.
            MissingInputError: the file cannot be read.
        """
        for position, line in self._lines():
            if line.strip():
                row = f"{self.path}: the row at byte {position}"
                yield Document(f"{self.file}@{position}", _text_of(line, row))

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, self.start - 1))
                if self.start:
                    file.readline()  # the rest of a line of the range before, perhaps only its end
                position = file.tell()
                for line in file:
                    if position >= self.stop:
                        return
                    yield position, line
                    position += len(line)
        except OSError as error:
            raise _unreadable(self.path, error) from None


def units(files: dict[str, Path], unit_bytes: int, as_bytes: bool = False) -> list[Files | Rows]:
    """Gather files, in their order, into units of at least `unit_bytes`, but for the last.

    JSON lines that are longer and not packed are cut into ranges of that length. Of a corpus that would come
    to more than `MOST_UNITS` of them, units are as much larger.
    """
    unit_bytes = max(unit_bytes, sum(path.stat().st_size for path in files.values()) // MOST_UNITS)
    gathered: list[Files | Rows] = []
    here: dict[str, Path] = {}
    size = 0
    for name, path in files.items():
        length = path.stat().st_size
        in_rows = length > unit_bytes and path.suffix.lower() == ".jsonl" and not as_bytes
        if not in_rows:
            here[name] = path
            size += length
        if here and (size >= unit_bytes or in_rows):
            gathered.append(Files(here, size, as_bytes))
            here, size = {}, 0
        if in_rows:
            starts = range(0, length, unit_bytes)
            gathered += [Rows(name, path, start, min(start + unit_bytes, length)) for start in starts]
    if here:
        gathered.append(Files(here, size, as_bytes))
    return gathered


def _hidden(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def documents(files: dict[str, Path]) -> Iterator[Document]:
    """Stream the documents of files as `find` returns them: a file is one, or each of its rows.

    Raises:
        DataError: naming the file, and the line of a bad row or the byte that is not UTF-8.
        MissingInputError: a file cannot be read, or has no column "text".
    """
    for name, path in files.items():
        if kind_of(path) == ".parquet":
            from sophia_train.data import parquet  # pyarrow is slow to import

            yield from parquet.documents(name, path)
            continue
        if kind_of(path) == ".jsonl":
            for number, line in enumerate(lines(chunks(path)), start=1):
                if line.strip():
                    yield Document(f"{name}:{number}", _text_of(line, f"{path}:{number}"))
        else:
            yield Document(name, pieces(_decoded(path)))


def _text_of(line: bytes, row: str) -> Iterable[str]:
    """Take the text out of a row of JSON; `row` is what an error calls it."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise DataError(f'{row} is not a JSON object with a string "text"; mend or drop the row')
    return cut(text)


def lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut bytes at line ends, which are left out."""
    rest: list[bytes] = []  # joined only when the line is complete, or a long row would cost its square
    for block in blocks:
        first, *others = block.split(b"\n")
        rest.append(first)
        for line in others:
            yield b"".join(rest)
            rest = [line]
    yield b"".join(rest)


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    for chunk in chunks(path):
        pending = len(decoder.getstate()[0])
        try:
            yield decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, position - pending + error.start) from None
        position += len(chunk)
    if decoder.getstate()[0]:
        raise _not_utf8(path, position - len(decoder.getstate()[0]))


def _not_utf8(path: Path, position: int) -> DataError:
    return DataError(f"{path}: byte {position:,} is not UTF-8; convert the file (iconv) or leave it out")


def chunks(path: Path) -> Iterator[bytes]:
    """Read a file's bytes, unpacked.

    Raises:
        DataError: it is packed and damaged.
        MissingInputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from unpacked(file, path.suffix.lower())
    except UNPACKING_ERRORS as error:
        raise DataError(f"{path} cannot be unpacked ({error}); it is damaged: copy it again") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def unpacked(file: Any, suffix: str) -> Iterator[bytes]:
    """Read the bytes of an open binary file, unpacked if its suffix is one of `COMPRESSIONS`.

    Raises:
        UNPACKING_ERRORS: one of them: the file is damaged.
    """
    if suffix == ".zst":
        yield from _unpacked_zstd(file)
        return
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    with openers.get(suffix, contextlib.nullcontext)(file) as plain:
        while chunk := plain.read(CHUNK_BYTES):
            yield chunk


def _unreadable(path: Path, error: OSError) -> MissingInputError:
    return MissingInputError(f"{path} cannot be read ({error.strerror or error})")


def _unpacked_zstd(file: Any) -> Iterator[bytes]:
    # zstandard's own file reader ends quietly in the middle of a truncated frame
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    packed = file.read(CHUNK_BYTES)
    while packed:
        frame = context.decompressobj()
        while not frame.eof:
            if not packed:
                raise EOFError("file ended before the end of its last frame")
            yield frame.decompress(packed)
            packed = frame.unused_data or file.read(CHUNK_BYTES)
