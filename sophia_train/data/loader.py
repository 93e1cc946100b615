"""Brings batches to the device ahead of the step that needs them."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from sophia_train.data.batches import Batch, Batches


class Loader:
    """Reads the batch of the next step on a thread while the device works on this one.

    What is read stays a pure function of the step: a step that was not expected is read when it is asked for.

    Args:
        batches: this process's part of each step's batch.
        device: where to; on a GPU the copy is made from pinned memory, and nobody waits for it.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches = batches
        self.device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: dict[int, Future[Batch]] = {}

    def batch(self, step: int) -> Batch:
        """Return the batch of `step` on the device, and begin to read the next one."""
        ahead = self._ahead.pop(step, None) or self._thread.submit(self._read, step)
        self._ahead = {step + 1: self._thread.submit(self._read, step + 1)}
        batch = ahead.result()
        inputs = batch.inputs.to(self.device, non_blocking=True)
        return Batch(inputs, batch.targets.to(self.device, non_blocking=True), batch.sequences)

    def _read(self, step: int) -> Batch:
        batch = self.batches.batch(step)
        return Batch(self._pinned(batch.inputs), self._pinned(batch.targets), batch.sequences)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor
