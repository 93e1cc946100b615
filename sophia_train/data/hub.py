"""Datasets of the Hugging Face Hub, streamed: no copies on the disk, and no row twice or never.

Parquet is read by ranges of bytes, the text column only; JSON lines as a stream. Everything is of one commit.
"""

import functools
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from sophia_train.data import hub_client, parquet, text_files
from sophia_train.data.base import Progress
from sophia_train.data.hub_client import (
    Entry,
    EntryMissing,
    Patience,
    RangeFile,
    Repository,
    RevisionMissing,
    Unreachable,
)
from sophia_train.data.manifest import Manifest
from sophia_train.data.parts import PartsFolder
from sophia_train.data.sources import UNIT_BYTES, TextData
from sophia_train.data.units import ByKey, ByRow, Document, SplitRule, Unit
from sophia_train.errors import ConfigError, DataError, MissingInputError, UnavailableError

CONVERTED = "refs/convert/parquet"
JSON_LINES = (".jsonl", ".json")
COMPRESSIONS = (".gz", ".xz", ".zst")
MOST_UNITS = 8192  # files are not cut if that made more
DECODE_TRIES = 3

patience = Patience()


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
def _footer(file: HubFile) -> Any:
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
            yield Document(f"{self.file.path}:{row}", [text], place)

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
                _footer.cache_clear()  # it may be what is wrong
                failures += 1
                if failures == DECODE_TRIES:
                    raise
                self.file.repository.wait(failures)

    def _parquet_rows(self) -> Iterator[tuple[int, str]]:
        metadata = _footer(self.file)
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


