"""Preparation: exact, atomic under kills at every durable operation, and the same bytes every time."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from sophia_train import durable
from sophia_train.data import prepare as prepare_module
from sophia_train.data.base import SPLITS
from sophia_train.data.manifest import Manifest
from sophia_train.data.prepare import Document, prepare, split_of
from sophia_train.data.token_files import open_prepared
from sophia_train.data.tokenizers import Bytes
from sophia_train.errors import DataError, OutputError, StorageError

TOKENIZER = Bytes()
STABLE = ["49.txt", "54.txt", "63.txt", "67.txt", "85.txt"]


def random_documents(count: int, seed: int = 0) -> list[Document]:
    """Make documents of arbitrary bytes in one or more pieces, some of them empty."""
    generator = random.Random(seed)
    documents = []
    for i in range(count):
        pieces = [
            generator.randbytes(generator.choice([0, 1, 5, 300])) for _ in range(generator.randint(0, 3))
        ]
        documents.append(Document(f"folder/{i}.txt", pieces))
    return documents


def run(
    folder: Path,
    documents: Iterable[Document],
    *,
    validation_fraction: float = 0.3,
    shard_tokens: int = 1000,
    progress: Callable[[int, int, int], None] | None = None,
) -> None:
    prepare(
        folder,
        documents,
        TOKENIZER,
        source="test",
        revision="1",
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        progress=progress,
    )


def ids_of(folder: Path, split: str) -> list[int]:
    tokens = open_prepared(folder, split, "bytes", verify=True)  # type: ignore[arg-type]
    return tokens.read(0, len(tokens)).tolist()


def texts_of(folder: Path, split: str) -> list[bytes]:
    """Decode a split to its documents: what follows each end of text."""
    ids = ids_of(folder, split)
    assert ids[0] == TOKENIZER.end_of_text
    starts = [i for i, token in enumerate(ids) if token == TOKENIZER.end_of_text] + [len(ids)]
    return [TOKENIZER.decode_bytes(ids[a + 1 : b]) for a, b in zip(starts, starts[1:], strict=False)]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("buffer_tokens", [1, 100, 1 << 20])
@pytest.mark.parametrize("shard_tokens", [1, 256, 10**8])
def test_decoding_gives_back_every_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_tokens: int, shard_tokens: int
) -> None:
    monkeypatch.setattr(prepare_module, "BUFFER_TOKENS", buffer_tokens)
    documents = random_documents(12)
    folder = tmp_path / "deep" / "prepared"
    run(folder, documents, shard_tokens=shard_tokens)
    for split in SPLITS:
        expected = [b"".join(d.pieces) for d in documents if split_of(d.key, 0.3) == split]  # type: ignore[arg-type]
        assert len(expected) > 1
        assert texts_of(folder, split) == expected
        record = Manifest.read(folder)
        assert record.documents[split] == len(expected)
        assert all(shard.tokens == shard_tokens for shard in record.shards[split][:-1])


def test_text_of_any_characters_comes_back(tmp_path: Path) -> None:
    texts = ["", "a\r\nb\n\n", "\0\x7f", "Grüße, 世界 \U0001f600", "<|endoftext|>", "\udcff"]
    run(tmp_path / "p", [Document(f"{i}", [text]) for i, text in enumerate(texts)], validation_fraction=0.4)
    found = [text for split in SPLITS for text in texts_of(tmp_path / "p", split)]
    assert sorted(found) == sorted(text.encode("utf-8", errors="surrogateescape") for text in texts)


def test_files_are_little_endian_and_small_as_the_vocabulary_allows(tmp_path: Path) -> None:
    class Large(Bytes):
        vocab_size = 65537
        end_of_text = 65536

    for tokenizer, dtype, name in ((TOKENIZER, "<u2", "uint16"), (Large(), "<u4", "uint32")):
        folder = tmp_path / name
        documents = [Document("a", [b"xyz"]), Document("b", [b"12"])]
        prepare(
            folder, documents, tokenizer, source="", revision="", validation_fraction=0.1, shard_tokens=99
        )
        assert Manifest.read(folder).dtype == name
        files = [np.fromfile(folder / f"{split}_00000.bin", dtype) for split in SPLITS]
        end = tokenizer.end_of_text
        assert np.concatenate(files).tolist() == [end, *b"xyz", end, *b"12"]


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.999])
def test_a_single_document_gives_its_tail_to_validation(tmp_path: Path, fraction: float) -> None:
    content = random.Random(5).randbytes(998)
    run(tmp_path / "p", [Document("only", [content])], validation_fraction=fraction, shard_tokens=64)
    train, validation = ids_of(tmp_path / "p", "train"), ids_of(tmp_path / "p", "validation")
    assert train + validation == [TOKENIZER.end_of_text, *content]
    assert len(validation) == round(999 * fraction)
    record = Manifest.read(tmp_path / "p")
    assert record.split_rule == "tail"
    assert record.documents == {"train": 1, "validation": 0}
    assert sorted(content_of(tmp_path / "p")) == sorted(
        ["manifest.json", *(shard.file for split in SPLITS for shard in record.shards[split])]
    )


def test_the_split_depends_on_the_key_alone(tmp_path: Path) -> None:
    keys = [f"{i}.txt" for i in range(20_000)]
    held_out = {key for key in keys if split_of(key, 0.05) == "validation"}
    assert 0.045 < len(held_out) / len(keys) < 0.055
    assert held_out < {key for key in keys if split_of(key, 0.1) == "validation"}
    # written down, since it must stay the same for ever
    assert [key for key in keys[:100] if split_of(key, 0.05) == "validation"] == STABLE


def test_no_documents_are_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"):
        run(tmp_path / "p", [])
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_the_totals(tmp_path: Path) -> None:
    calls: list[tuple[int, int, int]] = []
    documents = [Document("a", [b"12", "ü"]), Document("b", [b"3456"])]
    run(tmp_path / "p", documents, progress=lambda *counts: calls.append(counts))
    assert calls == [(1, 3, 2), (1, 5, 4), (2, 10, 8)]


def test_a_prepared_folder_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path / "p", random_documents(8))
    before = content_of(tmp_path / "p")

    def unread() -> Iterable[Document]:
        raise AssertionError("documents were read again")
        yield

    run(tmp_path / "p", unread())
    assert content_of(tmp_path / "p") == before


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"data.folder=.*p is there but not prepared data"):
        run(folder, random_documents(8))
    assert content_of(folder) == {"notes.txt": b"mine"}
    assert list(tmp_path.iterdir()) == [folder]
    (folder / "notes.txt").unlink()
    run(folder, random_documents(8))  # an empty folder may be filled
    assert ids_of(folder, "train")


def operations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the durable operations of an undisturbed preparation."""
    names: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(durable, "before", lambda operation, path: names.append(operation))
        run(folder, random_documents(8))
    return names


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("failure", [Killed, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_failing_at_any_operation_leaves_nothing_or_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException | type[BaseException]
) -> None:
    names = operations(tmp_path / "reference", monkeypatch)
    assert {"mkdir", "reserve", "write", "fsync", "rename", "fsync_folder"} <= set(names)
    expected = content_of(tmp_path / "reference")
    for index in range(len(names)):
        folder = tmp_path / f"at_{index}" / "p"
        countdown = iter(range(len(names)))

        def fail(
            operation: str, path: Path, index: int = index, countdown: Iterable[int] = countdown
        ) -> None:
            if next(countdown) == index:  # type: ignore[call-overload]
                raise failure

        with monkeypatch.context() as patch:
            patch.setattr(durable, "before", fail)
            with pytest.raises(Killed if failure is Killed else StorageError):
                run(folder, random_documents(8))
        left = list(folder.parent.iterdir())
        assert left == [] or (left == [folder] and content_of(folder) == expected)
        run(folder, random_documents(8))
        assert content_of(folder) == expected


def test_sigkill_at_any_operation_then_again_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = operations(tmp_path / "reference", monkeypatch)
    expected = content_of(tmp_path / "reference")
    folder = tmp_path / "p"
    for index in range(len(names)):
        child = multiprocessing.get_context("spawn").Process(target=_killed_at, args=(folder, index))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not folder.exists() or content_of(folder) == expected
        run(folder, random_documents(8))
        assert content_of(folder) == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "reference"]
        shutil.rmtree(folder)


