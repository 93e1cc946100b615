"""Follow a run that a program of ours has in the background, and strike when it is where a test wants it."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from support import ROOT

from sophia_train.processes import OUTPUT


def strike(script: str, arguments: list[str], folder: Path, step: int, how: signal.Signals) -> int:
    """Send a signal to a script when the run in a folder, which is not there yet, has logged a step.

    Returns when script and run have ended: the exit code of the script.
    """
    log = folder / OUTPUT
    log.parent.mkdir(parents=True)
    os.mkfifo(log)  # what the run prints is read here, and its end is seen
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process, _within(seconds=60):
        with log.open() as pipe:
            assert any(f" {step}/" in line for line in pipe), "the run ended before"
            process.send_signal(how)
            pipe.read()
        code = process.wait()
    log.unlink()
    return code


@contextmanager
def _within(seconds: int):
    def give_up(*_):
        raise TimeoutError(f"nothing came for {seconds} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
