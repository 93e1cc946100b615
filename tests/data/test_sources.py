"""Sources: what they find, how they stream it, and what they refuse."""

import dataclasses
import gzip
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from sophia_train.data import text_files
from sophia_train.data.sources import PythonStdlib, Text
from sophia_train.data.text_files import documents, find
from sophia_train.data.tokenizers import load_tokenizer
from sophia_train.errors import ConfigError, DataError, MissingInputError

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def contents(path: Path | str) -> dict[str, str]:
    """All documents at `path`, by key."""
    return {key: "".join(map(str, pieces)) for key, pieces in documents(find(str(path)))}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fill(folder: Path) -> None:
    for name in ("b.txt", "a/c.md", "a/d.py", "a.txt", "a/b/e.TXT", ".git/x.txt", "f.csv", "g.gz", "txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")


def test_a_folder_is_searched_in_a_fixed_order(tmp_path: Path) -> None:
    fill(tmp_path)
    names = ["a.txt", "a/b/e.TXT", "a/c.md", "a/d.py", "b.txt"]
    assert list(contents(tmp_path)) == names
    assert contents(tmp_path) == {name: f"text of {name}" for name in names}


def test_files_and_globs(tmp_path: Path) -> None:
    fill(tmp_path)
    assert list(contents("a.txt")) == list(contents(tmp_path / "a.txt")) == ["a.txt"]
    assert list(contents("*.txt")) == ["a.txt", "b.txt"]
    assert list(contents(f"{tmp_path}/a/**/*.[mT]*")) == ["b/e.TXT", "c.md"]
    (tmp_path / "[1].txt").write_text("brackets")
    assert list(contents("[1].txt")) == ["[1].txt"]  # a file of that name comes before the pattern


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_files_read_as_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 7)
    text = "é\r\nfirst\n\n 世界 \U0001f600\n" * 9
    rows = [text, "", "last \u2028 line"]
    pack = PACKERS[packing]
    (tmp_path / f"a.txt{packing}").write_bytes(pack(text.encode()))
    # two frames, as `cat one.zst two.zst` makes them
    lines = [json.dumps({"id": i, "text": row}).encode() + b"\n" for i, row in enumerate(rows)]
    (tmp_path / f"b.jsonl{packing}").write_bytes(pack(lines[0] + b"\n") + pack(lines[1] + lines[2][:-1]))
    assert contents(tmp_path) == {
        f"a.txt{packing}": text,
        f"b.jsonl{packing}:1": text,
        f"b.jsonl{packing}:3": "",
        f"b.jsonl{packing}:4": rows[2],
    }


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_damaged_packed_files_are_named(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.txt{packing}"
    good = PACKERS[packing](random.Random(1).randbytes(5000).hex().encode())
    for bad in (good[:-20], good[: len(good) // 2], b"plain text, not packed at all"):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=rf"a.txt\{packing} cannot be unpacked.*copy it again"):
            contents(path)


@pytest.mark.parametrize("chunk", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xe4\xb8"])
def test_text_that_is_not_utf8_is_named_with_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, bad: bytes
) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk)
    (tmp_path / "a.txt").write_bytes("é世x".encode() + bad)
    with pytest.raises(DataError, match=r"a.txt: byte 6 is not UTF-8; convert"):
        contents(tmp_path)


@pytest.mark.parametrize(
    "row", ["{", "[]", "3", '{"body": "x"}', '{"text": 3}', '{"text": null}', "\xff", "[" * 100_000]
)
def test_bad_rows_are_named_with_file_and_line(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + row.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r'a.jsonl:3 is not a JSON object with a string "text"') as error:
        contents(tmp_path)
    assert len(str(error.value)) < 500


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"data.path=no.txt does not exist"):
        find("no.txt")
    for path in (str(tmp_path), "*.txt"):
        with pytest.raises(
            MissingInputError, match=r"has no text; wanted: .txt .md .py .jsonl, also with .gz"
        ):
            find(path)
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(MissingInputError, match="table.csv has no text"):
        find("table.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(MissingInputError, match="a.txt cannot be read"):
        contents(tmp_path)


def test_pieces_add_up_and_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 50)
    monkeypatch.setattr(text_files, "LONGEST_PIECE", 400)
    generator = random.Random(0)
    for alphabet in ("ab\n", "a \n", "a", "\n", "é世\n\u2028 "):
        text = "".join(generator.choices(alphabet, k=3000))
        (tmp_path / "a.txt").write_text(text, newline="")
        [(_, pieces)] = documents(find("a.txt"))
        found = [str(piece) for piece in pieces]
        assert "".join(found) == text
        assert max(map(len, found)) <= 450 and len(found) > 5


@pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="GPT-2's vocabulary is not cached")
def test_gpt2_tokens_do_not_depend_on_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("gpt2")
    generator = random.Random(0)
    words = [
        "the",
        " quick",
        "'s",
        "\n",
        "\n\n",
        " ",
        "  \n",
        "\t",
        "9",
        "...",
        "é",
        "\u2028",
        "\x1c",
        "\xa0",
    ]
    text = "".join(generator.choices(words, k=4000))
    (tmp_path / "a.txt").write_text(text, newline="")
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 20)
    [(_, pieces)] = documents(find("a.txt"))
    parts = list(pieces)
    assert len(parts) > 20
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def small_text(tmp_path: Path, **settings: object) -> Text:
    folder = tmp_path / "my texts"
    folder.mkdir(exist_ok=True)
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"text {i}")
    return Text(path=str(folder), validation_fraction=0.3, **settings)  # type: ignore[arg-type]


