"""Tokenizers: exact round trips, no special tokens in text, and a vocabulary that cannot be had."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sophia_train.data.tokenizers import GPT2, Bytes, Tokenizer, load_tokenizer
from sophia_train.errors import ConfigError


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    # Only from a cache: a test must not wait for a network.
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not cache or not any(Path(cache).glob("*")):
        pytest.skip("GPT-2's vocabulary is not cached (TIKTOKEN_CACHE_DIR)")
    return load_tokenizer("gpt2")


def random_text(generator: random.Random, length: int) -> str:
    """Draw characters from everywhere: ASCII, controls, all planes; no surrogates."""
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(generator.randint(*generator.choice(ranges))) for _ in range(length))


def test_bytes_come_back_exactly() -> None:
    generator = random.Random(1)
    tokenizer = Bytes()
    for length in (0, 1, 2, 255, 1000):
        content = generator.randbytes(length)
        assert tokenizer.decode_bytes(tokenizer.encode(content)) == content
        text = random_text(generator, length)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_stands_for_undecodable_bytes_becomes_these_bytes() -> None:
    content = bytes(range(256))
    tokenizer = Bytes()
    assert tokenizer.encode(content.decode("utf-8", errors="surrogateescape")) == list(content)


def test_surrogates_that_json_can_spell_are_mended() -> None:
    tokenizer = Bytes()
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00 and \ud800")) == "\U0001f600 and \ufffd"


def test_bytes_use_every_id_of_the_vocabulary_and_no_other() -> None:
    tokenizer = Bytes()
    ids = set(tokenizer.encode(bytes(range(256)))) | {tokenizer.end_of_text}
    assert ids == set(range(tokenizer.vocab_size))


def test_undecodable_ids_decode_to_replacement_characters() -> None:
    assert Bytes().decode([0xFF, 0x61, 0xC3]) == "\ufffda\ufffd"


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_special_token_text_is_plain_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue("gpt2") if name == "gpt2" else load_tokenizer(name)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_gpt2_comes_back_exactly_and_knows_its_size(gpt2: Tokenizer) -> None:
    generator = random.Random(2)
    for length in (0, 1, 100, 3000):
        text = random_text(generator, length)
        ids = gpt2.encode(text)
        assert gpt2.decode(ids) == text
        assert gpt2.encode(text.encode()) == ids
        assert all(0 <= i < gpt2.vocab_size - 1 for i in ids)
    assert gpt2.encode("Hello world") == [15496, 995]  # as published
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)


def test_an_unknown_tokenizer_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="data.tokenizer=llama is unknown; use one of: bytes, gpt2"):
        load_tokenizer("llama")


def test_gpt2_needs_its_vocabulary_only_to_encode() -> None:
    assert GPT2().vocab_size == 50257


def offline_error(tmp_path: Path, proxy: str, seconds: float) -> str:
    """Encode with an empty cache and a network that leads to `proxy`; return what it says."""
    program = (
        "import sophia_train.data.tokenizers as t\n"
        f"t.DOWNLOAD_SECONDS = {seconds}\n"
        "try:\n    t.GPT2().encode('a')\n"
        "except t.UnavailableError as error:\n    print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": proxy, "NO_PROXY": ""}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    return result.stdout


def test_a_refused_connection_is_one_line_with_the_fix(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        message = offline_error(tmp_path, f"http://127.0.0.1:{closed.getsockname()[1]}", 30)
    assert message.count("\n") == 1
    assert "data.tokenizer=gpt2" in message and "TIKTOKEN_CACHE_DIR" in message
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        message = offline_error(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2)
    assert "no answer in 0.2 s" in message and "TIKTOKEN_CACHE_DIR" in message
