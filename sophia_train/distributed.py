"""The process group of a run, under Accelerate: devices, launch checks, reductions, signals, the logger."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

from sophia_train.collectives import sum_over_processes
from sophia_train.errors import ConfigError

logger = logging.getLogger("sophia_train")


def start(precision: str, processes: int | None, gradient_type: torch.dtype = torch.float32) -> Accelerator:
    """Join the process group that the launcher describes, if any.

    Args:
        precision: "fp32", "bf16", "fp8" (bf16 but for some products), or "auto": bf16 on a GPU that has
            it, else fp32.
        processes: the world size that the user counts on; None takes what comes.
        gradient_type: in which DDP sends gradients and sums them up.

    Raises:
        ConfigError: the group is not what was asked for: Accelerate can silently run n jobs of one process.
    """
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched:
        _end_with_parent()
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise ConfigError(
            "ACCELERATE_USE_FSDP=true: leave FSDP out of Accelerate's settings, use parallel=fsdp"
        )
    hook = DDPCommunicationHookType.BF16 if gradient_type is torch.bfloat16 else DDPCommunicationHookType.NO
    ddp = DistributedDataParallelKwargs(comm_hook=hook)
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else "bf16", kwargs_handlers=[ddp])
    accelerator.wait_for_everyone()  # one that fails from here on finds no other still connecting to it
    _set_up_logger(accelerator.is_main_process)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world_size:
        raise ConfigError(
            f"WORLD_SIZE={world_size}, but Accelerate made {accelerator.num_processes} process(es); "
            "launch with torchrun, or check `accelerate config`"
        )
    if processes not in (None, world_size):
        raise ConfigError(
            f"processes={processes}, but {world_size} process(es) run; "
            f"launch with `torchrun --nproc-per-node {processes} -m sophia_train ...`"
        )
    return accelerator


class StopSignal:
    """Notes SIGTERM and SIGINT instead of dying of them, so that the step in progress can end.

    Attributes:
        received: name of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Note signals during the body; a second one of the same kind has its old effect."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, frame: FrameType | None) -> None:
            self.received = signal.Signals(number).name
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def ending_together(accelerator: Accelerator, *common: type[Exception]) -> Iterator[None]:
    """Let the processes leave together, at the end of the body or at an error that is common to all.

    A launcher ends all processes as soon as one has failed, when rank 0 may still have to write; and a
    process that exits with its group open may abort.

    Args:
        accelerator: of this process.
        common: what every process raises if one does; after other errors none waits for another.
    """
    try:
        yield
    except common:
        _leave_group(accelerator)
        raise
    _leave_group(accelerator)


def _leave_group(accelerator: Accelerator) -> None:
    if torch.distributed.is_initialized():
        with suppress(RuntimeError):  # another one has failed and is gone
            arrived = torch.ones(1, device=accelerator.device)
            sum_over_processes([arrived])
            arrived.item()
        torch.distributed.destroy_process_group()


def main_process_first(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do `work` on rank 0 while the others wait; its failure ends all of them."""
    failed = torch.zeros(1, device=accelerator.device)
    try:
        if accelerator.is_main_process:
            work()
    except BaseException:
        failed += 1
        raise
    finally:
        sum_over_processes([failed])
    if failed.item():
        sys.exit(1)  # rank 0 has said why


class _StandardError(logging.StreamHandler):
    """Writes to what `sys.stderr` is at that moment: a live progress line puts itself in its place."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        pass


def _set_up_logger(is_main_process: bool) -> None:
    logger.setLevel(logging.INFO if is_main_process else logging.ERROR)
    if not logger.handlers:
        logger.addHandler(_StandardError())
        logger.propagate = False


def _end_with_parent() -> None:
    """Ask Linux for SIGTERM when the launcher dies: `accelerate launch` would leave this process training."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
