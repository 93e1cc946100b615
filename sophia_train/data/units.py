"""What a corpus is made of: units, which workers prepare apart from each other, and documents in them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from sophia_train.data.base import Split


class Document(NamedTuple):
    """One text, in pieces that bound the memory it takes.

    Its key, or its row in the whole corpus where the source counts rows, decides its split.
    """

    key: str
    pieces: Iterable[str | bytes]
    row: int = -1


class Unit(ABC):
    """A part of a corpus that one worker prepares by itself; what it holds can be pickled.

    Units are what a preparation is resumed by, and what job arrays share out. Which documents are in which
    unit depends on the corpus alone, so that the prepared bytes depend on nothing else.

    Attributes:
        name: unique in the corpus, the same every time.
        stored_bytes: bytes that reading it takes, packed where it is packed.
    """

    name: str
    stored_bytes: int

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Stream the documents, in a fixed order."""


class SplitRule(ABC):
    """Decides which documents are held out for validation."""

    fraction: float  # of the documents that is asked for

    @abstractmethod
    def split_of(self, document: Document) -> Split:
        """Choose the split of a document, by itself alone."""

    @abstractmethod
    def describe(self) -> str:
        """Name the rule, for the manifest."""


@dataclass(frozen=True)
class ByKey(SplitRule):
    """By a hash of the key: the same on every machine, in any order, and as documents are added."""

    fraction: float

    def split_of(self, document: Document) -> Split:  # noqa: D102
        key = document.key.encode("utf-8", errors="surrogateescape")
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return "validation" if int.from_bytes(digest, "little") < self.fraction * 2**64 else "train"

    def describe(self) -> str:  # noqa: D102
        return "documents"


@dataclass(frozen=True)
class ByRow(SplitRule):
    """The rows that `datasets.Dataset.train_test_split(test_size=fraction, seed=seed)` takes for its test.

    With fraction 0.0005 and seed 2357 these are the documents of OpenWebText that nanoGPT validates on, so
    that losses compare. (datasets: a permutation of all rows by numpy's default generator; the first
    ceil(fraction n) are the test.)
    """

    fraction: float
    seed: int
    rows: int  # of the whole corpus

    @cached_property
    def held_out(self) -> frozenset[int]:
        """Rows of the validation split."""
        order = np.random.default_rng(self.seed).permutation(self.rows)
        return frozenset(order[: int(np.ceil(self.fraction * self.rows))].tolist())

    def split_of(self, document: Document) -> Split:  # noqa: D102
        return "validation" if document.row in self.held_out else "train"

    def describe(self) -> str:  # noqa: D102
        return f"rows, seed {self.seed}"