@dataclass(frozen=True, kw_only=True)
class HuggingFace(TextData):
    """A dataset of the Hugging Face Hub, in Parquet or JSON lines.

    What a preparation has begun with, it goes on with, even if the branch moves: its commit is recorded.
    A prepared folder needs no network.

    Args:
        repo: such as `HuggingFaceFW/fineweb-edu`.
        ref: branch, tag or commit. The default is the Hub's own conversion to Parquet.
        subset: of the conversion; by default the only one, or the one called "default".
        split: of the conversion.
        files: a glob of files in the repository, in the place of subset and split; `*` stays in its folder.
        text_column: where the text is.
        rows_seed: if set, documents are held out as `ByRow` does, by their row in the whole corpus.
    """

    repo: str
    ref: str = CONVERTED
    subset: str | None = None
    split: str = "train"
    files: str | None = None
    text_column: str = "text"
    rows_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.repo):
            raise ConfigError(f"data.repo={self.repo} is no dataset's name; it is OWNER/NAME")
        if self.files is not None and self.subset is not None:
            raise ConfigError(f"data.subset={self.subset} is for the Hub's conversion; leave out data.files")

    @property
    def source(self) -> str:
        """What the text is, in a few words."""
        what = self.files or f"{self.subset or ''}/{self.split}".strip("/")
        column = "" if self.text_column == "text" else f" {self.text_column}"
        return f"hub {self.repo} {what}{column}"

    def revision(self) -> str:
        """Return the commit.

        That is `ref`, if it is one; or the one that the folder was prepared from, or that its preparation
        has begun with; or where `ref` is now. Raises as `Repository.commit_of`.
        """
        if re.fullmatch("[0-9a-f]{40}", self.ref):
            return self.ref
        if self.is_prepared:
            return Manifest.read(self.prepared_folder).revision
        return self._commit

    def units(self) -> Sequence[Unit]:
        """List the files sorted by path, Parquet cut into slices of 64 MiB or 1/8192 of all, if that is more.

        Raises:
            MissingInputError: there is no such dataset, commit, file or column; what there is, is named.
            UnavailableError: the Hub does not answer, or the dataset is gated.
            DataError: a file is neither Parquet nor JSON lines.
        """
        with self._reaching():
            files = self._files
            if kind_of(files[0].path) == ".parquet":  # a column that is not there is told before all else
                parquet.locate(_footer(files[0]), self.text_column, str(files[0]))
            slice_bytes = max(UNIT_BYTES, sum(file.size for file in files) // MOST_UNITS)
            rows = itertools.repeat(-1) if self.rows_seed is None else itertools.accumulate([0, *self._rows])
            return [
                HubUnit(f"{file.path}@{start}", stop - start, file, self.text_column, start, stop, first_row)
                for file, first_row in zip(files, rows, strict=False)
                for start, stop in _slices(file, slice_bytes)
            ]

    def split_rule(self) -> SplitRule:
        """Which documents are held out; raises as `units`, where it must count rows."""
        if self.rows_seed is None:
            return ByKey(self.validation_fraction)
        with self._reaching():
            return ByRow(self.validation_fraction, self.rows_seed, sum(self._rows))

    def prepare(
        self, progress: Progress | None = None, workers: int = 1, share: tuple[int, int] = (0, 1)
    ) -> None:
        """Prepare as `TextData` does; raises as that and `units` do, with the command to go on with."""
        with self._reaching():
            super().prepare(progress, workers, share)

    def _folder_name(self) -> str:
        settings = (self.source, self.ref, str(self.validation_fraction), str(self.rows_seed))
        digest = hashlib.blake2b("\n".join(settings).encode(), digest_size=6).hexdigest()
        return f"{self.repo.rpartition('/')[2]}-{self.tokenizer_name}-{digest}"

    @cached_property
    def _repository(self) -> Repository:
        return Repository(hub_client.endpoint(), self.repo, patience)

    @cached_property
    def _commit(self) -> str:
        """The commit that a preparation has begun with, or where `ref` is."""
        try:
            plan = json.loads((PartsFolder(self.prepared_folder, [], {}).path / "plan.json").read_bytes())
            if plan["source"] == self.source:
                return str(plan["revision"])
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
            pass
        try:
            return self._repository.commit_of(self.ref)
        except RevisionMissing as error:
            if self.ref != CONVERTED:
                raise
            raise MissingInputError(
                f"data.repo={self.repo} has no {CONVERTED}, as the Hub has not converted it; name files of "
                f"its own: data.ref=main data.files=GLOB ({self._has('main')})"
            ) from error

    @cached_property
    def _files(self) -> Sequence[HubFile]:
        commit = self.revision()
        try:
            entries = self._named(commit) if self.files else self._converted(commit)
        except RevisionMissing:
            raise MissingInputError(
                f"commit {commit} of data.repo={self.repo} is gone from the Hub; to begin anew with another "
                f"one, remove {PartsFolder(self.prepared_folder, [], {}).path} or set data.ref"
            ) from None
        for entry in entries:
            if kind_of(entry.path) is None:
                raise DataError(
                    f"data.files={self.files}: {entry.path} is neither .parquet nor .jsonl; narrow the glob"
                )
        return [HubFile(self._repository, commit, entry.path, entry.size) for entry in entries]

    def _named(self, commit: str) -> Sequence[Entry]:
        pattern = PurePosixPath("/", self.files or "")
        folder = itertools.takewhile(lambda part: not re.search(r"[*?\[]", part), pattern.parts[1:-1])
        try:
            listed = self._repository.list(commit, "/".join(folder))
        except EntryMissing:
            listed = []
        found = [
            each for each in listed if each.is_file and PurePosixPath("/", each.path).match(str(pattern))
        ]
        if not found:
            raise MissingInputError(
                f"data.files={self.files} matches nothing in {self.repo} at {self.ref} ({self._has(commit)})"
            )
        return found

    def _converted(self, commit: str) -> Sequence[Entry]:
        """List the files of SUBSET/SPLIT/*.parquet."""
        listed = [each for each in self._repository.list(commit) if each.path.endswith(".parquet")]
        subsets: dict[str, dict[str, list[Entry]]] = {}
        for entry in listed:
            match entry.path.split("/"):
                case [subset, split, _]:
                    subsets.setdefault(subset, {}).setdefault(split, []).append(entry)
        where = f"data.repo={self.repo} at data.ref={self.ref}"
        if not subsets:
            raise MissingInputError(
                f"{where} has no SUBSET/SPLIT/*.parquet; set data.files ({self._has(commit)})"
            )
        name = self.subset or (next(iter(subsets)) if len(subsets) == 1 else "default")
        if name not in subsets:
            wrong = f"no data.subset={self.subset}" if self.subset else "several subsets; set data.subset"
            raise MissingInputError(f"{where} has {wrong}; it has: {' '.join(subsets)}")
        if self.split not in subsets[name]:
            partial = f"partial-{self.split}" in subsets[name]
            raise MissingInputError(
                f"{where} has no data.split={self.split} in {name}; it has: {' '.join(subsets[name])}"
                + (" (partial: the Hub converted its first gigabytes only)" if partial else "")
            )
        return subsets[name][self.split]

    def _has(self, commit: str) -> str:
        """Say what is at the top of the repository."""
        listed = self._repository.list(commit, recursive=False)
        names = [each.path + ("" if each.is_file else "/") for each in listed if each.path[0] != "."]
        return f"it has: {' '.join(names[:20])}" + (" ..." if len(names) > 20 else "")

    @cached_property
    def _rows(self) -> Sequence[int]:
        """Rows of each file."""
        for file in self._files:
            if kind_of(file.path) != ".parquet":
                raise ConfigError(
                    f"data.rows_seed counts rows of Parquet, not of {file.path}; set it to null"
                )
        return [_footer(file).num_rows for file in self._files]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except Unreachable as error:
            raise UnavailableError(
                f"{error}; what is prepared is kept, go on with: {self._command()}"
            ) from None

    def _command(self) -> str:
        """The command that goes on with this preparation."""
        data = replace(self, folder=str(self.prepared_folder))
        keys = ("repo", "ref", "subset", "split", "files", "text_column", "rows_seed", "tokenizer")
        values = {key: getattr(data, key) for key in (*keys, "validation_fraction", "folder")}
        words = [f"data.{key}={value}" for key, value in values.items() if value is not None]
        return shlex.join(["python", "scripts/prepare_data.py", "data=hf", *words])


def kind_of(path: str) -> str | None:
    """Return `.parquet` or `.jsonl` by the name of a file, whether packed or not, or None."""
    suffixes = PurePosixPath(path.lower()).suffixes
    if suffixes[-1:] == [".parquet"]:
        return ".parquet"
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return ".jsonl" if suffixes and suffixes[-1] in JSON_LINES else None


def _slices(file: HubFile, size: int) -> Iterator[tuple[int, int]]:
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
