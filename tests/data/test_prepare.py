"""Preparation: exact, the same bytes whoever does it and however often it is killed, and one clear error."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_prepare import (
    INTERRUPTED,
    TOKENIZER,
    Killed,
    Listed,
    Stuck,
    Watchful,
    apart,
    corpus,
    cut,
    in_order,
    killed_at,
    random_documents,
    run,
    slow_corpus,
)

from sophia_train import durable
from sophia_train.data import parts, prepare, text_files
from sophia_train.data import workers as workers_module
from sophia_train.data.base import SPLITS
from sophia_train.data.manifest import Manifest
from sophia_train.data.parts import PartsFolder
from sophia_train.data.prepare import remove_leftovers
from sophia_train.data.token_files import open_prepared
from sophia_train.data.tokenizers import Bytes
from sophia_train.data.units import ByKey, Document
from sophia_train.errors import (
    ConfigError,
    DataError,
    Interrupted,
    MissingInputError,
    OutputError,
    RunError,
    StorageError,
)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "worker_prepare"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave fsync out: it is for crashes of the machine; its place is tested with the parts."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def split_of(key: str, fraction: float = 0.3) -> str:
    return ByKey(fraction).split_of(Document(key, []))


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


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed preparation of `corpus`."""
    folder = tmp_path_factory.mktemp("undisturbed") / "p"
    run(folder, units=corpus())
    assert names_in(folder.parent) == {"p"}
    return content_of(folder)


# What is prepared


@pytest.mark.parametrize("buffer_tokens", [1, 100, 1 << 20])
@pytest.mark.parametrize("units", [1, 5, 30])
def test_decoding_gives_back_every_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_tokens: int, units: int
) -> None:
    monkeypatch.setattr(parts, "BUFFER_TOKENS", buffer_tokens)
    monkeypatch.setattr(prepare, "COPY_TOKENS", buffer_tokens)
    documents = random_documents(20)
    folder = tmp_path / "deep" / "prepared"
    run(folder, units=cut(documents, units), validation_shard_tokens=64)
    record = Manifest.read(folder)
    assert record.split_rule == "documents"
    assert record.text_bytes == sum(len(piece) for document in documents for piece in document.pieces)
    assert all(shard.tokens == 64 for shard in record.shards["validation"][:-1])
    for split in SPLITS:
        wanted = [b"".join(d.pieces) for d in documents if split_of(d.key) == split]  # type: ignore[arg-type]
        assert len(wanted) > 1
        assert texts_of(folder, split) == wanted
        assert record.documents[split] == len(wanted)
    assert names_in(folder.parent) == {"prepared"}


def arbitrary_texts(count: int) -> list[str]:
    generator = random.Random(1)
    special = [
        "<|endoftext|>",
        "<|pad|>",
        "\0",
        "\ud800",
        "\udfff",
        "\udcff",
        "\r\n",
        "\u2028",
        "\U0010ffff",
        "é",
    ]

    def character() -> str:
        return chr(generator.choice([generator.randrange(128), generator.randrange(0x110000)]))

    texts = ["", "x" * (1 << 20), "世" * 350_000]
    while len(texts) < count:
        length = generator.choice([0, 1, 3, 40])
        texts.append(
            "".join(generator.choice([character(), generator.choice(special)]) for _ in range(length))
        )
    return texts


def mended(text: str) -> bytes:
    """What must come back: surrogate escapes as their bytes; where there are other surrogates, U+FFFD."""
    with contextlib.suppress(UnicodeEncodeError):
        return text.encode("utf-8", "surrogateescape")
    pairs = text.encode("utf-16-le", "surrogatepass")
    return pairs.decode("utf-16-le", "replace").encode()


