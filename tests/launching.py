"""Runs under real launchers, and on several processes without one."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
from support import ENVIRONMENT, Ended, Runs
from torch.distributed import TCPStore

from sophia_train import checkpoint

PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
ACCELERATE = [*PYTHON, "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
ACCELERATE += ["--mixed_precision", "no", "--num_processes"]
SECONDS = 180  # that anything may take on a busy machine


def run_together(runs: Runs, processes: int, *arguments, hooks=None, pids: Path | None = None) -> list[Ended]:
    """Run the command line on several processes as a launcher would; their own exit codes can be seen.

    Args:
        runs: starts them.
        processes: how many.
        arguments: the command line.
        hooks: of each process.
        pids: file for the process ids, a line each.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a launcher's outlives them
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": True}
        environment = {key: str(value) for key, value in place.items()}
        started.append(runs.start(*arguments, environment=environment, hooks=hooks[rank] if hooks else ()))
    if pids is not None:
        pids.write_text("".join(f"{pid}\n" for pid, _ in started))
    return [runs.wait(each) for each in started]


class Launched:
    """A command, and the processes that come of it, whoever their parent is by now.

    Args:
        command: to start, in a session of its own.
        output: file for what all of them print.
        cwd: where to start it.
        environment: on top of this one.
    """

    def __init__(self, command, output: Path, cwd: Path | None = None, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        self.output = output
        environment = {**os.environ, **ENVIRONMENT, **environment, "LAUNCHED": self._mark}
        with output.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def alive(self, variable: str = "LAUNCHED") -> dict[int, str | None]:
        """The processes that are there and have this variable, by id, each with its rank if it has one."""
        found = {}
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    environment = process.environ()
                    if environment.get("LAUNCHED") == self._mark and variable in environment:
                        found[process.pid] = environment.get("RANK")
            except psutil.Error:  # of another user, or just gone
                continue
        return found

    def wait_until(self, happened) -> None:
        """Wait for something that this command is to bring about."""
        wait_until(lambda: happened() or self.process.poll() is not None)
        assert happened(), self.output.read_text()[-3000:]

    def wait_for_nobody(self) -> int:
        """Wait until all of its processes have ended; returns its exit code."""
        wait_until(lambda: self.process.poll() is not None and not self.alive())
        return self.process.returncode

    @property
    def errors(self) -> list[str]:
        """The lines that say why a run ended."""
        return [line for line in self.output.read_text().splitlines() if line.startswith("error:")]

    def kill(self) -> None:
        """End what is left of it."""
        for pid in self.alive():
            psutil.Process(pid).kill()
        self.process.wait()


def wait_until(happened) -> None:
    """Wait for something, but not for ever."""
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def count_records(run_dir: Path) -> int:
    """How many records of metrics a run has written so far."""
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, which is whole."""
    newest = checkpoint.latest(run_dir / "checkpoints")
    return 0 if newest is None else checkpoint.verify(newest)["step"]
