"""Runs in processes of their own: started beside each other, asked to stop together."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

from filelock import FileLock, Timeout

from sophia_train.distributed import end_with_parent
from sophia_train.errors import Interrupted, OutputError, RunError

OUTPUT = "output.log"
"""What the last invocation of a run in the background printed, in its folder."""

POLL_SECONDS = 0.2
HAND_OVER_SECONDS = 120.0
"""How long the former owner of a run folder, which was told to stop, may take to save."""

Process = subprocess.Popen[bytes]


class Processes:
    """Processes of which some run beside each other.

    Inside its `with`, SIGINT and SIGTERM are passed on to all of them, upon which runs save and exit with 75.
    However the `with` is left, those that still run are asked to stop and waited for; and if this process is
    killed, Linux asks them to stop.

    Attributes:
        told_to_stop: whether a signal came.
    """

    def __init__(self) -> None:
        self.told_to_stop = False
        self._running: list[Process] = []
        self._stopping: set[Process] = set()

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in list(self._running):
            self.stop(process)
        for process in list(self._running):
            process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str], output: IO[bytes] | None = None) -> Process:
        """Start a command; what it prints goes where this process prints, or to `output`."""
        # A group of its own: Ctrl-C in a terminal reaches us alone, and the run gets each signal once.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
            preexec_fn=end_with_parent,
        )
        self._running.append(process)
        if self.told_to_stop:  # between the caller's look and now
            self.stop(process)
        return process

    def run(self, command: Sequence[str]) -> int:
        """Start a command, wait for its end, and return its exit code; 75 at once after a signal."""
        if self.told_to_stop:
            return Interrupted.code
        process = self.start(command)
        process.wait()
        self._running.remove(process)
        return exit_code(process)

    def stop(self, process: Process) -> None:
        """Ask a process to stop, once: the second time would end a run that is saving."""
        if process not in self._stopping:
            self._stopping.add(process)
            process.terminate()

    def ended(self) -> list[Process]:
        """Take out those that have ended, after a moment's wait; there may be none."""
        time.sleep(POLL_SECONDS)
        found = [process for process in self._running if process.poll() is not None]
        self._running = [process for process in self._running if process not in found]
        return found

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self.told_to_stop = True
        for process in list(self._running):
            self._stopping.add(process)
            process.send_signal(number)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a folder of runs during the body; it is made if need be.

    Raises:
        OutputError: another process owns it.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise OutputError(
            f"--out={folder} is in use by another process; wait for it, or choose another --out"
        ) from None


def start_run(processes: Processes, overrides: Sequence[str], folder: Path) -> Process:
    """Start the run of a folder, or go on with it; what it prints goes to `output.log` there.

    A killed predecessor may leave a run that is still saving, which is waited for.

    Args:
        processes: to start it among.
        overrides: all of its settings.
        folder: its `run_dir`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(Timeout), FileLock(folder / ".lock", timeout=HAND_OVER_SECONDS):
        pass
    with (folder / OUTPUT).open("wb") as output:
        return processes.start(train_command(overrides), output)


def train_command(overrides: Sequence[str], config_folder: Path | None = None) -> list[str]:
    """Write the command of one run."""
    searched = [] if config_folder is None else ["--config-dir", str(config_folder)]
    return [sys.executable, "-m", "sophia_train", *searched, *overrides]


def quoted(key: str, value: object) -> str:
    """Write an override whose value may hold any character."""
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{text}'"


def exit_code(process: Process) -> int:
    """Return how a process ended, as a shell has it: 128 and its number for a signal."""
    code = process.returncode
    return code if code >= 0 else 128 - code


def was_interrupted(code: int) -> bool:
    """Whether a run with this exit code was stopped and can go on; by a signal, without a save."""
    return code == Interrupted.code or code > 128


def failure(folder: Path, code: int) -> RunError:
    """Say why a run in the background ended: with the error line that it printed, and its exit code."""
    lines = (folder / OUTPUT).read_text(errors="replace").splitlines()
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = reasons[-1] if reasons else f"ended with exit code {code}; see {folder / OUTPUT}"
    error = RunError(f"{folder}: {reason}")
    error.code = code or RunError.code
    return error
