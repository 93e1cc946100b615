"""Sources: what they find, how they stream it, and what they refuse."""

import dataclasses
import gzip
import json
import lzma
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from pyarrow import table
from pyarrow.parquet import write_table

from sophia_train.data import sources, text_files
from sophia_train.data.base import SPLITS
from sophia_train.data.manifest import Manifest
from sophia_train.data.sources import PythonStdlib, Text
from sophia_train.data.text_files import documents, find
from sophia_train.data.units import ByKey, Unit
from sophia_train.errors import ConfigError, DataError, MissingInputError

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def contents(path: Path | str) -> dict[str, str]:
    """All documents at `path`, by key."""
    return {key: "".join(map(str, pieces)) for key, pieces, _ in documents(find(str(path)))}


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
            MissingInputError, match=r"has no text; wanted: .txt .md .py .jsonl .parquet, also with .gz"
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
    monkeypatch.setattr("sophia_train.data.pieces.LONGEST_PIECE", 400)
    generator = random.Random(0)
    for alphabet in ("ab\n", "a \n", "a", "\n", "é世\n\u2028 "):
        text = "".join(generator.choices(alphabet, k=3000))
        (tmp_path / "a.txt").write_text(text, newline="")
        [(_, pieces, _)] = documents(find("a.txt"))
        found = [str(piece) for piece in pieces]
        assert "".join(found) == text
        assert max(map(len, found)) <= 450 and len(found) > 5


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
    assert f"{len(data.open('train'))} + {len(data.open('validation'))} tokens (bytes)" in data.describe()
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


def test_a_folder_of_another_split_rule_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_text(tmp_path, folder="by-key")
    data.prepare()
    short = dataclasses.replace(data, path=str(tmp_path / "my texts" / "3.txt"), folder="tail")
    short.prepare()
    assert Manifest.read(Path("tail")).split_rule == "tail"
    monkeypatch.setattr(ByKey, "describe", lambda rule: "some other rule")
    with pytest.raises(
        DataError, match="by-key was prepared with split_rule=documents, not some other rule; choose another"
    ):
        data.prepare()
    short.prepare()  # what a rule falls back to is no sign of which it was


@pytest.mark.parametrize("folder", [".", "..", "/", "a/..", "~/..", "./"])
def test_a_folder_without_a_name_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="does not end in a name; write out which folder that is"):
        PythonStdlib(folder=folder)


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
        ({"tokenizer": "word"}, "data.tokenizer=word is unknown; use"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        PythonStdlib(**settings)  # type: ignore[arg-type]
    assert says in str(error.value)


def test_the_standard_library_is_text_enough_and_in_a_fixed_order() -> None:
    data = PythonStdlib()
    names = [document.key for unit in data.units() for document in unit.documents()]
    assert names == sorted(names) == [document.key for unit in data.units() for document in unit.documents()]
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "__pycache__", "idlelib"}
    assert not any("sysconfigdata" in name for name in names)
    assert sum(unit.stored_bytes for unit in data.units()) > 8_000_000
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
    assert len(found) == Manifest.read(data.prepared_folder).text_bytes
    assert len(found) == sum(unit.stored_bytes for unit in data.units())
    for unit in data.units():
        for document in unit.documents():
            if document.key in ("os.py", "this.py", "encodings/cp037.py"):
                assert b"".join(document.pieces) in found  # type: ignore[arg-type]


def keys_of(unit: Unit) -> list[str]:
    return [document.key for document in unit.documents()]


def test_small_files_share_a_unit_in_their_order(tmp_path: Path) -> None:
    for name, size in {"a": 3, "b": 4, "c": 20, "d": 0, "e": 1, "f": 1}.items():
        (tmp_path / f"{name}.txt").write_text("x" * size)
    gathered = text_files.units(find("*.txt"), 7)
    assert [keys_of(unit) for unit in gathered] == [
        ["a.txt", "b.txt"],
        ["c.txt"],
        ["d.txt", "e.txt", "f.txt"],
    ]
    assert [(unit.name, unit.stored_bytes) for unit in gathered] == [
        ("a.txt", 7),
        ("c.txt", 20),
        ("d.txt", 2),
    ]
    assert text_files.units({}, 7) == []
    assert pickle.loads(pickle.dumps(gathered)) == gathered


