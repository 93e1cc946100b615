"""Tokenizers: exact round trips, no special tokens in text, and a vocabulary that cannot be had."""

import json
import os
import pickle
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sophia_train.data.tokenizers import ENDS_OF_TEXT, GPT2, Bytes, Tokenizer, load_tokenizer, train_bpe
from sophia_train.errors import ConfigError, DataError, MissingInputError


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    # Only from a cache: a test must not wait for a network.
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not cache or not any(Path(cache).glob("*")):
        pytest.skip("GPT-2's vocabulary is not cached (TIKTOKEN_CACHE_DIR)")
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def learned() -> str:
    """The content of a tokenizer.json."""
    return train_bpe(["the cat and the dog, 12 34\n    def\ttext endoftext " * 20], 290)


@pytest.fixture
def tokenizer_file(learned: str, tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(learned)
    return path


def any_tokenizer(name: str, request: pytest.FixtureRequest) -> Tokenizer:
    """The tokenizer called `name`; `file` is a tokenizer.json."""
    if name == "file":
        return load_tokenizer(str(request.getfixturevalue("tokenizer_file")))
    return request.getfixturevalue("gpt2") if name == "gpt2" else load_tokenizer(name)


def edit(path: Path, **changes: object) -> Tokenizer:
    """Load the tokenizer that a file with other settings makes."""
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
    return load_tokenizer(str(path))


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


@pytest.mark.parametrize("name", ["bytes", "gpt2", "file"])
def test_special_token_text_is_plain_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = any_tokenizer(name, request)
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


@pytest.mark.parametrize("name", ["bytes", "gpt2", "file"])
def test_an_array_holds_the_same_ids(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = any_tokenizer(name, request)
    generator = random.Random(3)
    texts = ["", "a<|endoftext|>b", "\ud83d\ude00 and \ud800", *(random_text(generator, n) for n in (1, 500))]
    for text in (*texts, b"", b"\xff\xfe caf\xc3\xa9"):
        ids = tokenizer.encode_array(text)
        assert ids.dtype.kind in "iu" and ids.ndim == 1
        assert ids.tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("name", ["bytes", "gpt2", "file"])
def test_a_tokenizer_goes_to_other_processes(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = any_tokenizer(name, request)
    ids = tokenizer.encode("a cat<|endoftext|>")
    if name == "file":  # which the other process need not see
        request.getfixturevalue("tokenizer_file").unlink()
    pickled = pickle.dumps(tokenizer)
    assert len(pickled) < 1 << 16
    other = pickle.loads(pickled)
    assert (other.name, other.vocab_size, other.end_of_text) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    assert other.encode("a cat<|endoftext|>") == ids


def test_a_tokenizer_file_comes_back_exactly(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    generator = random.Random(4)
    for length in (0, 1, 100, 3000):
        text = random_text(generator, length)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.encode(text.encode()) == ids
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.end_of_text for i in ids)
    assert (
        b"".join(tokenizer.decode_bytes([i]) for i in tokenizer.encode("\U0001f600")) == "\U0001f600".encode()
    )
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00 and \ud800")) == "\U0001f600 and \ufffd"


def test_the_name_of_a_tokenizer_file_is_that_of_its_content(tokenizer_file: Path, tmp_path: Path) -> None:
    name = load_tokenizer(str(tokenizer_file)).name
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    moved = tokenizer_file.rename(folder / "tokenizer.json")
    assert load_tokenizer(str(moved)).name == load_tokenizer(str(folder)).name == name
    assert "/" not in name and " " not in name
    moved.write_text(moved.read_text() + "\n")
    assert load_tokenizer(str(moved)).name != name


def test_what_a_file_says_of_padding_and_truncation_is_left_aside(tokenizer_file: Path) -> None:
    ids = load_tokenizer(str(tokenizer_file)).encode("the cat")
    other = edit(
        tokenizer_file,
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 50},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    )
    assert other.encode("the cat") == ids


@pytest.mark.parametrize("name", ENDS_OF_TEXT)
def test_end_of_text_goes_by_several_names(tokenizer_file: Path, name: str) -> None:
    token = {**json.loads(tokenizer_file.read_bytes())["added_tokens"][0], "content": name, "special": False}
    vocabulary = json.loads(tokenizer_file.read_bytes())["model"]
    vocabulary["vocab"] = {name if i == 0 else word: i for word, i in vocabulary["vocab"].items()}
    tokenizer = edit(tokenizer_file, added_tokens=[token], model=vocabulary)
    assert tokenizer.end_of_text == 0 and tokenizer.decode([0]) == name
    ids = tokenizer.encode(f"a{name}b")
    assert 0 not in ids and tokenizer.decode(ids) == f"a{name}b"


def test_a_word_of_the_vocabulary_spelled_like_end_of_text_stays_text(tokenizer_file: Path) -> None:
    words = {name: i for i, name in enumerate(["</s>", "a", "b", "</", "s>", "?"])}
    tokenizer = edit(
        tokenizer_file,
        added_tokens=[],
        pre_tokenizer={"type": "WhitespaceSplit"},
        decoder=None,
        model={"type": "WordLevel", "vocab": words, "unk_token": "?"},
    )
    assert tokenizer.encode("a </s> b </s>") == [1, 3, 4, 2, 3, 4]
    assert tokenizer.decode([1, 2]) == "a b"
    tokenizer = edit(tokenizer_file, normalizer={"type": "Lowercase"})
    with pytest.raises(DataError, match=r"makes its end of text, </s>, of ordinary text"):
        tokenizer.encode("a </S> b")


def test_ids_may_have_gaps(tokenizer_file: Path) -> None:
    content = json.loads(tokenizer_file.read_bytes())
    more = {**content["added_tokens"][0], "content": "<pad>", "id": 999}
    tokenizer = edit(tokenizer_file, added_tokens=[*content["added_tokens"], more])
    assert tokenizer.decode([tokenizer.vocab_size - 1]) in ("<pad>", "")
    assert 999 not in tokenizer.encode("a <pad> b")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is not a tokenizer.json"),
        ("[]", "is not a tokenizer.json"),
        ("{}", "is not a tokenizer.json"),
        ('{"model": {"type": "none"}}', "is not a tokenizer.json"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "has no end of text"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=says) as error:
        load_tokenizer(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_file_that_is_not_there_is_missing_input(tmp_path: Path) -> None:
    for name in ("none.json", "none/tokenizer", str(tmp_path)):
        with pytest.raises(MissingInputError, match=f"data.tokenizer={name}"):
            load_tokenizer(name)


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