def _killed_at(folder: Path, index: int) -> None:
    countdown = iter(range(index + 1))

    def kill(operation: str, path: Path) -> None:
        if next(countdown) == index:
            os.kill(os.getpid(), signal.SIGKILL)

    durable.before = kill
    run(folder, random_documents(8))


def test_two_processes_prepare_it_once(tmp_path: Path) -> None:
    """The second waits for the first, finds its work, and does not read a document."""
    folder = tmp_path / "p"
    context = multiprocessing.get_context("spawn")
    started, done = context.Event(), context.Event()
    first = context.Process(target=_slow_first, args=(folder, started, done))
    second = context.Process(target=_second, args=(folder, done))
    first.start()
    assert started.wait(60)
    second.start()
    second.join()
    first.join()
    assert first.exitcode == second.exitcode == 0
    assert texts_of(folder, "train")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


def _slow_first(folder: Path, started: object, done: object) -> None:
    def documents() -> Iterable[Document]:
        started.set()  # type: ignore[attr-defined]
        yield from random_documents(8)
        assert not done.wait(0.5)  # type: ignore[attr-defined]  # nobody else gets through meanwhile

    run(folder, documents())


def _second(folder: Path, done: object) -> None:
    run(folder, random_documents(9, seed=9))
    done.set()  # type: ignore[attr-defined]
    assert len(ids_of(folder, "train")) + len(ids_of(folder, "validation")) == sum(
        1 + sum(map(len, document.pieces))  # type: ignore[arg-type]
        for document in random_documents(8)
    )


def test_a_full_disk_is_named_before_a_shard_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(StorageError, match=r"data.folder=.*disk full.*bytes needed, 10 free"):
        run(tmp_path / "p", random_documents(8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=r"data.folder=.*cannot be written"):
        run(tmp_path / "p", random_documents(8))


def test_a_place_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"data.folder=.*; choose another"):
        run(tmp_path / "file" / "p", random_documents(8))


def test_the_manifest_says_everything(tmp_path: Path) -> None:
    run(tmp_path / "p", random_documents(8), shard_tokens=500)
    content = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert content["format_version"] == 1
    assert {key: content[key] for key in ("source", "revision", "tokenizer", "vocab_size", "dtype")} == {
        "source": "test",
        "revision": "1",
        "tokenizer": "bytes",
        "vocab_size": 257,
        "dtype": "uint16",
    }
    assert (content["split_rule"], content["validation_fraction"]) == ("documents", 0.3)
    assert [set(shard) for shard in content["shards"]["train"]] == [{"file", "tokens", "sha256"}] * len(
        content["shards"]["train"]
    )
