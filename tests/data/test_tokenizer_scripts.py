"""`scripts/train_tokenizer.py` and `scripts/prepare_tokenizer.py`, and training with what the first makes."""

import hashlib
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import load_script

from sophia_train.data.manifest import Manifest
from sophia_train.data.tokenizers import GPT2_FILES, load_tokenizer

train_tokenizer = load_script("train_tokenizer")
prepare_tokenizer = load_script("prepare_tokenizer")


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents of which each has a word of its own, several times."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        word = "".join(chr(ord("a") + int(digit)) for digit in f"{i:02d}") * 3
        (folder / f"{i}.txt").write_text(f"the {word} and the {word}, " * 5)
    return folder


def learn(out: str, *words: str) -> int:
    return train_tokenizer.main(
        ["data=text", "data.path=texts", "data.validation_fraction=0.3", "--out", out, *words]
    )


def test_the_same_text_makes_the_same_file(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.json", "b.json"):
        assert learn(name, "--vocab-size", "300") == 0
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    assert load_tokenizer("a.json").vocab_size == 300
    assert "data.tokenizer=b.json model.vocab_size=300" in capsys.readouterr().out


def test_words_are_learned_and_text_comes_back(texts: Path) -> None:
    assert learn("made.json", "--vocab-size", "300") == 0
    tokenizer = load_tokenizer("made.json")
    assert len(tokenizer.encode(" the and the")) == 3
    text = "the aa\r\n\t  \x00 \U0001f600 <|endoftext|> é"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_validation_split_is_not_read(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learn("made.json", "--vocab-size", "2000") == 0
    assert "no more than that are in the text, of the 2,000 asked for" in capsys.readouterr().out
    data = train_tokenizer.build(
        train_tokenizer.compose(["data=text", "data.path=texts", "data.validation_fraction=0.3"]).data
    )
    rule, tokenizer = data.split_rule(), load_tokenizer("made.json")
    documents = [document for unit in data.units() for document in unit.documents()]
    learned = {"train": 0, "validation": 0}
    for document in documents:
        word = "".join(map(str, document.pieces)).split()[1]
        learned[rule.split_of(document)] += len(tokenizer.encode(f" {word}")) == 1
    assert learned["train"] == sum(rule.split_of(document) == "train" for document in documents)
    assert learned["validation"] == 0


def test_of_one_document_the_end_is_not_read(texts: Path) -> None:
    shutil.rmtree(texts)
    texts.mkdir()
    (texts / "one.txt").write_text("early words " * 700 + "latest " * 10)
    assert learn("made.json", "--vocab-size", "600") == 0
    tokenizer = load_tokenizer("made.json")
    assert len(tokenizer.encode(" early")) == 1 and len(tokenizer.encode(" latest")) > 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--out", "t.json", "--vocab-size", "256"], 64, "--vocab-size 256 is less than"),
        (["--out", "t.json", "--vocab-size", "0"], 64, "--vocab-size"),
        (["--out", "t.json"], 64, "--vocab-size"),
        (["--out", "t", "--vocab-size", "300"], 64, "--out t.json"),
        (["--out", "none/t.json", "--vocab-size", "300"], 73, "no folder none"),
        (["--out", "there.json", "--vocab-size", "300"], 73, "there.json exists already"),
        (["--out", "t.json", "--vocab-size", "300", "data.path=none"], 66, "data.path=none"),
        (["--out", "t.json", "--vocab-size", "300", "data.path=empty"], 65, "no text to learn from"),
        (["--out", "t.json", "--vocab-size", "300", "data=token_files"], 64, "use data=text"),
    ],
)
def test_mistakes_are_one_line(
    texts: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str
) -> None:
    Path("there.json").write_text("mine")
    Path("empty").mkdir()
    Path("empty/a.txt").touch()
    assert train_tokenizer.main(["data=text", "data.path=texts", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert Path("there.json").read_text() == "mine" and not Path("t.json").exists()


def test_a_run_trains_with_a_learned_tokenizer(texts: Path, tmp_path: Path, runs) -> None:
    assert learn("made.json", "--vocab-size", "300") == 0
    overrides = (
        f"data=text data.path={texts} data.folder={tmp_path}/prepared data.tokenizer={tmp_path}/made.json "
        "model=gpt2_nano model.n_layer=1 model.n_head=2 model.n_embd=16 model.block_size=8 max_steps=2 "
        "batch_size=2 micro_batch_size=2 schedule.warmup_steps=1 sample_interval=2 sample_tokens=4 "
        "eval_tokens=64 tracker=jsonl"
    ).split()
    refused = runs(*overrides, "model.vocab_size=257", f"run_dir={tmp_path}/refused")
    assert refused.code == 64 and "use model.vocab_size=300" in refused.errors[0]
    ended = runs(*overrides, "model.vocab_size=300", f"run_dir={tmp_path}/run")
    assert ended.code == 0, ended.err
    record = Manifest.read(tmp_path / "prepared")
    digest = hashlib.sha256(Path("made.json").read_bytes()).hexdigest()
    assert record.vocab_size == 300 and digest[:16] in record.tokenizer

    # elsewhere and under another name it is the same tokenizer; another file there is not
    moved = Path("elsewhere.json")
    Path("made.json").rename(moved)
    overrides += ["model.vocab_size=300", f"data.tokenizer={moved.absolute()}"]
    assert runs(*overrides, f"run_dir={tmp_path}/moved").code == 0
    content = json.loads(moved.read_bytes())
    content["model"]["merges"].pop()
    moved.write_text(json.dumps(content))
    other = runs(*overrides, f"run_dir={tmp_path}/other")
    assert other.code == 65 and record.tokenizer in other.errors[0]


@pytest.fixture
def vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two small files in the place of GPT-2's, to be had from a server, and a cache for them."""
    served = tmp_path / "served"
    served.mkdir()
    contents = {"vocab.bpe": b"merges", "encoder.json": b"words"}
    for name, content in contents.items():
        (served / name).write_bytes(content)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(served))  # type: ignore[arg-type]

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}/"
        files = {root + name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        monkeypatch.setattr(prepare_tokenizer, "GPT2_FILES", files)
        monkeypatch.setattr(prepare_tokenizer, "check", lambda: None)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "unset")  # which the script sets
        yield served
        server.shutdown()