def test_two_thousand_arbitrary_texts_come_back(tmp_path: Path) -> None:
    texts = arbitrary_texts(2000)
    generator = random.Random(2)
    documents = []
    for number, text in enumerate(texts):
        at = generator.randrange(len(text) + 1)
        if "\ud800" <= text[at - 1 : at] <= "\udfff" or "\ud800" <= text[at : at + 1] <= "\udfff":
            at = 0  # a piece does not end between surrogates
        documents.append(Document(str(number), [text[:at], text[at:]]))
    run(tmp_path / "p", units=cut(documents, 7), validation_shard_tokens=100_000)
    for split in SPLITS:
        wanted = [text for number, text in enumerate(texts) if split_of(str(number)) == split]
        found = texts_of(tmp_path / "p", split)
        assert len(found) == len(wanted) > 500
        pieces = [d for d in documents if split_of(d.key) == split]
        assert found == [b"".join(mended(str(piece)) for piece in d.pieces) for d in pieces]
        clean = [i for i, text in enumerate(wanted) if not any("\ud800" <= c <= "\udfff" for c in text)]
        assert len(clean) > 200
        assert [found[i].decode() for i in clean] == [wanted[i] for i in clean]


class Large(Bytes):
    vocab_size = 65537
    end_of_text = 65536


@pytest.mark.parametrize(
    ("tokenizer", "dtype", "name"), [(Bytes(), "<u2", "uint16"), (Large(), "<u4", "uint32")]
)
def test_files_are_little_endian_and_small_as_the_vocabulary_allows(
    tmp_path: Path, tokenizer: Bytes, dtype: str, name: str
) -> None:
    documents = [Document("a", [b"xyz"]), Document("b", [b"12"])]
    for fraction in (0.01, 0.5):  # the tail, and by key
        folder = tmp_path / str(fraction)
        run(folder, documents, tokenizer=tokenizer, fraction=fraction)
        assert Manifest.read(folder).dtype == name
        files = [np.fromfile(folder / f"{split}_00000.bin", dtype) for split in SPLITS]
        end = tokenizer.end_of_text
        assert np.concatenate(files).tolist() == [end, *b"xyz", end, *b"12"]


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.6, 0.999, 0.9999])
@pytest.mark.parametrize("key", ["only", "3"])  # one that would be held out by itself, and one that would not
def test_an_empty_split_gets_the_tail(tmp_path: Path, fraction: float, key: str) -> None:
    content = random.Random(5).randbytes(998)
    pieces = [content[start : start + 250] for start in range(0, 998, 250)]
    units = [Listed(str(i), [Document(key, [piece])]) for i, piece in enumerate(pieces)]
    units.insert(2, Listed("none", []))
    run(tmp_path / "p", units=units, fraction=fraction, validation_shard_tokens=64)
    train, validation = ids_of(tmp_path / "p", "train"), ids_of(tmp_path / "p", "validation")
    assert train + validation == [i for piece in pieces for i in (TOKENIZER.end_of_text, *piece)]
    assert len(validation) == min(1001, max(1, round(1002 * fraction)))
    record = Manifest.read(tmp_path / "p")
    assert record.split_rule == "tail"
    assert record.documents == {
        "train": train.count(TOKENIZER.end_of_text),
        "validation": validation.count(TOKENIZER.end_of_text),
    }
    files = {shard.file for split in SPLITS for shard in record.shards[split]}
    assert names_in(tmp_path / "p") == {"manifest.json", *files}


def test_without_hard_links_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    run(tmp_path / "p", units=corpus())
    assert content_of(tmp_path / "p") == expected


@pytest.mark.parametrize("units", [[], [Listed("a", [])], [Listed("a", []), Listed("b", [])]])
def test_no_documents_are_an_error_that_leaves_nothing(tmp_path: Path, units: list[Listed]) -> None:
    with pytest.raises(DataError, match="test has no documents"):
        run(tmp_path / "p", units=units)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_ends_at_the_totals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(workers_module, "REPORT_SECONDS", 0)
    calls: list[tuple[int, int, int]] = []
    documents = [Document("a", [b"12", "ü"]), Document("b", [b"3456"])]
    units = cut(documents, 2)
    run(tmp_path / "p", units=units, share=(1, 2), progress=lambda *counts: calls.append(counts))
    assert calls[-1] == (1, 5, 4)
    calls.clear()
    run(tmp_path / "p", units=units, workers=workers, progress=lambda *counts: calls.append(counts))
    assert calls[-1] == (2, 10, 8)
    assert calls[0] >= (1, 5, 4) and calls == sorted(calls)


