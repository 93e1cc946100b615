"""TensorBoard event files in the run folder."""

from sophia_train.errors import UnavailableError
from sophia_train.trackers.base import AXES, Record, RunInfo, Tracker


class TensorBoardTracker(Tracker):
    """Writes scalars and samples to `tensorboard/` in the run folder, against steps.

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

    def start(self, run: RunInfo) -> None:
        """Open an event file; a resumed run's purges the steps after its checkpoint."""
        resumed = run.resumed_from_step
        self._writer = self._writer_class(
            str(run.run_dir / "tensorboard"), purge_step=None if resumed is None else resumed + 1
        )

    def log(self, record: Record) -> None:
        """Write each metric as a scalar at the record's step, with the other axes under `axis/`."""
        step = int(record["step"])
        for key, value in record.items():
            if key != "step":
                self._writer.add_scalar(f"axis/{key}" if key in AXES else key, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Write a text, as preformatted Markdown."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_text(name, indented, step)

    def close(self, code: int) -> None:
        """Write what is buffered and close the file."""
        self._writer.close()
