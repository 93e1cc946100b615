"""Sources of text, prepared into token files when they are first used."""

import hashlib
import os
import platform
import sysconfig
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sophia_train.data import manifest, text_files
from sophia_train.data.base import SPLITS, Data, Progress, Split
from sophia_train.data.manifest import TAIL, Manifest
from sophia_train.data.prepare import prepare, remove_leftovers
from sophia_train.data.token_files import Tokens, open_prepared
from sophia_train.data.units import ByKey, SplitRule, Unit
from sophia_train.errors import ConfigError, DataError, MissingInputError

UNIT_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class TextData(Data):
    """Data that is made from documents.

    A subclass says what its `units` are.

    Args:
        tokenizer: `bytes`, `gpt2`, or the path of a Hugging Face `tokenizer.json`.
        folder: where the prepared tokens are; by default a name under `data/` that says what they are.
        validation_fraction: the share of documents held out, chosen by a hash of their names.
        verify: check the digests of the prepared files whenever they are opened.

    Raises:
        ConfigError: a setting is out of range.
    """

    tokenizer: str = "bytes"
    folder: str | None = None
    validation_fraction: float = 0.05
    verify: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"data.validation_fraction={self.validation_fraction} must be between 0 and 1; use 0.05"
            )
        if self.folder and Path(self.folder).name in ("", ".."):  # what is in the making is beside it
            raise ConfigError(
                f"data.folder={self.folder} does not end in a name; write out which folder that is"
            )

    @property
    @abstractmethod
    def source(self) -> str:
        """What the text is, in a few words."""

    @abstractmethod
    def revision(self) -> str:
        """Which state of the text this is; `MissingInputError` when it is not there."""

    @abstractmethod
    def units(self) -> Sequence[Unit]:
        """List the parts that workers prepare apart, in a fixed order that depends on the text alone."""

    @abstractmethod
    def _folder_name(self) -> str:
        """Name the default folder, so that no two different preparations share one."""

    def split_rule(self) -> SplitRule:
        """Which documents are held out."""
        return ByKey(self.validation_fraction)

    def split_rule_name(self) -> str:
        """Name the rule as manifests do, without a look at the text."""
        return self.split_rule().describe()

    @property
    def prepared_folder(self) -> Path:
        """Where the prepared tokens are or will be."""
        return Path(self.folder).expanduser() if self.folder else Path("data") / self._folder_name()

    @property
    def is_prepared(self) -> bool:
        """Whether there is a prepared folder."""
        return (self.prepared_folder / manifest.FILE_NAME).exists()

    def prepare(
        self, progress: Progress | None = None, workers: int = 1, share: tuple[int, int] = (0, 1)
    ) -> None:
        """Tokenise the documents unless that has been done; arguments as of `prepare.prepare`.

        Raises:
            MissingInputError: there is no text.
            DataError: the text cannot be read, or the folder was prepared from something else.
            UnavailableError: the tokenizer's vocabulary cannot be had.
            OutputError: the folder cannot be written.
            StorageError: the disk is full or fails.
            Interrupted: a worker was killed; units that are done are kept.
        """
        if self.is_prepared:
            self._check_origin()
            remove_leftovers(self.prepared_folder)
            return
        prepare(
            self.prepared_folder,
            self.units(),
            self.load_tokenizer(),
            source=self.source,
            revision=self.revision(),
            rule=self.split_rule(),
            workers=workers,
            share=share,
            progress=progress,
        )

    def open(self, split: Split, share: tuple[int, int] = (0, 1)) -> Tokens:
        """Open the tokens of one split; arguments and errors as of `open_prepared`."""
        return open_prepared(self.prepared_folder, split, self.tokenizer_name, self.verify, share)

    def describe(self) -> str:
        """Say in one line what the data is, how many tokens, and where."""
        folder = self.prepared_folder
        if not self.is_prepared:
            return f"{self.source}, {self.tokenizer_name} tokens, to be prepared in {folder}"
        train, validation = (Manifest.read(folder).tokens(split) for split in SPLITS)
        return f"{self.source}, {train:,} + {validation:,} tokens ({self.tokenizer_name}) in {folder}"

    def _check_origin(self) -> None:
        """Refuse a folder that was prepared from other text or with other settings."""
        record = Manifest.read(self.prepared_folder)
        expected = {
            "source": self.source,
            "tokenizer": self.tokenizer_name,
            "validation_fraction": self.validation_fraction,
        }
        if record.split_rule != TAIL:  # which any rule comes to that leaves a split empty
            expected["split_rule"] = self.split_rule_name()
        try:
            expected["revision"] = self.revision()
        except MissingInputError:
            pass  # the text has been moved away, which does no harm to the tokens made from it
        for key, value in expected.items():
            if getattr(record, key) != value:
                raise DataError(
                    f"{self.prepared_folder} was prepared with {key}={getattr(record, key)}, not {value}; "
                    "choose another data.folder, or remove this one to prepare it anew"
                )


@dataclass(frozen=True, kw_only=True)
class PythonStdlib(TextData):
    """The source text of the running interpreter's standard library: real text on every machine."""

    # third-party packages, tests (many are tables), and what a build leaves of the machine it ran on
    _excluded = frozenset(
        {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"}
    )
    _built_here = ("_sysconfigdata", "config-")

    @property
    def source(self) -> str:
        """What the text is, in a few words."""
        return "python_stdlib"

    def revision(self) -> str:
        """Return the interpreter's version."""
        return platform.python_version()

    def units(self) -> Sequence[Unit]:
        """List the modules sorted by name, as bytes; `MissingInputError` when there are no sources."""
        return text_files.units(self._files(), UNIT_BYTES, as_bytes=True)

    def _is_wanted(self, name: str) -> bool:
        return name not in self._excluded and not name.startswith(self._built_here)

    def _folder_name(self) -> str:
        return f"{self.source}-{self.revision()}-{self.tokenizer_name}"

    def _files(self) -> dict[str, Path]:
        root = Path(sysconfig.get_path("stdlib"))
        files = {}
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if self._is_wanted(name)]
            for path in (
                Path(folder, name) for name in names if name.endswith(".py") and self._is_wanted(name)
            ):
                files[path.relative_to(root).as_posix()] = path
        if not files:
            raise MissingInputError(f"{root} has no .py sources of the standard library; use data=text")
        return dict(sorted(files.items()))


@dataclass(frozen=True, kw_only=True)
class Text(TextData):
    """Text files of one's own.

    Args:
        path: a file, a folder or a glob of .txt, .md, .py (one document each) and .jsonl (one per row, in
            "text"), also with .gz, .xz or .zst.
    """

    path: str

    @property
    def source(self) -> str:
        """What the text is, in a few words."""
        return f"text {self._resolved.name}"

    def revision(self) -> str:
        """Return a digest of the files' names and sizes."""
        listing = [f"{name}\0{path.stat().st_size}" for name, path in text_files.find(self.path).items()]
        return _short_digest(*listing)

    def units(self) -> Sequence[Unit]:
        """List the files sorted by name, small ones together; raises as `text_files.find`."""
        return text_files.units(text_files.find(self.path), UNIT_BYTES)

    def _folder_name(self) -> str:
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in self._resolved.name)
        settings = (str(self._resolved), str(self.validation_fraction))
        return f"{name}-{self.tokenizer_name}-{_short_digest(*settings)}"

    @property
    def _resolved(self) -> Path:
        return Path(self.path).expanduser().resolve()


def _short_digest(*parts: str) -> str:
    text = "\n".join(parts).encode("utf-8", errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=6).hexdigest()