def cached(cache: Path) -> dict[str, bytes]:
    """What is in a cache, by the last part of its address."""
    names = {hashlib.sha1(url.encode()).hexdigest(): url for url in prepare_tokenizer.GPT2_FILES}
    return {names[path.name].rpartition("/")[2]: path.read_bytes() for path in cache.iterdir()}


def test_what_is_missing_or_damaged_is_downloaded(
    vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    whole = {"vocab.bpe": b"merges", "encoder.json": b"words"}
    assert prepare_tokenizer.main(["--cache", str(cache)]) == 0
    assert cached(cache) == whole
    assert f"export TIKTOKEN_CACHE_DIR={cache}" in capsys.readouterr().out

    next(path for path in cache.iterdir() if path.read_bytes() == b"words").write_bytes(b"words?")
    assert prepare_tokenizer.main(["--cache", str(cache)]) == 0
    assert cached(cache) == whole
    lines = capsys.readouterr().out.splitlines()
    assert "  vocab.bpe: ok" in lines and "  encoder.json: damaged" in lines


def test_without_a_network_a_whole_cache_is_ok_and_a_damaged_one_is_named(
    vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert prepare_tokenizer.main(["--cache", str(cache)]) == 0
    shutil.rmtree(vocabulary)
    assert prepare_tokenizer.main(["--cache", str(cache)]) == 0
    path = next(path for path in cache.iterdir() if path.read_bytes() == b"words")
    path.write_bytes(b"wor")
    capsys.readouterr()
    assert prepare_tokenizer.main(["--cache", str(cache)]) == 69
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} is damaged") and error.count("\n") == 1
    assert path.read_bytes() == b"wor"  # not worse than before


def test_something_else_than_was_asked_for_is_not_kept(
    vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (vocabulary / "vocab.bpe").write_text("<html>Please log in</html>")
    assert prepare_tokenizer.main(["--cache", str(tmp_path / "cache")]) == 69
    assert "sends something else" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_a_file_in_the_place_of_the_cache_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").touch()
    assert prepare_tokenizer.main(["--cache", str(tmp_path / "cache")]) == 73
    assert "is a file" in capsys.readouterr().err


def test_the_addresses_are_those_of_tiktoken() -> None:
    openai_public = pytest.importorskip("tiktoken_ext.openai_public")
    constants = str(openai_public.gpt2.__code__.co_consts)
    assert all(url in constants and digest in constants for url, digest in GPT2_FILES.items())


def test_a_real_cache_is_accepted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not cache or not any(Path(cache).glob("*")):
        pytest.skip("GPT-2's vocabulary is not cached (TIKTOKEN_CACHE_DIR)")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)  # put back afterwards
    assert prepare_tokenizer.main([]) == 0
    assert capsys.readouterr().out.count(": ok") == 2
