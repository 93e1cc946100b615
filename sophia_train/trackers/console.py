"""What a person sees of a run: a progress line on a terminal, plain lines elsewhere."""

import os

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from sophia_train.trackers.base import Record, RunInfo, Tracker

SAMPLE_LINES = 8
"""Lines shown of a sample; the run folder has the whole."""


class Output(Console):
    """The standard output of a run, which goes on in silence when its reader is gone, as with `| head`."""

    def on_broken_pipe(self) -> None:
        """Drop the rest; a plain `Console` would end the program."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())  # so that what is still buffered fails nowhere
        os.close(nowhere)


class ConsoleTracker(Tracker):
    """Shows progress live on a terminal, with evaluations above it; elsewhere one line a record.

    Args:
        console: where to write; None for the standard output.
    """

    slow = False

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Output(highlight=False)
        self._total = 0
        self._progress: Progress | None = None
        self._pace = Pace()

    def start(self, run: RunInfo) -> None:
        """Show where the run is; on a terminal the progress line stays until `close`."""
        self._total = run.total_steps
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            _Figures(),
            console=self._console,
            expand=True,
        )
        self._progress.add_task("", total=run.total_steps, completed=run.resumed_from_step or 0, figures="")
        self._progress.start()

    def log(self, record: Record) -> None:
        """Move the progress line on, or write a line."""
        step = int(record["step"])
        remaining = self._pace.remaining(record, self._total)
        if self._progress is None:
            self._console.print(
                plain_line(record, self._total, remaining), soft_wrap=True, markup=False, highlight=False
            )
            return
        self._progress.update(
            self._progress.task_ids[0], completed=step, figures=self._pace.figures(record, remaining)
        )
        if "val/loss" in record:
            self._console.print(plain_line(record, self._total, None), markup=False, highlight=False)

    def text(self, name: str, text: str, step: int) -> None:
        """Show the first lines of a text."""
        lines = text.splitlines()
        shown = [f"  | {line}" for line in lines[:SAMPLE_LINES]]
        if len(lines) > SAMPLE_LINES:
            shown.append(f"  | ... {len(lines) - SAMPLE_LINES} more lines in the run folder")
        for line in (f"{name} at step {step}", *shown):
            printable = "".join(c if c.isprintable() else " " for c in line.expandtabs())
            self._console.print(Text(printable, style="dim", no_wrap=True, overflow="ellipsis"))

    def close(self, code: int) -> None:
        """Leave the last state of the progress line on the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Pace:
    """Time per step over the last records of this invocation, and the latest of each figure."""

    WINDOW = 20

    def __init__(self) -> None:
        self._times: list[tuple[int, float]] = []
        self._latest: dict[str, float | int] = {}

    def remaining(self, record: Record, total_steps: int) -> float | None:
        """Take in a record; return the seconds to the last step, None where nothing tells."""
        step, seconds = int(record["step"]), float(record["seconds"])
        self._times = [*self._times[-self.WINDOW :], (step, seconds)]
        first_step, first_seconds = self._times[0]
        if step > first_step:
            return (total_steps - step) * (seconds - first_seconds) / (step - first_step)
        if "perf/step_seconds" in record:
            return (total_steps - step) * float(record["perf/step_seconds"])
        return None

    def figures(self, record: Record, remaining: float | None) -> str:
        """Return the latest known losses and speed, for the progress line."""
        self._latest.update(record)
        return "  ".join(
            _figures(self._latest, remaining, ("train/loss", "val/loss", "perf/tokens_per_second"))
        )


def plain_line(record: Record, total_steps: int, remaining: float | None) -> str:
    """Return one record as one line of text."""
    width = len(str(total_steps))
    head = f"step {int(record['step']):>{width}}/{total_steps}"
    return "  ".join([head, *_figures(record, remaining, tuple(_FORMATS))])


def duration(seconds: float) -> str:
    """Return a time span in its two largest units, as in 1m42s."""
    minutes, s = divmod(max(round(seconds), 0), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{m}m{s:02d}s" if minutes else f"{s}s"


def count(value: float) -> str:
    """Return a number with three digits and a unit, as in 12.3k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.{1 if value < 100 * size else 0}f}{unit}"
    return f"{value:.0f}"


_FORMATS = {
    "train/loss": lambda value: f"loss {value:.3f}",
    "val/loss": lambda value: f"val {value:.3f}",
    "optim/lr": lambda value: f"lr {value:.1e}",
    "perf/tokens_per_second": lambda value: f"{count(value)} tok/s",
}


def _figures(record: Record, remaining: float | None, keys: tuple[str, ...]) -> list[str]:
    figures = [_FORMATS[key](record[key]) for key in keys if key in record]
    return figures if remaining is None else [*figures, f"eta {duration(remaining)}"]


class _Figures(ProgressColumn):
    """The figures of the task, in full even where the bar has to give way."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        """Return the text that `log` left in the task."""
        return Text(task.fields["figures"])
