"""Tokenizers: raw bytes, GPT-2's byte-pair encoding from tiktoken, and Hugging Face's tokenizer.json."""

import functools
import hashlib
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sophia_train.errors import ConfigError, DataError, MissingInputError, UnavailableError

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

DOWNLOAD_SECONDS = 30.0  # tiktoken itself would wait for ever on a network that swallows packets

# What GPT-2's vocabulary is made of, by address, and the SHA-256 of each, as tiktoken has them.
GPT2_FILES = {
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe": (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    ),
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json": (
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    ),
}

END_OF_TEXT = "<|endoftext|>"
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS>")
"""Names that end of text has in other people's vocabularies; the first that is there counts."""


class Tokenizer(ABC):
    """Text to token ids and back; ids are in [0, vocab_size), `end_of_text` is one of them.

    The name says what the ids mean: equal names, equal tokens. It is fit for a file's name.
    """

    name: str
    vocab_size: int
    end_of_text: int

    @abstractmethod
    def encode(self, text: str | bytes) -> list[int]:
        """Encode ordinary text: text that spells a special token is plain text, not that token."""

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """Encode as `encode` does, into an array of some type of integer, which is quicker for long text."""
        return np.asarray(self.encode(text), dtype=np.uint32)

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode ids to the exact bytes behind them; end of text becomes its spelling."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; bytes that are not UTF-8, as a cut character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class Bytes(Tokenizer):
    """Every byte is a token: 256 bytes and end of text."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    _table = [bytes([byte]) for byte in range(256)] + [END_OF_TEXT.encode()]

    def encode(self, text: str | bytes) -> list[int]:
        """Encode bytes as they are and text as UTF-8; surrogate escapes become the bytes they stand for."""
        return list(text if isinstance(text, bytes) else _utf8(text))

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """Encode as `encode` does."""
        return np.frombuffer(text if isinstance(text, bytes) else _utf8(text), dtype=np.uint8)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode ids to bytes."""
        return b"".join([self._table[i] for i in ids])


class GPT2(Tokenizer):
    """GPT-2's byte-pair encoding; its vocabulary is loaded by tiktoken when it is first needed."""

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    def encode(self, text: str | bytes) -> list[int]:
        """Encode text; in bytes, what is not UTF-8 becomes U+FFFD.

        Raises:
            UnavailableError: the vocabulary is neither cached nor to be downloaded.
        """
        return self._encoding.encode_ordinary(_text(text))

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """Encode as `encode` does; raises as it does."""
        if not hasattr(self._encoding, "encode_to_numpy"):  # tiktoken before 0.9
            return super().encode_array(text)
        try:
            return self._encoding.encode_to_numpy(_text(text), disallowed_special=())
        except UnicodeEncodeError:  # surrogates, which `encode` mends
            return super().encode_array(text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode ids to bytes; raises `UnavailableError` as `encode` does."""
        return self._encoding.decode_bytes(ids)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # another process loads the vocabulary by itself

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        outcome: list[tiktoken.Encoding | Exception] = []

        def load() -> None:
            try:
                outcome.append(tiktoken.get_encoding("gpt2"))
            except Exception as error:  # whatever it is, the vocabulary is not to be had
                outcome.append(error)

        # A thread, because tiktoken's download knows no timeout; a daemon, so as not to outlive the error.
        thread = threading.Thread(target=load, name="gpt2-vocabulary", daemon=True)
        thread.start()
        thread.join(DOWNLOAD_SECONDS)
        if outcome and isinstance(outcome[0], tiktoken.Encoding):
            return outcome[0]
        reason = type(outcome[0]).__name__ if outcome else f"no answer in {DOWNLOAD_SECONDS:g} s"
        raise UnavailableError(
            f"data.tokenizer=gpt2: its vocabulary is not cached and cannot be downloaded ({reason}); set "
            "TIKTOKEN_CACHE_DIR to a tiktoken cache from a machine with network, or use data.tokenizer=bytes"
        )


class TokenizerFile(Tokenizer):
    """A Hugging Face `tokenizer.json`.

    Decoding is exact for byte-level vocabularies; for others it is what the library makes of the tokens. What
    the file says about truncation, padding, dropout and tokens around a text is left aside.

    Args:
        path: where the file is, for messages.
        content: of the file. It is what counts, so the file may be moved and renamed.

    Raises:
        ConfigError: it is no tokenizer, or has no end of text.
    """

    def __init__(self, path: str, content: bytes) -> None:
        self._path, self._content = path, content
        self.name = f"tokenizer.json-sha256-{hashlib.sha256(content).hexdigest()[:16]}"
        self._library = _parse(path, content)
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._spelling = next(name for name in ENDS_OF_TEXT if name in vocabulary)
        self.end_of_text = vocabulary[self._spelling]

    def encode(self, text: str | bytes) -> list[int]:
        """Encode text; in bytes, what is not UTF-8 becomes U+FFFD.

        Raises:
            DataError: the tokenizer makes its end of text of ordinary text.
        """
        text = _text(text)
        ids = self._ids(text)
        if self.end_of_text not in ids:
            return ids
        # A word of the vocabulary, and not a special token, is spelled like end of text: broken in two.
        middle = len(self._spelling) // 2
        head, tail = self._spelling[:middle], self._spelling[middle:]
        first, *others = text.split(self._spelling)
        pieces = [first]
        for other in others:
            pieces[-1] += head
            pieces.append(tail + other)
        ids = [i for piece in pieces for i in self._ids(piece)]
        if self.end_of_text in ids:
            raise DataError(
                f"data.tokenizer={self._path} makes its end of text, {self._spelling}, of ordinary text; "
                "use a tokenizer in which that is a special token"
            )
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode ids to bytes."""
        if self._table is None:
            return self._library.decode(list(ids), skip_special_tokens=False).encode()
        return b"".join([self._table.get(int(i), b"") for i in ids])

    def __reduce__(self) -> tuple[type, tuple[str, bytes]]:
        return TokenizerFile, (self._path, self._content)

    def _ids(self, text: str) -> list[int]:
        try:  # a batch of one, since this computes no offsets
            return self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:  # surrogates
            mended = _utf8(text).decode("utf-8", errors="replace")
            return self._library.encode_batch_fast([mended], add_special_tokens=False)[0].ids

    @cached_property
    def _table(self) -> dict[int, bytes] | None:
        """The bytes of every token, or None if the vocabulary is not byte-level."""
        content = json.loads(self._content)
        decoder = content.get("decoder") or {}
        if "ByteLevel" not in {decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", []))}:
            return None
        # GPT-2 writes printable bytes as they are, and the others, in order, as the characters from 256 on.
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        byte_of = {chr(byte): byte for byte in plain}
        byte_of |= {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(plain)))}
        table = {
            i: bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()
            for token, i in self._library.get_vocab(with_added_tokens=False).items()
        }
        return table | {token["id"]: token["content"].encode() for token in content.get("added_tokens", [])}