def test_the_manifest_says_everything(tmp_path: Path) -> None:
    run(tmp_path / "p", random_documents(8))
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
    assert all(set(shard) == {"file", "tokens", "sha256"} for shard in content["shards"]["train"])


# Who prepares it, and in how many goes


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_makes_the_same_bytes(
    tmp_path: Path, expected: dict[str, bytes], workers: int
) -> None:
    run(tmp_path / "p", units=corpus(), workers=workers)
    assert content_of(tmp_path / "p") == expected
    assert names_in(tmp_path) == {"p"}


def test_shares_in_any_order_make_the_same_bytes(tmp_path: Path, expected: dict[str, bytes]) -> None:
    for order in permutations(range(3)):
        log = tmp_path / "".join(map(str, order))
        folder = log.with_suffix(".d") / "p"
        for done, share in enumerate(order, start=1):
            run(folder, units=corpus(log), share=(share, 3))
            assert names_in(folder.parent) == {".p.parts"}
            read = log.read_text().split()
            assert len(read) == sum(len(range(i, 5, 3)) for i in order[:done])
        run(folder, units=corpus(log))
        assert content_of(folder) == expected
        assert sorted(log.read_text().split()) == ["0", "1", "2", "few", "none"]  # each once
        assert names_in(folder.parent) == {"p"}


def test_what_shares_have_left_out_is_done_by_the_last_call(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    log = tmp_path / "log"
    run(tmp_path / "p", units=corpus(log), share=(2, 4), workers=2)
    run(tmp_path / "p", units=corpus(log), share=(2, 4))
    assert log.read_text().split() == ["2"]
    run(tmp_path / "p", units=corpus(log), workers=2)
    assert sorted(log.read_text().split()) == ["0", "1", "2", "few", "none"]
    assert content_of(tmp_path / "p") == expected


def test_more_shares_than_units(tmp_path: Path, expected: dict[str, bytes]) -> None:
    run(tmp_path / "p", units=corpus(), share=(8, 9))
    assert names_in(tmp_path) == set()
    for share in range(9):
        run(tmp_path / "p", units=corpus(), share=(share, 9))
    run(tmp_path / "p", units=corpus())
    assert content_of(tmp_path / "p") == expected


@pytest.mark.parametrize(
    "options", [{"share": (3, 3)}, {"share": (-1, 3)}, {"share": (0, 0)}, {"workers": 0}, {"workers": -2}]
)
def test_shares_and_workers_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"shard=|workers="):
        run(tmp_path / "p", units=corpus(), **options)
    assert names_in(tmp_path) == set()


def test_a_prepared_folder_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run(tmp_path / "p", units=corpus(log))
    before = content_of(tmp_path / "p")
    log.unlink()
    for share in ((0, 1), (1, 3)):
        run(tmp_path / "p", units=corpus(log), share=share)
        assert not log.exists() and content_of(tmp_path / "p") == before
        assert names_in(tmp_path) == {"p"}


