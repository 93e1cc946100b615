"""Processes that prepare units, as many at a time as are wanted.

Each worker process imports this module and what units are made of, and nothing heavier.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from sophia_train.data.base import Progress
from sophia_train.data.parts import PartsFolder, prepare_unit
from sophia_train.data.tokenizers import Tokenizer
from sophia_train.data.units import SplitRule
from sophia_train.errors import Interrupted

REPORT_SECONDS = 0.2


def prepare_units(
    parts: PartsFolder,
    tokenizer: Tokenizer,
    rule: SplitRule,
    workers: int,
    share: tuple[int, int],
    progress: Progress | None,
) -> None:
    """Prepare those units of a share that are not done; arguments as of `prepare.prepare`.

    When a unit fails, those that other workers are at are finished; on an interrupt they are not.

    Raises:
        Interrupted: a worker was killed.
        RunError: of a unit, as `parts.prepare_unit`; so does OSError pass through.
    """
    mine = range(share[0], len(parts.units), share[1])
    done = {index: part for index in mine if (part := parts.find(index))}
    # documents, tokens and bytes of each unit, where workers write and this process reads
    context = multiprocessing.get_context("spawn")
    counts = context.RawArray("q", 3 * max(1, len(parts.units)))
    for index, part in done.items():
        counts[3 * index : 3 * index + 3] = [sum(part.documents.values()), part.tokens, part.text_bytes]
    left = [index for index in mine if index not in done]
    reported = time.monotonic()

    def report() -> None:
        nonlocal reported
        reported = time.monotonic()
        if progress:
            progress(*(sum(counts[which::3]) for which in range(3)))

    if workers == 1:
        for index in left:

            def count(*unit: int, index: int = index) -> None:
                counts[3 * index : 3 * index + 3] = unit
                if time.monotonic() > reported + REPORT_SECONDS:
                    report()

            prepare_unit(parts, index, tokenizer, rule, count)
        report()
        return
    lifeline, held = context.Pipe(duplex=False)
    with (
        held,
        ProcessPoolExecutor(
            workers, context, _begin_worker, (lifeline, parts, tokenizer, rule, counts)
        ) as pool,
    ):
        try:
            with _without_main(), _deaf_to_interrupts():
                pending = {pool.submit(_work, index) for index in left}
            while pending:
                finished, pending = wait(pending, REPORT_SECONDS, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                report()
        except BrokenProcessPool:
            raise Interrupted(
                f"a worker was killed, perhaps for want of memory; {parts.path} keeps what is done: "
                f"start again, with fewer than workers={workers} if it happens again"
            ) from None
        except KeyboardInterrupt:
            held.close()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    report()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Let processes that are spawned in the body leave the program alone that spawns them.

    Each would import it to begin with, for whatever it is asked to do, and with it torch and much else: some
    seconds for every worker, which needs this module only.
    """
    names: dict[str, Any] = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {name: names.pop(name) for name in ("__file__", "__spec__") if name in names}
    names["__spec__"] = None
    try:
        yield
    finally:
        names.update(hidden)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Let processes that are spawned in the body have no part in a Ctrl-C, which a terminal sends to all.

    They inherit the mask from their first moment, so that not even Python's start is broken off with a
    traceback; this process ends them by letting go of their lifeline. Its own interrupts wait for the end of
    the body.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: dict[str, Any] = {}


def _begin_worker(
    lifeline: Connection, parts: PartsFolder, tokenizer: Tokenizer, rule: SplitRule, counts: Any
) -> None:
    _worker.update(parts=parts, tokenizer=tokenizer, rule=rule, counts=counts)

    def end_with_parent() -> None:  # which, killed, can tell nobody; but then its end of the pipe is closed
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(index: int) -> None:
    def count(*unit: int) -> None:
        _worker["counts"][3 * index : 3 * index + 3] = unit

    prepare_unit(_worker["parts"], index, _worker["tokenizer"], _worker["rule"], count)
