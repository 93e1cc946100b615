"""The manifest of a prepared folder: what its token shards hold, and the digests to prove it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sophia_train import durable
from sophia_train.data.base import SPLITS, Split
from sophia_train.errors import DataError, MissingInputError

FILE_NAME = "manifest.json"
FORMAT_VERSION = 1
TAIL = "tail"
DTYPES = {"uint16": "<u2", "uint32": "<u4"}  # little-endian on every machine


@dataclass(frozen=True)
class Shard:
    """One file of tokens in a prepared folder."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a reader must know about a prepared folder.

    Args:
        source: what the text is, and `revision` which state of it.
        tokenizer: its name; `vocab_size` and `end_of_text` are its ids.
        dtype: `uint16` or `uint32`, little-endian.
        split_rule: what the rule calls itself, such as `documents`, chosen by a hash of their keys; or
            `tail`, the last tokens, where the rule has left a split empty.
        validation_fraction: the share the rule was asked to hold out.
        documents: how many documents begin in each split.
        shards: the files of each split, in order.
        text_bytes: bytes of text that the tokens were made of; 0 where that is not known.
    """

    source: str
    revision: str
    tokenizer: str
    vocab_size: int
    end_of_text: int
    dtype: str
    split_rule: str
    validation_fraction: float
    documents: dict[Split, int]
    shards: dict[Split, list[Shard]]
    text_bytes: int = 0

    def tokens(self, split: Split) -> int:
        """Count the tokens of a split."""
        return sum(shard.tokens for shard in self.shards[split])

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`, all or nothing."""
        content = {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        durable.write_json(folder / FILE_NAME, content)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a prepared folder.

        Raises:
            MissingInputError: `folder` has none, so it is not prepared.
            DataError: the manifest is damaged or of a later format.
        """
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise MissingInputError(
                f"{folder} is not a prepared data folder (no {FILE_NAME}); use scripts/prepare_data.py"
            ) from None
        except OSError as error:
            raise MissingInputError(
                f"{path} cannot be read ({error.strerror}); mend its permissions"
            ) from None
        except ValueError:
            raise _damaged(path, "not JSON") from None
        version = content.pop("format_version", None) if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: format_version={version}, but only {FORMAT_VERSION} is known here; update"
            )
        try:
            return cls(**content | {"shards": _shards(content["shards"])})
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, str(error)) from None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}")


def _shards(content: Any) -> dict[Split, list[Shard]]:
    shards = {split: [Shard(**shard) for shard in content[split]] for split in SPLITS}
    for shard in (*shards["train"], *shards["validation"]):
        if Path(shard.file).name != shard.file:  # a manifest from elsewhere must not reach outside its folder
            raise ValueError(f"shard file {shard.file!r}")
        if not isinstance(shard.tokens, int) or shard.tokens < 1:
            raise ValueError(f"shard {shard.file} of {shard.tokens!r} tokens")
    return shards


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged ({reason}); remove the folder and prepare it anew")
