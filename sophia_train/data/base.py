"""What training asks of data, wherever it comes from."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sophia_train.data.tokenizers import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from sophia_train.data.token_files import Tokens

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")

Progress = Callable[[int, int, int], None]
"""Called with documents, tokens and bytes of text so far."""


@dataclass(frozen=True, kw_only=True)
class Data(ABC):
    """Tokenised text with a training and a validation split.

    Args:
        tokenizer: `bytes`, `gpt2`, or the path of a Hugging Face `tokenizer.json`.
        start_at_documents: let no training block start within a document; what of a document goes on beyond
            its block is left out. Validation stays as it is, so that losses compare.
    """

    tokenizer: str
    start_at_documents: bool = False

    def __post_init__(self) -> None:
        self.load_tokenizer()

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of this data; `ConfigError` when its name is unknown."""
        return load_tokenizer(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """What the ids mean, for manifests and folders: not `tokenizer`, which may be a file's path."""
        return self.load_tokenizer().name

    @abstractmethod
    def prepare(self, progress: Progress | None = None) -> None:
        """Make the token files unless they are there; one process calls this before any calls `open`."""

    @abstractmethod
    def open(self, split: Split, share: tuple[int, int] = (0, 1)) -> "Tokens":
        """Open the tokens of one split.

        Args:
            split: which one.
            share: number i and count n: verify this one's of n shares of the files, of all of them the size.

        Raises:
            MissingInputError: a file is not there.
            DataError: a file is truncated, altered, or of another tokenizer.
        """

    @abstractmethod
    def describe(self) -> str:
        """Say in one line what the data is, how many tokens for training and validation, and where."""
