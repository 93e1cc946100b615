"""Datasets of the Hugging Face Hub, of one commit each, streamed: no copies on the disk.

Which files they have is asked here; how a file becomes documents is in `hub_files.py`.
"""

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath

from sophia_train.data import hub_client, parquet
from sophia_train.data.base import Progress
from sophia_train.data.hub_client import (
    Entry,
    EntryMissing,
    Patience,
    Repository,
    RevisionMissing,
    Unreachable,
)
from sophia_train.data.hub_files import HubFile, HubUnit, footer, kind_of, slices
from sophia_train.data.manifest import Manifest
from sophia_train.data.parts import PartsFolder
from sophia_train.data.sources import UNIT_BYTES, TextData
from sophia_train.data.units import ByKey, ByRow, SplitRule, Unit
from sophia_train.errors import ConfigError, DataError, MissingInputError, UnavailableError

CONVERTED = "refs/convert/parquet"
MOST_UNITS = 8192  # files are not cut if that made more

patience = Patience()


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
                parquet.locate(footer(files[0]), self.text_column, str(files[0]))
            slice_bytes = max(UNIT_BYTES, sum(file.size for file in files) // MOST_UNITS)
            rows = itertools.repeat(-1) if self.rows_seed is None else itertools.accumulate([0, *self._rows])
            return [
                HubUnit(f"{file.path}@{start}", stop - start, file, self.text_column, start, stop, first_row)
                for file, first_row in zip(files, rows, strict=False)
                for start, stop in slices(file, slice_bytes)
            ]

    def split_rule(self) -> SplitRule:
        """Which documents are held out; raises as `units`, where it must count rows."""
        if self.rows_seed is None:
            return ByKey(self.validation_fraction)
        with self._reaching():
            return ByRow(self.validation_fraction, self.rows_seed, sum(self._rows))

    def split_rule_name(self) -> str:
        """Name the rule as manifests do, without a request."""
        if self.rows_seed is None:
            return super().split_rule_name()
        return ByRow(self.validation_fraction, self.rows_seed, rows=0).describe()

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
        return [footer(file).num_rows for file in self._files]

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
