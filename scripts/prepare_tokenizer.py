"""Bring GPT-2's vocabulary to a folder, or check one, to train without a network.

    python scripts/prepare_tokenizer.py [--cache DIR]

DIR is a cache of tiktoken's; by default $TIKTOKEN_CACHE_DIR, or data/tiktoken.
What is missing there or damaged is downloaded, 1.5 MB in all; a whole one is
checked without a network. Copy it, and set TIKTOKEN_CACHE_DIR to the copy.
"""

import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sophia_train import durable
from sophia_train.command_line import Parser
from sophia_train.data.tokenizers import DOWNLOAD_SECONDS, GPT2, GPT2_FILES
from sophia_train.errors import DataError, MissingInputError, OutputError, UnavailableError, exit_code_of

VARIABLE = "TIKTOKEN_CACHE_DIR"
KNOWN = ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11])  # as published


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    default = Path(os.environ.get(VARIABLE) or "data/tiktoken")
    parser.add_argument("--cache", type=Path, default=default, metavar="DIR", help="(%(default)s)")
    cache = parser.parse_args(arguments).cache.expanduser().absolute()
    if cache.exists() and not cache.is_dir():
        raise OutputError(f"--cache {cache} is a file; name a folder")
    print = Console(highlight=False, soft_wrap=True).print
    files = {url: cache / hashlib.sha1(url.encode()).hexdigest() for url in GPT2_FILES}  # tiktoken's names
    states = {url: state(path, GPT2_FILES[url]) for url, path in files.items()}
    for url, path in files.items():
        print(f"{path}\n  {url.rpartition('/')[2]}: {states[url]}", markup=False)
    for url, found in states.items():
        if found != "ok":
            durable.write_bytes(files[url], download(url, f"{files[url]} is {found}"))
            print(f"{url}\n  downloaded", markup=False)
    os.environ[VARIABLE] = str(cache)
    check()
    print(
        f"GPT-2's vocabulary is complete, and encodes as published\nexport {VARIABLE}={cache}", markup=False
    )


def state(path: Path, digest: str) -> str:
    """Say whether a file is ok, missing or damaged; `MissingInputError` when it cannot be read."""
    try:
        return "ok" if hashlib.sha256(path.read_bytes()).hexdigest() == digest else "damaged"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        raise MissingInputError(f"{path} cannot be read ({error.strerror}); mend or remove it") from None


def download(url: str, why: str) -> bytes:
    """Download a part of the vocabulary; `UnavailableError`, which says why it is needed, if that fails."""
    fix = "run this where there is a network, and copy the folder"
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as answer:
            content: bytes = answer.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(error, urllib.error.HTTPError):  # an answer, and open
            error.close()
        raise UnavailableError(f"{why}, and {url} cannot be downloaded ({reason}); {fix}") from None
    if hashlib.sha256(content).hexdigest() != GPT2_FILES[url]:
        raise UnavailableError(f"{why}, and {url} sends something else; {fix}")
    return content


def check() -> None:
    """Encode a known text and look at every token; raises `DataError` when something is not GPT-2's."""
    tokenizer = GPT2()
    text, ids = KNOWN
    encoded = tokenizer.encode(text)
    words = {tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)}
    if encoded != ids or len(words) != tokenizer.vocab_size:
        raise DataError(
            f"tiktoken encodes {text!r} as {encoded}, not as {ids}, or knows {len(words)} tokens, not "
            f"{tokenizer.vocab_size}; install the version of it in constraints.txt"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