def test_another_plan_is_refused_with_both_values(tmp_path: Path, expected: dict[str, bytes]) -> None:
    folder = tmp_path / "p"
    run(folder, units=corpus(), share=(1, 2))
    before = content_of(tmp_path / ".p.parts")
    others: list[tuple[dict[str, Any], str]] = [
        ({"source": "other"}, "source=test, not other"),
        ({"revision": "2"}, "revision=1, not 2"),
        ({"fraction": 0.4}, "validation_fraction=0.3, not 0.4"),
        ({"units": corpus()[:-1]}, "units=5, not 4"),
        ({"units": [*corpus()[1:], corpus()[0]]}, "unit_names=[0-9a-f]{64}, not [0-9a-f]{64}"),
    ]
    for options, says in others:
        for share in ((0, 1), (0, 2)):
            with pytest.raises(DataError, match=rf"\.p\.parts was begun with {says}; remove it, or choose"):
                run(folder, **({"units": corpus()} | options), share=share)
    assert content_of(tmp_path / ".p.parts") == before
    run(folder, units=corpus())
    assert content_of(folder) == expected


def test_another_plan_is_taken_when_nothing_was_done(tmp_path: Path, expected: dict[str, bytes]) -> None:
    begun = PartsFolder(tmp_path / "p", corpus(), {"source": "other"})
    begun.begin(alone=True)
    run(tmp_path / "p", units=corpus())
    assert content_of(tmp_path / "p") == expected


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for share in ((0, 1), (0, 2)):
        with pytest.raises(OutputError, match=r"data.folder=.*p is there but not prepared data"):
            run(folder, random_documents(8), share=share)
    assert content_of(folder) == {"notes.txt": b"mine"}
    assert names_in(tmp_path) == {"p"}
    (folder / "notes.txt").unlink()
    run(folder, random_documents(8))  # an empty folder may be filled
    assert ids_of(folder, "train")


def test_an_error_in_a_unit_keeps_what_is_done(tmp_path: Path, expected: dict[str, bytes]) -> None:
    def broken(message: str) -> Iterator[Document]:
        yield Document("a", [b"abc"])
        raise DataError(message)

    for victim in range(5):
        log = tmp_path / str(victim)
        folder = log.with_suffix(".d") / "p"
        units = corpus(log)
        units[victim] = Listed(units[victim].name, broken("row 3"))
        with pytest.raises(DataError, match="row 3"):
            run(folder, units=units)
        assert names_in(folder.parent) == ({".p.parts"} if victim else set())
        assert not list(folder.parent.rglob("*.tmp"))
        run(folder, units=corpus(log))
        assert sorted(log.read_text().split()) == [
            "0",
            "1",
            "2",
            "few",
            "none",
        ]  # the broken one wrote no name
        assert content_of(folder) == expected
        assert names_in(folder.parent) == {"p"}


def test_a_share_that_fails_leaves_another_at_work_alone(tmp_path: Path, expected: dict[str, bytes]) -> None:
    """The first share fails before any unit is done, while the second is within its first unit."""
    folder = tmp_path / "p"

    def meanwhile(documents: Iterable[Document]) -> Iterator[Document]:
        for number, document in enumerate(documents):
            if number == 1:
                with pytest.raises(DataError, match="broken"):
                    run(folder, units=[Listed("0", failing()), *corpus()[1:]], share=(0, 2))
            yield document

    def failing() -> Iterator[Document]:
        yield Document("a", [b"abc"])
        raise DataError("broken")

    units = corpus()
    units[1] = Listed("1", meanwhile(units[1].documents()))
    run(folder, units=units, share=(1, 2))
    run(folder, units=corpus())
    assert content_of(folder) == expected


# Failing and killed