def test_text_is_prepared_once_and_opened(tmp_path: Path) -> None:
    data = small_text(tmp_path)
    assert "to be prepared in data/my_texts-bytes-" in data.describe()
    data.prepare()
    total = sum(len(f"text {i}") + 1 for i in range(40))
    assert len(data.open("train")) + len(data.open("validation")) == total
    assert f"{len(data.open('train'))} + {len(data.open('validation'))} bytes tokens" in data.describe()
    before = (data.prepared_folder / "manifest.json").stat()
    data.prepare()
    assert (data.prepared_folder / "manifest.json").stat() == before


def test_no_two_settings_share_a_folder(tmp_path: Path) -> None:
    data = small_text(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "my texts").symlink_to(tmp_path / "my texts")
    others = [
        dataclasses.replace(data, validation_fraction=0.2),
        dataclasses.replace(data, tokenizer="gpt2"),
        dataclasses.replace(data, path=str(tmp_path)),
        dataclasses.replace(data, path=f"{data.path}/*.txt"),
    ]
    assert len({each.prepared_folder for each in [data, *others]}) == 5
    same = [dataclasses.replace(data, path=path) for path in ("my texts", "./my texts/", "other/my texts")]
    assert {each.prepared_folder for each in same} == {data.prepared_folder}


def test_a_folder_of_other_text_or_settings_is_refused(tmp_path: Path) -> None:
    data = small_text(tmp_path, folder="prepared")
    data.prepare()
    for key, value in {"tokenizer": "gpt2", "validation_fraction": 0.2}.items():
        with pytest.raises(DataError, match=f"prepared was prepared with {key}=.*, not {value}; choose"):
            dataclasses.replace(data, **{key: value}).prepare()
    with pytest.raises(DataError, match="prepared was prepared with source=text my texts, not python_stdlib"):
        PythonStdlib(folder="prepared", validation_fraction=0.3).prepare()
    with pytest.raises(DataError, match="tokenizer=bytes, not with data.tokenizer=gpt2"):
        dataclasses.replace(data, tokenizer="gpt2").open("train")
    text = tmp_path / "my texts" / "3.txt"
    text.write_text("longer than before")
    with pytest.raises(DataError, match="prepared was prepared with revision="):
        data.prepare()
    text.write_text("text 3")
    data.prepare()
    (tmp_path / "my texts").rename("moved")
    data.prepare()  # the tokens do not need their text any more


def test_text_that_cannot_be_prepared_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    for data in (Text(path="a.txt", folder="p/q"), Text(path="b.txt", folder="p/q")):
        with pytest.raises((DataError, MissingInputError)):
            data.prepare()
        assert not (tmp_path / "p").exists() or list((tmp_path / "p").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"validation_fraction": 0.0}, "data.validation_fraction=0.0 must be between 0 and 1; use"),
        ({"validation_fraction": 1.0}, "data.validation_fraction=1.0"),
        ({"shard_tokens": 0}, "data.shard_tokens=0"),
        ({"tokenizer": "word"}, "data.tokenizer=word is unknown; use"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        PythonStdlib(**settings)  # type: ignore[arg-type]
    assert says in str(error.value)


def test_text_bytes_are_known_for_plain_text_only(tmp_path: Path) -> None:
    data = small_text(tmp_path)
    assert data.text_bytes() == sum(len(f"text {i}") for i in range(40))
    (tmp_path / "my texts" / "x.jsonl").write_text("")
    assert data.text_bytes() is None


def test_the_standard_library_is_text_enough_and_in_a_fixed_order() -> None:
    data = PythonStdlib()
    names = [key for key, _ in data.documents()]
    assert names == sorted(names) == [key for key, _ in data.documents()]
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "__pycache__", "idlelib"}
    assert not any("sysconfigdata" in name for name in names)
    assert (data.text_bytes() or 0) > 8_000_000
    assert data.prepared_folder.parts[0] == "data"


def test_the_standard_library_comes_back_byte_for_byte(tmp_path: Path) -> None:
    data = PythonStdlib(folder=str(tmp_path / "p"))
    data.prepare()
    tokenizer = data.load_tokenizer()
    found = b""
    for split in ("train", "validation"):
        tokens = data.open(split)  # type: ignore[arg-type]
        ids = tokens.read(0, len(tokens))
        assert len(ids) > 100_000
        found += tokenizer.decode_bytes(ids[ids != tokenizer.end_of_text].tolist())
        first_end = ids.tolist().index(tokenizer.end_of_text, 1)
        assert tokenizer.decode(ids[1:first_end].tolist()).isprintable() is False
    assert len(found) == data.text_bytes()
    for key, pieces in data.documents():
        if key in ("os.py", "this.py", "encodings/cp037.py"):
            assert b"".join(pieces) in found  # type: ignore[arg-type]
