"""Tokenizers: raw bytes, which need nothing, and GPT-2's byte-pair encoding from tiktoken."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from sophia_train.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    import tiktoken

DOWNLOAD_SECONDS = 30.0  # tiktoken itself would wait for ever on a network that swallows packets


class Tokenizer(ABC):
    """Text to token ids and back; ids are in [0, vocab_size), `end_of_text` is one of them."""

    name: str
    vocab_size: int
    end_of_text: int

    @abstractmethod
    def encode(self, text: str | bytes) -> list[int]:
        """Encode ordinary text: text that spells a special token is plain text, not that token."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode ids to the exact bytes behind them; end of text becomes `<|endoftext|>`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; bytes that are not UTF-8, as a cut character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class Bytes(Tokenizer):
    """Every byte is a token: 256 bytes and end of text."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    _table = [bytes([byte]) for byte in range(256)] + [b"<|endoftext|>"]

    def encode(self, text: str | bytes) -> list[int]:
        """Encode bytes as they are and text as UTF-8; surrogate escapes become the bytes they stand for."""
        return list(text if isinstance(text, bytes) else _utf8(text))

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
        return self._encoding.encode_ordinary(
            text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
        )

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode ids to bytes; raises `UnavailableError` as `encode` does."""
        return self._encoding.decode_bytes(ids)

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


_TOKENIZERS: dict[str, type[Tokenizer]] = {tokenizer.name: tokenizer for tokenizer in (Bytes, GPT2)}


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer called `name`; `ConfigError` when there is none."""
    if name not in _TOKENIZERS:
        raise ConfigError(f"data.tokenizer={name} is unknown; use one of: {', '.join(_TOKENIZERS)}")
    return _TOKENIZERS[name]()


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:  # lone or paired surrogates, as JSON can spell them: mended as tiktoken does
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace").encode()
