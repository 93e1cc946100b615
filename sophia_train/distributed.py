"""The process group of a run, under Accelerate: devices, launch checks, reductions, signals, the logger."""

import ctypes
import functools
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import NoReturn, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch.distributed import DistError
from torch.distributed.distributed_c10d import _get_default_store

from sophia_train.collectives import sum_over_processes, together, world_size
from sophia_train.errors import ConfigError, RunError, UnavailableError, is_first_process

logger = logging.getLogger("sophia_train")

COMMON_FAILURE_SECONDS = 3.0
"""Processes that all fail within this time have failed for the same reason."""

PREPARATION = timedelta(days=7)
"""How long processes wait for data to be prepared and verified; collectives of the training: minutes."""

_JOINED = threading.Event()  # whether there has been a group, which may be left again

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


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
    has_gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if has_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if _has_launcher():
        end_with_parent()
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise ConfigError(
            "ACCELERATE_USE_FSDP=true: leave FSDP out of Accelerate's settings, use parallel=fsdp"
        )
    hook = DDPCommunicationHookType.BF16 if gradient_type is torch.bfloat16 else DDPCommunicationHookType.NO
    ddp = DistributedDataParallelKwargs(comm_hook=hook)
    asked = int(os.environ.get("WORLD_SIZE", 1))
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else "bf16",
        kwargs_handlers=[ddp],
        cpu=not has_gpu,  # else it takes a Mac's GPU, and several processes for as many runs of one
    )
    _JOINED.set()
    accelerator.wait_for_everyone()  # one that fails from here on finds no other still connecting to it
    _set_up_logger(accelerator.is_main_process)
    if accelerator.num_processes != asked:
        raise ConfigError(
            f"WORLD_SIZE={asked}, but Accelerate made {accelerator.num_processes} process(es); "
            "launch with torchrun, or check `accelerate config`"
        )
    if processes not in (None, asked):
        raise ConfigError(
            f"processes={processes}, but {asked} process(es) run; "
            f"launch with `torchrun --nproc-per-node {processes} -m sophia_train ...`"
        )
    return accelerator


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and SIGINT instead of dying of them, so that the step in progress can end.

    SIGUSR1 is the warning that Slurm sends some time before it ends a job.

    Attributes:
        received: name of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Note signals during the body, of which a second Ctrl-C has its old effect.

        Not under a launcher: the one signal may come from it and from the terminal or Slurm, too.
        """
        before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}

        def note(number: int, frame: FrameType | None) -> None:
            self.received = signal.Signals(number).name
            if number == signal.SIGINT and not _has_launcher():
                signal.signal(number, before[signal.SIGINT])

        for number in before:
            signal.signal(number, note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class Failure:
    """How a run fails whose processes fail.

    Attributes:
        common: all of them do, as for a wrong setting.
        told_here: this process is the one to say why: rank 0 of a common failure, else the first that failed.
            The others fail because they have lost it.
    """

    common: bool
    told_here: bool


def failure(error: BaseException) -> Failure:
    """Find out, in a process that fails, whether the others do.

    Those of an error that is common by itself are not asked: rank 0 may still have much to write before it
    could answer. Nor are they before there is a group, as for a wrong setting: then the others give rank 0
    time to speak, which a launcher ends with the first process that ends.

    Args:
        error: that this process fails with.
    """
    if torch.distributed.is_initialized():
        for number in _STOP_SIGNALS:  # from a launcher that hears of it: there is still something to write
            signal.signal(number, signal.SIG_IGN)
        if not (isinstance(error, RunError) and error.common):
            return _vote()
    elif not _JOINED.is_set() and not is_first_process():
        time.sleep(COMMON_FAILURE_SECONDS)
    return Failure(common=True, told_here=is_first_process())


@functools.cache
def _vote() -> Failure:
    """Ask the other processes whether they fail; the answer stays the same."""
    try:
        store = _get_default_store()
        place = store.add("failed", 1)
        deadline = time.monotonic() + COMMON_FAILURE_SECONDS
        while place < world_size() and not store.check(["verdict"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        verdict = store.compare_set("verdict", "", "common" if place == world_size() else "alone")
    except DistError:  # the store went with the launcher, which was killed, or with rank 0
        return Failure(common=True, told_here=is_first_process())
    common = verdict == b"common"
    return Failure(common, told_here=is_first_process() if common else place == 1)


@contextmanager
def ending_together(accelerator: Accelerator) -> Iterator[None]:
    """Let the processes leave together, at the end of the body or at an error that is common to all.

    A launcher ends all processes as soon as one has failed, when rank 0 may still have to write; and a
    process that exits with its group open may abort.

    Args:
        accelerator: of this process.

    Raises:
        UnavailableError: as `noticing_losses`.
    """
    try:
        with noticing_losses():
            yield
    except RunError as error:
        if error.common:  # after other errors none waits for another
            _leave_group(accelerator)
        raise
    _leave_group(accelerator)


@contextmanager
def noticing_losses() -> Iterator[None]:
    """Say in one line that another process has gone while this one was waiting for it.

    Raises:
        UnavailableError: the body failed in its communication.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and "/gloo/" not in str(error):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0]
        raise UnavailableError(
            f"another process of the run is gone ({reason}); run it again to go on from the last checkpoint"
        ) from error


def main_process_first(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do `work` on rank 0, for hours if need be, while the others wait; its failure is that of all.

    Raises:
        OSError, RunError: of the work.
    """
    together(lambda: work() if accelerator.is_main_process else None, PREPARATION)


def _leave_group(accelerator: Accelerator) -> None:
    if torch.distributed.is_initialized():
        with suppress(RuntimeError):  # another one has failed and is gone
            arrived = torch.ones(1, device=accelerator.device)
            sum_over_processes([arrived])
            arrived.item()
        torch.distributed.destroy_process_group()


def is_one_of_several() -> bool:
    """Whether a launcher has started more processes than this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def end_process(code: int) -> NoReturn:
    """Exit with a code; from a process of several without taking the interpreter apart.

    Threads of gloo free what they have sent some time after it was, for which they need the interpreter's
    lock. One that asks for it while the interpreter ends is unwound through C++: the process aborts, and the
    launcher takes the run for failed.
    """
    if is_one_of_several():
        logging.shutdown()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError, ValueError):  # it may be full or closed
                stream.flush()
        os._exit(code)
    sys.exit(code)


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


def _has_launcher() -> bool:
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def end_with_parent() -> None:
    """Let Linux send SIGTERM when the process that started this one dies, as `accelerate launch` may."""
    if _LIBC is not None:
        pr_set_pdeathsig = 1
        _LIBC.prctl(pr_set_pdeathsig, signal.SIGTERM)
