"""Parts: each is on the disk before its record, and nobody's temporary files are in anybody's way."""

import errno
import hashlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_prepare import TOKENIZER, Listed, measured, random_documents

from sophia_train import durable
from sophia_train.data import parts
from sophia_train.data.manifest import Shard
from sophia_train.data.parts import PartsFolder, ShardWriter, dtype_of, link, prepare_unit
from sophia_train.data.tokenizers import Bytes
from sophia_train.data.units import ByKey, Document
from sophia_train.errors import DataError

PLAN = {"source": "test", "fraction": 0.3}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def begun(tmp_path: Path, *units: Listed, plan: dict[str, Any] = PLAN, alone: bool = True) -> PartsFolder:
    folder = PartsFolder(tmp_path / "p", units, plan)
    folder.begin(alone)
    return folder


def ignore(*counts: int) -> None:
    pass


# Writing tokens


@pytest.mark.parametrize("buffer_tokens", [1, 5, 64])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_shard_is_what_was_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_tokens: int, dtype: str
) -> None:
    monkeypatch.setattr(parts, "BUFFER_TOKENS", buffer_tokens)
    generator = np.random.default_rng(0)
    pieces = [generator.integers(0, 60_000, size) for size in (0, 1, 5, 0, 64, 3, 200, 1, 1)]
    writer = ShardWriter(tmp_path / "a.bin", dtype)
    counts = [writer.append(piece if len(piece) % 2 else piece.tolist()) for piece in pieces]
    assert counts == [len(piece) for piece in pieces]
    content = np.concatenate(pieces).astype("<u2" if dtype == "uint16" else "<u4").tobytes()
    assert writer.close() == Shard("a.bin", sum(counts), hashlib.sha256(content).hexdigest())
    assert (tmp_path / "a.bin").read_bytes() == content
    assert names_in(tmp_path) == {"a.bin"}


def test_no_tokens_are_no_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.bin", "uint16")
    writer.append([])
    assert writer.close() is None
    writer.discard()
    assert names_in(tmp_path) == set()


def test_a_buffer_is_not_the_callers(tmp_path: Path) -> None:
    writer, ids = ShardWriter(tmp_path / "a.bin", "uint16"), np.arange(4, dtype="<u2")
    for _ in range(2):
        writer.append(ids)
        ids += 4
    writer.close()
    assert np.fromfile(tmp_path / "a.bin", "<u2").tolist() == list(range(8))


def test_two_writers_of_one_shard_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BUFFER_TOKENS", 2)
    writers = [ShardWriter(tmp_path / "a.bin", "uint16") for _ in range(3)]
    for start in range(0, 30, 3):
        for writer in writers:
            writer.append(range(start, start + 3))
    assert len(names_in(tmp_path)) == 3
    writers[2].discard()
    for writer in writers[:2]:
        writer.close()
        assert np.fromfile(tmp_path / "a.bin", "<u2").tolist() == list(range(30))
    writers[0].discard()  # too late to take it back
    assert names_in(tmp_path) == {"a.bin"}


def test_space_is_reserved_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BUFFER_TOKENS", 10)
    monkeypatch.setattr(parts, "RESERVE_TOKENS", 100)
    sizes: list[int] = []
    reserve = durable.reserve
    monkeypatch.setattr(durable, "reserve", lambda file, size: (sizes.append(size), reserve(file, size)))
    written: list[tuple[int, int]] = []

    def look(operation: str, path: Path) -> None:
        if operation == "write":
            written.append((path.stat().st_size, path.stat().st_blocks * 512))

    monkeypatch.setattr(durable, "before", look)
    writer = ShardWriter(tmp_path / "a.bin", "uint32")
    for _ in range(100):
        writer.append(range(10))
    writer.close()
    assert len(sizes) < 20 and sizes == sorted(sizes)
    assert [size >= 40 * n and blocks >= 40 * n for n, (size, blocks) in enumerate(written, start=1)] == [
        True
    ] * 100
    assert (tmp_path / "a.bin").stat().st_size == 4000


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "uint16"), (1 << 16, "uint16"), (65537, "uint32")])
def test_ids_are_stored_in_the_smallest_type(vocab_size: int, dtype: str) -> None:
    tokenizer = Bytes()
    tokenizer.vocab_size = vocab_size
    assert dtype_of(tokenizer) == dtype


@pytest.mark.parametrize("links", [True, False])
def test_a_link_or_else_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "another device")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    content = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(content)
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content
    assert (tmp_path / "a").samefile(tmp_path / "b") == links


# One unit


