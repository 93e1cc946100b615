"""What a tracker is, and how several share a run without any of them being able to stop it."""

import contextlib
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = Mapping[str, float | int]
"""One moment of a run: `step`, `tokens`, `seconds`, `flops`, and metrics such as `train/loss`."""

AXES = ("step", "tokens", "seconds", "flops")
"""What any metric can be plotted against; in every record."""

logger = logging.getLogger("sophia_train")


@dataclass(frozen=True)
class RunInfo:
    """What a tracker may know of a run when it starts.

    Attributes:
        run_dir: the run's folder; it exists.
        name: the run's name.
        config: the resolved configuration, as JSON values.
        resumed_from_step: completed steps of the checkpoint a resumed run starts from; None for a new run.
        total_steps: length of the whole run in steps.
        data: digests of its tokens, by split; empty if they are not known.
    """

    run_dir: Path
    name: str
    config: dict[str, Any]
    resumed_from_step: int | None
    total_steps: int
    data: Mapping[str, str] = field(default_factory=dict)


class Tracker(ABC):
    """Something that is shown or keeps the metrics of a run; only rank 0 has trackers.

    Attributes:
        slow: whether it talks to a service or a library of its own, and so gets a thread of its own.
    """

    slow = True

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """Begin or, with `run.resumed_from_step`, continue a run."""

    @abstractmethod
    def log(self, record: Record) -> None:
        """Take the metrics of one moment."""

    @abstractmethod
    def text(self, name: str, text: str, step: int) -> None:
        """Take a text, such as a sample of the model."""

    @abstractmethod
    def close(self, code: int) -> None:
        """End with the exit code of the run."""

    def sync(self) -> None:  # noqa: B027
        """Put on the disk what was logged so far, where the tracker keeps it there itself."""


class Guarded(Tracker):
    """A tracker whose exceptions are caught and counted, and warned of once.

    Attributes:
        failures: number of calls that raised.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.name = type(tracker).__name__
        self.failures = 0
        self._started = False

    def start(self, run: RunInfo) -> None:
        """Start the tracker; if that fails it gets no further calls."""
        self._started = self._call(lambda: self.tracker.start(run))

    def log(self, record: Record) -> None:
        """Hand it a record."""
        if self._started:
            self._call(lambda: self.tracker.log(record))

    def text(self, name: str, text: str, step: int) -> None:
        """Hand it a text."""
        if self._started:
            self._call(lambda: self.tracker.text(name, text, step))

    def close(self, code: int) -> None:
        """End it."""
        if self._started:
            self._call(lambda: self.tracker.close(code))

    def _call(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:
            self.failures += 1
            if self.failures == 1:
                reason = str(error).partition("\n")[0]
                logger.warning(
                    "%s failed and the run goes on: %s: %s", self.name, type(error).__name__, reason
                )
            return False
        return True


class Isolated(Tracker):
    """A slow tracker on a daemon thread, behind a bounded queue: it can neither stop nor hold the run.

    `start`, `log` and `text` return at once. When the queue is full the newest record is dropped and
    counted; JSONL still has it.

    Args:
        tracker: the guest.
        capacity: calls that may wait.
        close_timeout: seconds that `close` may wait for the guest to take in what is queued and to end.

    Attributes:
        dropped: number of calls that found the queue full, or were still in it when the time to close was up.
    """

    def __init__(self, tracker: Tracker, *, capacity: int = 1024, close_timeout: float = 10.0) -> None:
        self.dropped = 0
        self._guest = Guarded(tracker)
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(capacity)
        self._close_timeout = close_timeout
        self._thread = threading.Thread(target=self._work, name=f"tracker-{self._guest.name}", daemon=True)

    @property
    def failures(self) -> int:
        """Number of the guest's calls that raised."""
        return self._guest.failures

    def start(self, run: RunInfo) -> None:
        """Start the thread and, on it, the guest."""
        self._thread.start()
        self._put(lambda: self._guest.start(run))

    def log(self, record: Record) -> None:
        """Queue a copy of the record, or drop it."""
        frozen = dict(record)  # the trainer may go on with its own
        self._put(lambda: self._guest.log(frozen))

    def text(self, name: str, text: str, step: int) -> None:
        """Queue the text, or drop it."""
        self._put(lambda: self._guest.text(name, text, step))

    def close(self, code: int) -> None:
        """End the guest, within `close_timeout` seconds; what it has not taken by then is dropped."""
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + self._close_timeout
        try:
            for call in (lambda: self._guest.close(code), None):
                self._queue.put(call, timeout=max(deadline - time.monotonic(), 0))
            self._thread.join(max(deadline - time.monotonic(), 0))
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._leave()
        if self.dropped:
            logger.warning("%s missed %d calls; metrics.jsonl has all", self._guest.name, self.dropped)

    def _put(self, call: Callable[[], None]) -> None:
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            if self.dropped == 0:
                logger.warning("%s is too slow: records are dropped; metrics.jsonl has all", self._guest.name)
            self.dropped += 1

    def _leave(self) -> None:
        """Empty the queue, so that the thread ends should the guest ever come back."""
        logger.warning("%s was left behind: it did not end in %g s", self._guest.name, self._close_timeout)
        with contextlib.suppress(queue.Empty):
            while True:
                if self._queue.get_nowait() is not None:
                    self.dropped += 1
        self._queue.put(None)

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            call()


class Trackers(Tracker):
    """All trackers of a run: the record first and synchronously, then the others, which cannot fail it.

    Args:
        record: the source of truth; what it raises ends the run.
        others: shown in turn; a slow one behind `Isolated`, a quick one (the console) behind `Guarded`.
        close_timeout: seconds that each slow one may take to end.
    """

    def __init__(
        self, record: Tracker, others: Iterable[Tracker] = (), *, close_timeout: float = 10.0
    ) -> None:
        self._record = record
        self._others: list[Tracker] = [
            Isolated(other, close_timeout=close_timeout) if other.slow else Guarded(other) for other in others
        ]

    def start(self, run: RunInfo) -> None:
        """Start all; raises what the record raises: DataError for an altered file, OSError."""
        self._record.start(run)
        for other in self._others:
            other.start(run)

    def log(self, record: Record) -> None:
        """Hand a record to all."""
        self._record.log(record)
        for other in self._others:
            other.log(record)

    def text(self, name: str, text: str, step: int) -> None:
        """Hand a text to all."""
        self._record.text(name, text, step)
        for other in self._others:
            other.text(name, text, step)

    def sync(self) -> None:
        """Put every record so far on the disk; to be called before a checkpoint is saved."""
        self._record.sync()

    def close(self, code: int) -> None:
        """End all, slow ones within their bound."""
        self._record.close(code)
        for other in self._others:
            other.close(code)


class Silent(Tracker):
    """Takes everything and does nothing: for the processes other than the first."""

    slow = False

    def start(self, run: RunInfo) -> None:
        """Do nothing."""

    def log(self, record: Record) -> None:
        """Do nothing."""

    def text(self, name: str, text: str, step: int) -> None:
        """Do nothing."""

    def close(self, code: int) -> None:
        """Do nothing."""
