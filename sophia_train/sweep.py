"""Several runs, one after the other, each in a process of its own."""

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from sophia_train.errors import Interrupted


def run_in_turn(commands: Sequence[Sequence[str]]) -> int:
    """Run each command in a process of its own, one after the other.

    A job that fails does not keep the others from running; one that is interrupted does.

    Returns:
        The exit code of the first job that failed, or 0.
    """
    codes = []
    for command in commands:
        codes.append(_in_process(command))
        if codes[-1] == Interrupted.code or codes[-1] > 128:
            break
    return next((code for code in codes if code), 0)


def _in_process(command: Sequence[str]) -> int:
    # A group of its own: Ctrl-C in a terminal reaches us alone, and the job gets each signal exactly once.
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0) as process:
        with _passing_on_signals(process):
            code = process.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def _passing_on_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def pass_on(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
