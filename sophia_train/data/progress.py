"""Shows a person how far a preparation is."""

import time
from collections import deque
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

PLAIN_SECONDS = 10.0  # between lines where there is no terminal
POINTS = 300  # about a minute of times and bytes, of which the speed is the mean


class ProgressDisplay:
    """A live line on a terminal, elsewhere a line now and then, on the standard error.

    Args:
        total: bytes of text, about.
    """

    def __init__(self, total: float) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._total = total
        self._points: deque[tuple[float, int]] = deque(maxlen=POINTS)
        self._printed = time.monotonic()
        self._bar = Progress(
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
            console=self._console,
            expand=True,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._task = self._bar.add_task("", total=max(1.0, self._total), figures="")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._bar.update(self._task, completed=max(1.0, self._total))
        self._bar.stop()

    def show(self, documents: int, tokens: int, text_bytes: int) -> None:
        """Take in documents, tokens and bytes of text so far."""
        now = time.monotonic()
        self._points.append((now, text_bytes))
        figures = f"{documents:,} documents  {tokens:,} tokens"
        seconds, done = now - self._points[0][0], text_bytes - self._points[0][1]
        if seconds > 0 and done > 0:
            figures += f"  {done / seconds / 1e6:.1f} MB/s"
            if text_bytes < self._total:
                left = timedelta(seconds=round((self._total - text_bytes) * seconds / done))
                figures += f"  eta {left}"
        self._bar.update(self._task, completed=min(text_bytes, self._total), figures=figures)
        if not self._console.is_terminal and now > self._printed + PLAIN_SECONDS:
            self._printed = now
            self._console.print(figures, soft_wrap=True)