def test_the_record_comes_after_what_it_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path, Listed("one", random_documents(20)))
    calls: list[tuple[str, str]] = []

    def note(operation: str, path: Path) -> None:
        name = path.name.split(".bin")[0].split(".json")[0].lstrip(".")
        calls.append((operation, "folder" if path == folder.path else name))

    monkeypatch.setattr(durable, "before", note)
    part = prepare_unit(folder, 0, TOKENIZER, ByKey(0.3), ignore)
    record = calls.index(("open", "part_00000"))
    for split in ("train_00000", "validation_00000"):
        steps = [call for call in calls if call[1] == split]
        assert [step for step, _ in steps] == ["open", "reserve", "write", "fsync", "rename"]
        rename = calls.index(("rename", split))
        assert calls[rename + 1] == ("fsync_folder", "folder") and rename + 1 < record
    assert [operation for operation, _ in calls[record:]] == [
        *("open", "reserve", "write", "fsync", "rename", "fsync_folder")
    ]
    assert folder.find(0) == part
    assert names_in(folder.path) == {
        "plan.json",
        "part_00000.json",
        "train_00000.bin",
        "validation_00000.bin",
    }


def test_a_unit_without_documents_is_done_without_files(tmp_path: Path) -> None:
    folder = begun(tmp_path, Listed("none", []))
    part = prepare_unit(folder, 0, TOKENIZER, ByKey(0.3), ignore)
    assert folder.find(0) == part
    assert (part.tokens, part.text_bytes, part.documents) == (0, 0, {"train": 0, "validation": 0})
    assert part.shards == {"train": None, "validation": None}
    assert names_in(folder.path) == {"plan.json", "part_00000.json"}


def test_a_unit_that_fails_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BUFFER_TOKENS", 2)

    def documents():
        yield from random_documents(9)
        assert len(names_in(folder.path)) == 3
        raise DataError("bad")

    folder = begun(tmp_path, Listed("bad", documents()))
    with pytest.raises(DataError, match="bad"):
        prepare_unit(folder, 0, TOKENIZER, ByKey(0.3), ignore)
    assert names_in(folder.path) == {"plan.json"}
    assert folder.find(0) is None and not folder.any_done()


def test_text_is_counted_in_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    folder = begun(
        tmp_path, Listed("one", [Document("a", ["é", b"12"]), Document("b", []), Document("c", ["x"])])
    )
    part = prepare_unit(folder, 0, TOKENIZER, ByKey(0.3), lambda *counts: seen.append(counts))
    assert seen == [(1, 3, 2), (1, 5, 4), (3, 8, 5)]
    assert (sum(part.documents.values()), part.tokens, part.text_bytes) == (3, 8, 5)


# The folder


def test_only_who_is_alone_removes_what_others_may_be_writing(tmp_path: Path) -> None:
    one = Listed("one", random_documents(3))
    folder = begun(tmp_path, one)
    prepare_unit(folder, 0, TOKENIZER, ByKey(0.3), ignore)
    (folder.path / ".train_00001.bin.0123.tmp").touch()
    before = names_in(folder.path)
    begun(tmp_path, one, alone=False)
    assert names_in(folder.path) == before
    begun(tmp_path, one, alone=True)
    assert names_in(folder.path) == before - {".train_00001.bin.0123.tmp"}


def test_names_of_any_characters(tmp_path: Path) -> None:
    names = ["with space", "new\nline", "é", "\udcff", 'quote"', "", "a" * 300]
    folder = begun(tmp_path, *[Listed(name, [Document(name, [b"x"])]) for name in names])
    for index, name in enumerate(names):
        assert prepare_unit(folder, index, TOKENIZER, ByKey(0.3), ignore) == folder.find(index)
        assert folder.find(index).unit == name
    begun(tmp_path, *folder.units)


def test_a_plan_that_was_lost_does_not_pass_on_its_parts(tmp_path: Path) -> None:
    one = Listed("one", random_documents(3))
    folder = begun(tmp_path, one)
    prepare_unit(folder, 0, TOKENIZER, ByKey(0.3), ignore)
    (folder.path / "plan.json").unlink()
    other = begun(tmp_path, one, plan={"source": "other"})
    with pytest.raises(DataError, match=r"part_00000.json is damaged or of another preparation; remove"):
        other.find(0)


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """100 MiB of one document are prepared, and cut to two splits, in little more than 1 MiB of them are."""
    peaks = []
    for mebibytes in (1, 100):
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        child = multiprocessing.get_context("spawn").Process(
            target=measured, args=(tmp_path / str(mebibytes), mebibytes, queue)
        )
        child.start()
        child.join(120)
        assert child.exitcode == 0
        peaks.append(queue.get())
    assert peaks[1] < peaks[0] + 40 and peaks[1] < 300, f"{peaks} MiB"