@functools.lru_cache(maxsize=4)
def _parse(path: str, content: bytes) -> "tokenizers.Tokenizer":
    library = _tokenizers()
    try:
        settings = json.loads(content)
        settings |= {"truncation": None, "padding": None}
        if "dropout" in settings["model"]:
            settings["model"]["dropout"] = None
        for token in settings.get("added_tokens", []):  # for `encode_special_tokens`
            token["special"] = token["special"] or token["content"] in ENDS_OF_TEXT
        made = library.Tokenizer.from_str(json.dumps(settings))
    except Exception as error:  # the library raises bare ones
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"data.tokenizer={path} is not a tokenizer.json of Hugging Face's ({reason[:100]}); "
            "give one, or make one with scripts/train_tokenizer.py"
        ) from None
    made.encode_special_tokens = True  # that is, as the plain text they are spelled with
    vocabulary = made.get_vocab(with_added_tokens=True)
    if not any(name in vocabulary for name in ENDS_OF_TEXT):
        raise ConfigError(
            f"data.tokenizer={path} has no end of text, which documents begin with; "
            f"add one of these as a special token: {' '.join(ENDS_OF_TEXT)}"
        )
    return made


def _tokenizers() -> Any:
    # One thread: work is spread over processes, and its threads would not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    return tokenizers


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Learn a byte-level BPE vocabulary with GPT-2's pre-tokenisation.

    Args:
        texts: pieces of documents, of which only the words and their counts are held.
        vocab_size: at most this many tokens, with the 256 bytes and end of text; short text makes fewer.

    Returns:
        The content of a tokenizer.json, the same for the same texts.
    """
    library = _tokenizers()
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator((_utf8(text).decode("utf-8", errors="replace") for text in texts), trainer)
    return made.to_str(pretty=True) + "\n"


_TOKENIZERS: dict[str, type[Tokenizer]] = {tokenizer.name: tokenizer for tokenizer in (Bytes, GPT2)}


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer called `name`, or that of the tokenizer.json at this path.

    Raises:
        ConfigError: there is none of this name, or the file is not a tokenizer.
        MissingInputError: there is no such file.
    """
    if name in _TOKENIZERS:
        return _TOKENIZERS[name]()
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not (path.is_file() or path.suffix == ".json" or "/" in name):
        raise ConfigError(
            f"data.tokenizer={name} is unknown; use one of: {', '.join(_TOKENIZERS)}, "
            "or the path of a tokenizer.json"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MissingInputError(
            f"data.tokenizer={name}: {path} cannot be read ({error.strerror}); give the path of a "
            "tokenizer.json, or make one with scripts/train_tokenizer.py"
        ) from None
    return TokenizerFile(name, content)


def _text(text: str | bytes) -> str:
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:  # lone or paired surrogates, as JSON can spell them: mended as tiktoken does
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace").encode()
