"""The checkpoints of a run: written one at a time, read back, committed, and only then the oldest removed."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from sophia_train import checkpoint
from sophia_train.collectives import rank, together, world_size


class Checkpoints:
    """Writes the checkpoints of a run; all processes call it together.

    Args:
        folder: of the checkpoints.
        keep: how many stay, the newest.
        in_background: write while the training goes on.
    """

    def __init__(self, folder: Path, keep: int, *, in_background: bool) -> None:
        self.folder = folder
        self.keep = keep
        self.in_background = in_background
        self._saving: checkpoint.Save | None = None
        self._saved_step: int | None = None

    @property
    def written(self) -> bool:
        """Whether a checkpoint is on its way and this process has written its part."""
        return self._saving is not None and self._saving.written

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, extra: Mapping[str, Any]) -> None:
        """Save the state after a step, unless there is a checkpoint of it; in the background, begin to.

        The arguments are those of `checkpoint.Save`.

        Raises:
            OSError, DataError: as `finish`, of it or of the one before it.
            TypeError: the optimizer's state holds what a checkpoint cannot.
        """
        self.finish()
        if step != self._saved_step:
            self._saving = checkpoint.Save(
                self.folder, step, model, optimizer, extra, in_background=self.in_background
            )
            self._saved_step = step
        if not self.in_background:
            self.finish()

    def finish(self) -> None:
        """Commit the checkpoint that is being written, once it is read back, and then remove the oldest.

        Raises:
            OSError: it could not be written; nothing is left of it.
            DataError: it is not on the disk as it was written.
        """
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.finish()
            self._prune()

    def restored(self, step: int) -> None:
        """Take note that the state is that of a step's checkpoint, verified and loaded.

        Raises:
            OSError: an older one could not be removed.
        """
        self._saved_step = step
        self._prune()  # a kill may have come before the last pruning

    @contextlib.contextmanager
    def finishing_after_errors(self) -> Iterator[None]:
        """Commit what is still being written also if the body fails, where that takes no other process."""
        try:
            yield
        except Exception:
            if world_size() == 1:
                with contextlib.suppress(Exception):  # the error that came first is the one to tell
                    self.finish()
            raise

    def _prune(self) -> None:
        together(lambda: checkpoint.prune(self.folder, self.keep) if rank() == 0 else None)