def operations(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """List the durable operations of a preparation of `corpus`."""
    names: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(durable, "before", lambda operation, path: names.append(operation))
        run(folder, units=corpus(), **options)
    return names


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("failure", [Ended, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_failing_at_any_operation_keeps_what_is_done(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, bytes],
    failure: BaseException | type[BaseException],
) -> None:
    names = operations(tmp_path / "reference", monkeypatch)
    assert {"mkdir", "open", "reserve", "write", "fsync", "rename", "link", "fsync_folder", "rmtree"} <= set(
        names
    )
    log = tmp_path / "log"
    rereads = 0
    for index in range(len(names)):
        folder = tmp_path / f"at_{index}" / "p"
        countdown = iter(range(10_000))

        def fail(operation: str, path: Path, index: int = index, count: Iterator[int] = countdown) -> None:
            if next(count) == index:
                raise failure

        log.write_text("")
        with monkeypatch.context() as patch:
            patch.setattr(durable, "before", fail)
            with pytest.raises(Ended if failure is Ended else StorageError) as error:
                run(folder, units=corpus(log))
        if failure is not Ended:
            assert "data.folder=" in str(error.value) and "bytes free" in str(error.value)
        left = names_in(folder.parent)
        done = len(list(folder.parent.glob(".p.parts/part_*.json")))
        assert left <= {"p", ".p.parts"} and ((".p.parts" in left) == (done > 0))
        assert not list(folder.parent.rglob("*.tmp"))
        if "p" in left:
            assert content_of(folder) == expected
        read_before = len(log.read_text().split())
        run(folder, units=corpus(log))
        rereads += len(log.read_text().split()) - 5
        assert len(log.read_text().split()) - read_before == (0 if "p" in left else 5 - done)
        assert content_of(folder) == expected
        assert names_in(folder.parent) == {"p"}
    assert 0 < rereads < len(names)


def start(target: Callable[..., None], *arguments: Any) -> Any:
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    return process


def end_of(process: Any) -> int:
    process.join(60)
    assert process.exitcode is not None
    return int(process.exitcode)


def test_sigkill_at_thirty_operations_then_again_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    n = len(operations(tmp_path / "reference", monkeypatch))
    folder = tmp_path / "p"
    for index in random.Random(0).sample(range(n), 30):
        assert end_of(start(killed_at, folder, index, {})) == -signal.SIGKILL
        assert not folder.exists() or content_of(folder) == expected
        run(folder, units=corpus())
        assert content_of(folder) == expected
        assert names_in(tmp_path) == {"p", "reference"}
        shutil.rmtree(folder)


def test_sigkill_again_and_again_gets_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    """Every go ends a little later than the one before; shares are killed, too."""
    folder, generator = tmp_path / "p", random.Random(1)
    for go in range(100):
        options: dict[str, Any] = {"share": (go % 2, 2)} if go % 3 else {}
        if end_of(start(killed_at, folder, generator.randrange(10 + go), options)) == 0 and folder.exists():
            break
    else:
        pytest.fail("it never got there")
    assert go > 3
    assert content_of(folder) == expected
    run(folder, units=corpus())
    assert names_in(tmp_path) == {"p"}


@pytest.mark.parametrize("goes", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_sigkill_at_any_time_with_two_workers(tmp_path: Path, goes: int) -> None:
    pids = tmp_path / "pids"
    run(tmp_path / "reference", units=slow_corpus(pids))
    expected, generator = content_of(tmp_path / "reference"), random.Random(3)
    pids.unlink()
    folder = tmp_path / "p"
    for _ in range(goes):
        process = start(in_order, folder, slow_corpus(pids), {"workers": 2}, os.getpid)
        wait_for(lambda: pids.exists() and len(pids.read_text().split()) >= 1)
        time.sleep(generator.uniform(0, 0.25))
        process.kill()
        end_of(process)
        assert not folder.exists() or content_of(folder) == expected
        wait_for(lambda: not any(alive(int(pid)) for pid in set(pids.read_text().split())), seconds=2)
        run(folder, units=slow_corpus(tmp_path / "ours"), workers=1)
        assert content_of(folder) == expected
        assert not names_in(tmp_path) & {".p.parts", ".p.lock", ".p.tmp"}
        shutil.rmtree(folder)
        pids.unlink()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process runs: one that waits to be reaped, by whoever has taken it over, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # which reading gives when it ends meanwhile
        return False


@pytest.mark.parametrize("kill", [os.kill, os.killpg])  # Ctrl-C sends it to workers, too
def test_an_interrupt_ends_workers_within_their_units(
    tmp_path: Path, kill: Callable[[int, int], None]
) -> None:
    folder, pids, flag = tmp_path / "p", tmp_path / "pids", tmp_path / "flag"
    flag.touch()
    units = cut(random_documents(40), 5)
    run(tmp_path / "reference", units=units)
    for unit in units[3:]:
        unit.__class__, unit.pids, unit.flag = Stuck, pids, flag
    process = start(in_order, folder, units, {"workers": 2}, apart)
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    kill(process.pid, signal.SIGINT)
    assert end_of(process) == INTERRUPTED
    assert not any(alive(int(pid)) for pid in pids.read_text().split())
    assert {path.name for path in tmp_path.glob(".p.parts/part_*")} == {
        f"part_0000{index}.json" for index in range(3)
    }
    flag.unlink()
    run(folder, units=units)
    assert content_of(folder) == content_of(tmp_path / "reference")
    assert names_in(tmp_path) == {"p", "pids", "reference"}


def test_workers_are_light_and_leave_interrupts_to_who_has_started_them(tmp_path: Path) -> None:
    before, log = signal.pthread_sigmask(signal.SIG_BLOCK, ()), tmp_path / "log"
    run(tmp_path / "p", units=cut(random_documents(20), 4, log, Watchful), workers=2)
    assert log.read_text().split() == ["False", "False"] * 4
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before and signal.SIGINT not in before


def test_workers_leave_the_program_that_starts_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, program = tmp_path / "mark", tmp_path / "program.py"
    program.write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(program), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    run(tmp_path / "p", units=cut(random_documents(20), 4), workers=2)
    assert not mark.exists()
    assert sys.modules["__main__"].__file__ == str(program)


def test_a_killed_worker_is_one_clear_error(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    documents = random_documents(40)
    run(tmp_path / "reference", units=cut(documents, 5))
    units = cut(documents, 5, kind=Killed)
    for unit in units[:4]:
        unit.__class__ = Listed
    units[4].flag = flag
    with pytest.raises(
        Interrupted, match=r"a worker was killed.*\.p\.parts keeps.*fewer than workers=2"
    ) as error:
        run(tmp_path / "p", units=units, workers=2)
    assert error.value.code == INTERRUPTED
    assert names_in(tmp_path) <= {"flag", "reference", ".p.parts"}
    flag.unlink()
    run(tmp_path / "p", units=units, workers=2)
    assert content_of(tmp_path / "p") == content_of(tmp_path / "reference")
    assert names_in(tmp_path) == {"p", "reference"}


def test_an_error_in_a_worker_comes_through(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    units = [*corpus()[:2], *text_files.units({"bad.txt": tmp_path / "bad.txt"}, 1)]
    with pytest.raises(DataError, match=r"bad.txt: byte 0 is not UTF-8"):
        run(tmp_path / "p", units=units, workers=2)
    assert not (tmp_path / "p").exists() and not list(tmp_path.rglob("*.tmp"))


# Several at once


def test_two_processes_prepare_it_once(tmp_path: Path) -> None:
    """The second waits for the first, finds its work, and does not read a document."""
    folder, pids, log = tmp_path / "p", tmp_path / "pids", tmp_path / "log"
    first = start(in_order, folder, slow_corpus(pids), {}, os.getpid)
    wait_for(pids.exists)
    run(folder, units=corpus(log))
    assert end_of(first) == 0
    assert not log.exists()
    assert len(pids.read_text().split()) == 6
    assert sum(Manifest.read(folder).documents.values()) == 30
    assert not names_in(tmp_path) & {".p.parts", ".p.lock"}


@pytest.mark.parametrize("share", [(0, 2), (0, 1)])
def test_the_same_share_at_once_is_harmless(tmp_path: Path, share: tuple[int, int]) -> None:
    run(tmp_path / "reference", units=slow_corpus(tmp_path / "ours"))
    barrier = FORKS.Barrier(3)
    folder = tmp_path / "p"
    units = slow_corpus(tmp_path / "pids")
    processes = [start(in_order, folder, units, {"share": share}, barrier.wait) for _ in range(3)]
    assert [end_of(process) for process in processes] == [0, 0, 0]
    run(folder, units=units)
    assert content_of(folder) == content_of(tmp_path / "reference")
    assert not names_in(tmp_path) & {".p.parts", ".p.lock"}


def test_parts_are_whole_whenever_they_are_visible(tmp_path: Path) -> None:
    folder, pids = tmp_path / "p", tmp_path / "pids"
    units = slow_corpus(pids)
    process = start(in_order, folder, units, {"share": (0, 1)}, os.getpid)
    seen: dict[str, bytes] = {}
    looks = 0
    path = tmp_path / ".p.parts"
    while process.is_alive():
        with contextlib.suppress(FileNotFoundError):  # when all is done, the folder goes, too
            for file in path.glob("[!.]*"):
                assert seen.setdefault(file.name, content := file.read_bytes()) == content
                looks += 1
    assert end_of(process) == 0
    assert looks > len(seen) > 12
    for name in [name for name in seen if name.startswith("part_")]:
        shards = json.loads(seen[name])["shards"]
        for shard in filter(None, shards.values()):
            assert len(seen.get(shard["file"], b"x" * 2 * shard["tokens"])) == 2 * shard["tokens"]


def test_leftovers_beside_a_prepared_folder_are_removed(tmp_path: Path) -> None:
    run(tmp_path / "p", units=corpus(), share=(1, 2))
    run(tmp_path / "q", units=corpus())
    (tmp_path / ".p.parts").rename(tmp_path / ".q.parts")
    (tmp_path / ".q.lock").touch()
    remove_leftovers(tmp_path / "q")
    assert names_in(tmp_path) == {"q"}


# Full disks, and places that cannot be written


def test_a_full_disk_is_named_before_a_shard_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(StorageError, match=r"data.folder=.*disk full.*bytes needed, 10 free"):
        run(tmp_path / "p", random_documents(8))
    assert names_in(tmp_path) == set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts file systems of some KiB, or skips."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        folder = tmp_path / f"disk_{kib}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"tmpfs cannot be mounted: {error}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kib", [8, 20, 40, 100, 160, 200, 240])
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_clear_error(
    tmp_path: Path, small_disk: Callable[[int], Path], kib: int, workers: int
) -> None:
    generator = random.Random(0)
    units = cut([Document(str(i), [generator.randbytes(4000)]) for i in range(24)], 4)
    run(tmp_path / "reference", units=units)
    disk = small_disk(kib)
    with pytest.raises(
        StorageError, match=r"data.folder=.*\(disk full.*bytes needed, [\d,]+ free\)|bytes free\)"
    ):
        run(disk / "p", units=units, workers=workers)
    done = list(disk.glob(".p.parts/part_*.json"))
    assert names_in(disk) == ({".p.parts"} if done else set())
    assert not list(disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
    read = tmp_path / "read"
    for unit in units:
        unit.log = read
    run(disk / "p", units=units, workers=workers)
    assert len(read.read_text().split()) == 4 - len(done) if len(done) < 4 else not read.exists()
    assert content_of(disk / "p") == content_of(tmp_path / "reference")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=r"data.folder=.*cannot be written"):
        run(tmp_path / "p", random_documents(8))


def test_a_place_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"data.folder=.*; choose another"):
        run(tmp_path / "file" / "p", random_documents(8))


# Damage


def mutations(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Change a few bits, drop, repeat, insert or swap bytes, or cut the end off."""
    generator = random.Random(seed)
    while count:
        changed = bytearray(content)
        at = generator.randrange(len(content))
        length = generator.choice([1, 1, 2, 8, 50])
        kind = generator.randrange(7)
        if kind == 0:
            changed[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            changed[at : at + length] = generator.randbytes(length)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            changed = changed[:at]
        elif kind == 5:
            changed[at] = generator.choice(b'0123456789abcdef"{}[]:,-.e \\u')
        else:
            other = generator.randrange(len(content))
            changed[at : at + 4], changed[other : other + 4] = (
                content[other : other + 4],
                content[at : at + 4],
            )
        if bytes(changed) != content:
            yield bytes(changed)
            count -= 1


def tokens_in(folder: Path) -> list[list[int]]:
    return [ids_of(folder, split) for split in SPLITS]


@pytest.mark.parametrize("name", ["train_00001.bin", "validation_00000.bin", "manifest.json"])
def test_damaged_prepared_files_are_named(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "p"
    run(folder, units=corpus(), validation_shard_tokens=500)
    wanted, record = tokens_in(folder), Manifest.read(folder)
    content = (folder / name).read_bytes()
    refused = 0
    for changed in mutations(content, 3400 if name == "manifest.json" else 1000, seed=len(name)):
        (folder / name).write_bytes(changed)
        try:
            assert tokens_in(folder) == wanted
            assert name == "manifest.json"
            assert Manifest.read(folder).shards == record.shards
        except RunError as error:
            assert str(folder) in str(error)
            refused += 1
    assert refused > (1000 if name == "manifest.json" else 999)


@pytest.mark.parametrize("name", ["plan.json", "part_00001.json", "part_00003.json"])
def test_damaged_records_of_a_preparation_in_progress_are_named(tmp_path: Path, name: str) -> None:
    run(tmp_path / "p", units=corpus(), share=(1, 2))
    plan = {"source": "test", "revision": "1", "tokenizer": "bytes", "split_rule": "documents"}
    begun = PartsFolder(tmp_path / "p", corpus(), {**plan, "validation_fraction": 0.3})
    begun.begin(alone=True)
    wanted = [begun.find(index) for index in range(5)]
    assert [part is not None for part in wanted] == [False, True, False, True, False]
    path = begun.path / name
    refused = 0
    for changed in mutations(path.read_bytes(), 1500, seed=len(name)):
        path.write_bytes(changed)
        try:
            begun.begin(alone=False)
            assert [begun.find(index) for index in range(5)] == wanted
        except DataError as error:
            assert str(begun.path) in str(error)
            refused += 1
    assert refused > 1000


def test_damage_is_found_before_the_folder_is_there(tmp_path: Path, expected: dict[str, bytes]) -> None:
    folder = tmp_path / "p"
    for share in range(2):
        run(folder, units=corpus(), share=(share, 2))
    before = content_of(tmp_path / ".p.parts")
    for name, content in before.items():
        for changed in (*mutations(content, 6, seed=3), None):
            path = tmp_path / ".p.parts" / name
            path.write_bytes(changed) if changed is not None else path.unlink()
            try:
                run(folder, units=corpus())
                assert content_of(folder) == expected
                shutil.rmtree(folder)
                (tmp_path / ".p.parts").mkdir()
            except (DataError, MissingInputError) as error:
                assert str(tmp_path / ".p.parts") in str(error)
                assert not folder.exists()
            for each, original in before.items():
                (tmp_path / ".p.parts" / each).write_bytes(original)
    run(folder, units=corpus())
    assert content_of(folder) == expected


def test_a_record_is_of_its_unit_and_its_plan(tmp_path: Path) -> None:
    for name, source in (("p", "test"), ("q", "other")):
        run(tmp_path / name, units=corpus(), share=(0, 2), source=source)
    p, q = tmp_path / ".p.parts", tmp_path / ".q.parts"
    shutil.copy(p / "part_00000.json", p / "part_00001.json")
    with pytest.raises(DataError, match=r"part_00001.json is damaged or of another preparation"):
        run(tmp_path / "p", units=corpus())
    shutil.copy(p / "part_00000.json", q / "part_00000.json")
    with pytest.raises(DataError, match=r"part_00000.json is damaged or of another preparation"):
        run(tmp_path / "q", units=corpus(), source="other")
