"""Parquet files as streams of text: one column, in bounded memory, from anything that reads and seeks."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

from sophia_train.data.pieces import cut
from sophia_train.data.units import Document
from sophia_train.errors import DataError, MissingInputError

Readable = BinaryIO | io.RawIOBase

MOST_ROWS = 256  # of a batch; of long rows, as many as come to about `READ_BYTES`
READ_BYTES = 1 << 20  # of a column at a time, so that a file of one huge row group takes no more memory

_TEXT_TYPES = (
    pyarrow.types.is_string,
    pyarrow.types.is_large_string,
    pyarrow.types.is_string_view,
)


class Damaged(DataError):
    """Bytes that do not decode. Read anew, they may."""


class Column(NamedTuple):
    """The text column in consecutive row groups."""

    name: str
    groups: list[int]
    first_row: int  # of the first group, in the file
    rows: int
    chunks: list[tuple[int, int]]  # first byte and the one after the last, of each group
    text_bytes: int  # unpacked, of all groups


def documents(name: str, path: Path, column: str = "text") -> Iterator[Document]:
    """Stream the rows of a file as documents, called `name:row` from 0 on.

    Raises:
        MissingInputError: the file cannot be read, or has no such column.
        DataError: it is damaged, or a row is null; file and row are named.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise MissingInputError(f"{path} cannot be read ({error.strerror or error})") from None
    with file:
        metadata = read_footer(file, str(path))
        for row, text in texts(file, str(path), metadata, locate(metadata, column, str(path))):
            yield Document(f"{name}:{row}", cut(text), row)


def read_footer(file: Readable, name: str) -> pyarrow.parquet.FileMetaData:
    """Read what a file says about itself; `Damaged` when it is not Parquet."""
    try:
        return pyarrow.parquet.ParquetFile(file, pre_buffer=False).metadata
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(name, "its footer", error) from None


def locate(
    metadata: pyarrow.parquet.FileMetaData, column: str, name: str, start: int = 0, stop: int | None = None
) -> Column:
    """Find the row groups whose text begins at the bytes from `start` up to `stop`.

    Ranges that share out the bytes of a file share out its row groups: each belongs to one of them.

    Raises:
        MissingInputError: there is no such column; those that hold text are named.
        DataError: it does not hold text.
    """
    try:
        schema = metadata.schema.to_arrow_schema()
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(name, "its schema", error) from None
    if column not in schema.names:
        text = [field.name for field in schema if _is_text(field.type)]
        raise MissingInputError(
            f"{name} has no column data.text_column={column}; of text it has: {' '.join(text) or 'none'}"
        )
    if not _is_text(kind := schema.field(column).type):
        raise DataError(f"{name}: data.text_column={column} holds {kind}, not text; choose another column")
    paths = [metadata.schema.column(index).path for index in range(len(metadata.schema))]
    index = paths.index(column)
    groups: list[int] = []
    chunks: list[tuple[int, int]] = []
    row = first_row = rows = text_bytes = 0
    for group in range(metadata.num_row_groups):
        about = metadata.row_group(group)
        chunk = about.column(index)
        begin = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
        if start <= begin and (stop is None or begin < stop):
            first_row = first_row if groups else row
            rows += about.num_rows
            text_bytes += chunk.total_uncompressed_size
            groups.append(group)
            chunks.append((begin, begin + chunk.total_compressed_size))
        row += about.num_rows
    return Column(column, groups, first_row, rows, chunks, text_bytes)


def texts(
    file: Readable, name: str, metadata: pyarrow.parquet.FileMetaData, column: Column
) -> Iterator[tuple[int, str]]:
    """Stream (row in the file, text).

    Raises:
        Damaged: bytes do not decode, or not to as many rows as the footer says.
        DataError: a row is null, for which there is no text to train on and no rule to leave it out.
    """
    row = column.first_row
    try:
        source = pyarrow.parquet.ParquetFile(
            file,
            metadata=metadata,
            buffer_size=READ_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,  # where the file has any
        )
        rows = min(MOST_ROWS, READ_BYTES * column.rows // max(1, column.text_bytes) + 1)
        batches = source.iter_batches(rows, column.groups, [column.name], use_threads=False)
        for batch in batches if column.groups else ():
            for value in batch.column(0):
                text = value.as_py()
                if text is None:
                    raise DataError(
                        f"{name}: row {row:,} of data.text_column={column.name} is null; choose a column "
                        "that is text throughout, or drop the row from a copy of the file"
                    )
                yield row, text
                row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(name, f"row {row:,}", error) from None
    if row != column.first_row + column.rows:
        raise _damaged(name, f"{column.rows:,} rows announced, {row - column.first_row:,} found", None)


def _is_text(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_type(kind) for is_type in _TEXT_TYPES)


def _damaged(name: str, where: str, error: Exception | None) -> Damaged:
    reason = f": {' '.join(str(error).split())[:200]}" if error else ""
    return Damaged(f"{name} is damaged ({where}{reason}); get it anew")
