"""Text files as streams of documents: plain or JSON lines, also compressed, in bounded memory."""

import codecs
import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

import zstandard

from sophia_train.data.prepare import Document
from sophia_train.errors import DataError, MissingInputError

KINDS = (".txt", ".md", ".py", ".jsonl")
COMPRESSIONS = (".gz", ".xz", ".zst")
CHUNK_BYTES = 1 << 20
LONGEST_PIECE = 8 * CHUNK_BYTES


def kind_of(path: PurePath) -> str | None:
    """Return which of `KINDS` a file is by its name, whether compressed or not, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


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


def _hidden(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def documents(files: dict[str, Path]) -> Iterator[Document]:
    """Stream the documents of files as `find` returns them: a file is one, a row of JSON lines is one.

    Raises:
        DataError: naming the file, and the line of a bad row or the byte that is not UTF-8.
    """
    for name, path in files.items():
        if kind_of(path) == ".jsonl":
            for line, text in _rows(path):
                yield Document(f"{name}:{line}", [text])
        else:
            yield Document(name, _pieces(_decoded(path)))


def _rows(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_lines(chunks(path)), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise DataError(
                f'{path}:{number} is not a JSON object with a string "text"; mend or drop the row'
            )
        yield number, text


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
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


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cut text where GPT-2's pattern cuts anyway, so that the tokens do not depend on the pieces.

    That is after a line end with no other white space beside it. Text without any, for 8 MiB, is cut all
    the same: its tokens may differ there, its bytes do not.
    """
    rest = ""
    for text in texts:
        rest += text
        cut = rest.rfind("\n", 0, -1)
        while cut > 0 and (rest[cut - 1].isspace() or rest[cut + 1].isspace()):
            cut = rest.rfind("\n", 0, cut)
        if cut > 0:
            yield rest[: cut + 1]
            rest = rest[cut + 1 :]
        elif len(rest) >= LONGEST_PIECE:
            yield rest
            rest = ""
    if rest:
        yield rest


def chunks(path: Path) -> Iterator[bytes]:
    """Read a file's bytes, unpacked.

    Raises:
        DataError: it is packed and damaged.
        MissingInputError: it cannot be read.
    """
    try:
        if path.suffix.lower() == ".zst":
            yield from _zstd_chunks(path)
            return
        openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
        with openers.get(path.suffix.lower(), open)(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError, EOFError) as error:
        raise DataError(f"{path} cannot be unpacked ({error}); it is damaged: copy it again") from None
    except OSError as error:
        raise MissingInputError(f"{path} cannot be read ({error.strerror or error})") from None


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    # zstandard's own file reader ends quietly in the middle of a truncated frame
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    with path.open("rb") as file:
        packed = file.read(CHUNK_BYTES)
        while packed:
            frame = context.decompressobj()
            while not frame.eof:
                if not packed:
                    raise EOFError("file ended before the end of its last frame")
                yield frame.decompress(packed)
                packed = frame.unused_data or file.read(CHUNK_BYTES)
