"""Preparations that other processes do for the tests, and what they are made of: pickled, so in a module."""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sophia_train import durable
from sophia_train.data.prepare import prepare
from sophia_train.data.tokenizers import Bytes
from sophia_train.data.units import ByKey, Document, Unit

TOKENIZER = Bytes()
INTERRUPTED = 75


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


class Listed(Unit):
    """Documents that are at hand; appends its name to a log whenever they are read."""

    def __init__(self, name: str, documents: Iterable[Document], log: Path | None = None) -> None:
        self.name, self.stored_bytes = name, 1
        self.listed, self.log = documents, log

    def documents(self) -> Iterator[Document]:
        if self.log:
            with self.log.open("a") as file:
                file.write(self.name + "\n")
        yield from self.listed


class Killed(Listed):
    """Its process ends by SIGKILL half-way, as long as a file is there."""

    flag: Path

    def documents(self) -> Iterator[Document]:
        yield from list(self.listed)[:1]
        if self.flag.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        yield from list(self.listed)[1:]


class Slow(Listed):
    """Takes its time over each document, and tells who is at it."""

    pids: Path
    seconds = 0.01

    def documents(self) -> Iterator[Document]:
        with self.pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        for document in self.listed:
            time.sleep(self.seconds)
            yield document


class Stuck(Listed):
    """Tells who is at it, and never ends while a file is there."""

    pids: Path
    flag: Path

    def documents(self) -> Iterator[Document]:
        yield from list(self.listed)[:1]
        if self.flag.exists():
            with self.pids.open("a") as file:
                file.write(f"{os.getpid()}\n")
            threading.Event().wait()
        yield from list(self.listed)[1:]


class Watchful(Listed):
    """Notes whether its process would see a Ctrl-C, and whether it has imported torch."""

    def documents(self) -> Iterator[Document]:
        assert self.log
        with self.log.open("a") as file:
            file.write(f"{signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())}\n")
            file.write(f"{'torch' in sys.modules}\n")
        yield from self.listed


def cut(documents: Sequence[Document], count: int, log: Path | None = None, kind: Any = Listed) -> list[Any]:
    """Cut documents into units."""
    ends = [i * len(documents) // count for i in range(count + 1)]
    return [kind(str(i), documents[ends[i] : ends[i + 1]], log) for i in range(count)]


def run(
    folder: Path,
    documents: Iterable[Document] | None = None,
    *,
    units: Sequence[Unit] | None = None,
    fraction: float = 0.3,
    **options: Any,
) -> None:
    """Prepare units, or documents as one."""
    options = {"source": "test", "revision": "1", "rule": ByKey(fraction)} | options
    tokenizer = options.pop("tokenizer", TOKENIZER)
    prepare(folder, [Listed("0", documents or [])] if units is None else units, tokenizer, **options)


def corpus(log: Path | None = None) -> list[Unit]:
    """Five units, one of them without documents and one with few."""
    documents = random_documents(40)
    units: list[Unit] = cut(documents[:30], 3, log)
    return [*units, Listed("none", [], log), Listed("few", documents[30:31], log)]


def killed_at(folder: Path, operation: int, options: dict[str, Any]) -> None:
    """Prepare `corpus`, and die right before a durable operation of this process."""
    count = 0

    def kill(name: str, path: Path) -> None:
        nonlocal count
        if count == operation:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    durable.before = kill
    os.fsync = lambda descriptor: None  # what this process has written outlives it all the same
    run(folder, units=corpus(), **options)


def apart() -> None:
    """Leave the group of processes, and be open to interrupts."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def in_order(folder: Path, units: Sequence[Unit], options: dict[str, Any], before: Callable[[], Any]) -> None:
    """Prepare units after something."""
    before()
    try:
        run(folder, units=units, **options)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)


def slow_corpus(pids: Path, units: int = 6) -> list[Unit]:
    """Units that take about 50 ms each."""
    made = cut(random_documents(5 * units), units, kind=Slow)
    for unit in made:
        unit.pids = pids
    return made


class Endless(Listed):
    """One document of some MiB, made while it is read; then as many empty ones."""

    mebibytes: int

    def documents(self) -> Iterator[Document]:
        yield Document("only", (bytes(range(256)) * 4096 for _ in range(self.mebibytes)))
        yield from (Document("only", []) for _ in range(1000 * self.mebibytes))


def measured(folder: Path, mebibytes: int, queue: Any) -> None:
    """Prepare much text and tell the most memory that it took, in MiB."""
    unit = Endless("endless", [])
    unit.mebibytes = mebibytes
    run(folder, units=[unit, Listed("last", random_documents(1))], fraction=0.001)
    status = Path("/proc/self/status").read_text().split()
    queue.put(int(status[status.index("VmHWM:") + 1]) // 1024)
