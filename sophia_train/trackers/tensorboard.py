"""TensorBoard event files in the run folder."""

import re
from pathlib import Path
from typing import Any

from sophia_train.errors import UnavailableError
from sophia_train.trackers.base import AXES, Record, RunInfo, Tracker
from sophia_train.trackers.panels import SECTIONS, Panel

UNITS = {"tokens": ("tokens", 1.0), "seconds": ("milliseconds", 1e-3), "flops": ("gigaflops", 1e9)}
"""TensorBoard's x axis is a whole number: each axis in a unit that is fine enough, and its size."""


class TensorBoardTracker(Tracker):
    """Writes scalars and samples to `tensorboard/` in the run folder, against steps.

    What a panel shows against another axis is written once more against that, in a folder below, as
    `by_tokens/val/loss`: TensorBoard has one x axis only. Its "Custom Scalars" show the panels.

    A resumed run hides what an earlier one wrote after its checkpoint.

    Raises:
        UnavailableError: the tensorboard package is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UnavailableError(
                "tracker=tensorboard: the tensorboard package is not installed; "
                "run `pip install 'sophia_train[tensorboard]'` or use tracker=console"
            ) from error
        self._writer_class = SummaryWriter
        self._folder = Path()
        self._is_resumed = False
        self._writers: dict[str, Any] = {}

    def start(self, run: RunInfo) -> None:
        """Open an event file; a resumed run's purges the steps after its checkpoint."""
        self._folder = run.run_dir / "tensorboard"
        self._is_resumed = run.resumed_from_step is not None
        first = (run.resumed_from_step or 0) + 1
        self._writer("step", first).add_custom_scalars(layout())

    def log(self, record: Record) -> None:
        """Write each metric as a scalar at the record's step, with the other axes under `axis/`."""
        step = int(record["step"])
        for key, value in record.items():
            if key != "step":
                self._writer("step", step).add_scalar(f"axis/{key}" if key in AXES else key, value, step)
        for panel in _panels_against_others():
            if panel.metric in record:
                place = round(record[panel.axis] / UNITS[panel.axis][1])
                self._writer(panel.axis, place).add_scalar(tag_of(panel), record[panel.metric], place)

    def text(self, name: str, text: str, step: int) -> None:
        """Write a text, as preformatted Markdown."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer("step", step).add_text(name, indented, step)

    def close(self, code: int) -> None:
        """Write what is buffered and close the files."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, axis: str, first: int) -> Any:
        """The event file for an axis; one that a resumed run begins at `first` hides older points from there.

        Each is in a folder of its own, as hiding is by the place on the axis, whatever the metric.
        """
        if axis not in self._writers:
            folder = self._folder if axis == "step" else self._folder / f"by_{UNITS[axis][0]}"
            self._writers[axis] = self._writer_class(
                str(folder), purge_step=first if self._is_resumed else None
            )
        return self._writers[axis]


def layout() -> dict[str, dict[str, list[Any]]]:
    """The panels as TensorBoard's custom scalars: charts of a section by title, metrics as patterns."""
    return {
        section.name: {
            title_of(panel): ["Multiline", [f"{re.escape(tag_of(panel))}$"]] for panel in section.panels
        }
        for section in SECTIONS
    }


def title_of(panel: Panel) -> str:
    """Return a panel's title, with the unit of its axis where that is another here."""
    unit, size = UNITS.get(panel.axis, (panel.axis, 1.0))
    return panel.title if size == 1.0 else f"{panel.title}, in {unit}"


def tag_of(panel: Panel) -> str:
    """Return the tag that a panel's metric is written under."""
    return panel.metric if panel.axis == "step" else f"by_{UNITS[panel.axis][0]}/{panel.metric}"


def _panels_against_others() -> list[Panel]:
    return [panel for section in SECTIONS for panel in section.panels if panel.axis != "step"]