def write_rows(path: Path, rows: list[str], end: str) -> dict[str, str]:
    """Write JSON lines; returns the texts by the key that says their byte."""
    content, keys = b"", {}
    for row in rows:
        if row != "skipped":
            keys[f"{path.name}@{len(content)}"] = row
        line = json.dumps({"text": row}, ensure_ascii=False) if row != "skipped" else "  "
        content += line.encode() + b"\n"
    path.write_bytes(content if end else content[:-1])
    return keys


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize(
    "rows", [["a", "é" * 9, "skipped", "", "世界\u2028"] * 5, ["x" * 500, "y"], ["x", "y" * 500]]
)
def test_every_row_of_a_long_file_is_in_one_range(tmp_path: Path, rows: list[str], end: str) -> None:
    path = tmp_path / "b.jsonl"
    wanted = write_rows(path, rows, end)
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.txt").write_text("last")
    size = path.stat().st_size
    for unit_bytes in range(6, size):
        first, *ranges, last = text_files.units(find(str(tmp_path)), unit_bytes)
        assert (keys_of(first), keys_of(last)) == (["a.txt"], ["c.txt"])
        assert [unit.stored_bytes for unit in ranges[:-1]] == [unit_bytes] * (len(ranges) - 1)
        assert sum(unit.stored_bytes for unit in ranges) == size
        found = [(d.key, "".join(map(str, d.pieces))) for unit in ranges for d in unit.documents()]
        assert found == list(wanted.items())
        for unit in ranges:  # each row where it begins
            start = int(unit.name.split("@")[1])
            assert all(start <= int(key.split("@")[1]) < start + unit_bytes for key in keys_of(unit))
        assert len({unit.name for unit in ranges}) == len(ranges)
    assert [type(unit) for unit in text_files.units({"b.jsonl": path}, size)] == [text_files.Files]


def test_packed_rows_are_not_cut(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", ["some text"] * 50, "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))
    [unit] = text_files.units(find("b.jsonl.gz"), 10)
    assert keys_of(unit) == [f"b.jsonl.gz:{line}" for line in range(1, 51)]


@pytest.mark.parametrize("bad", [b"{", b"3", b'{"body": "x"}', b"\xff"])
def test_bad_rows_of_long_files_are_named_with_their_byte(tmp_path: Path, bad: bytes) -> None:
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 3 + bad + b"\n" + good)
    ranges = text_files.units(find("a.jsonl"), 20)
    assert len(ranges) > 2
    with pytest.raises(DataError, match=r"a.jsonl: the row at byte 51 is not a JSON object with a string"):
        [keys_of(unit) for unit in ranges]
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(MissingInputError, match=r"a.jsonl cannot be read \(No such file"):
        keys_of(ranges[0])


def test_a_long_row_comes_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sophia_train.data.pieces.CHUNK_CHARACTERS", 100)
    text = "".join(random.Random(0).choices("ab\n é", k=5000))
    write_rows(tmp_path / "a.jsonl", [text], "\n")
    [(_, pieces, _)] = documents(find("a.jsonl"))
    found = list(map(str, pieces))
    assert "".join(found) == text
    assert len(found) > 20 and max(map(len, found)) < 300


def test_text_of_any_names_and_sizes_is_the_same_for_any_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 200)
    texts = tmp_path / "t"
    texts.mkdir()
    write_rows(texts / "long.jsonl", [f"row {i}" for i in range(60)], "\n")
    for name in ("with space.txt", "ü\n.txt", "%s{}.md", "-.py", os.fsdecode(b"not-utf8-\xff.txt")):
        (texts / name).write_text(f"text of {name!r}")
    (texts / "link.txt").symlink_to(texts / "-.py")
    prepared = []
    for workers in (1, 2):
        data = Text(path=str(texts), folder=f"p{workers}", validation_fraction=0.3)
        assert len(data.units()) > 6
        data.prepare(workers=workers)
        prepared.append({path.name: path.read_bytes() for path in Path(f"p{workers}").iterdir()})
    assert prepared[0] == prepared[1]
    tokens = [data.open(split) for split in SPLITS]
    found = b"".join(data.load_tokenizer().decode_bytes(t.read(0, len(t)).tolist()) for t in tokens)
    assert found.count(b"<|endoftext|>") == 66
    assert all(f"row {i}<|endoftext|>".encode() in found + b"<|endoftext|>" for i in range(60))


def test_a_share_prepares_no_folder(tmp_path: Path) -> None:
    data = small_text(tmp_path)
    data.prepare(share=(0, 2))
    assert not data.is_prepared and not data.prepared_folder.exists()
    data.prepare()
    assert data.is_prepared
    assert [path.name for path in data.prepared_folder.parent.iterdir()] == [data.prepared_folder.name]


def test_leftovers_go_when_the_folder_is_used_again(tmp_path: Path) -> None:
    data = small_text(tmp_path, folder="p/q")
    data.prepare()
    (tmp_path / "p" / ".q.parts").mkdir()
    (tmp_path / "p" / ".q.parts" / "plan.json").touch()
    (tmp_path / "p" / ".q.lock").touch()
    data.prepare()
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["q"]


def test_parquet_files_are_text_too(tmp_path: Path) -> None:
    texts = [f"row {i}\n" * (i % 3) for i in range(50)]
    write_table(table({"id": list(range(50)), "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "b.txt").write_text("plain")
    assert contents(tmp_path) == {f"a.parquet:{i}": text for i, text in enumerate(texts)} | {"b.txt": "plain"}
    data = Text(path=str(tmp_path / "*.parquet"), folder="p", validation_fraction=0.3)
    data.prepare()
    total = sum(1 + len(text) for text in texts)
    assert len(data.open("train")) + len(data.open("validation")) == total
    write_table(table({"body": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(MissingInputError, match="c.parquet.*text"):
        contents(tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="d.parquet"):
        contents(tmp_path / "d.parquet")
