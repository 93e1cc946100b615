"""Run as a program: forks a child for each run asked for, so that only the first import takes its time.

Reads requests from stdin, one JSON object a line, and answers each on stdout:
{"start": arguments, "cwd", "environment", "hooks", "output", "timeout"} -> {"pid"}, {"wait": pid} -> {"code"}
A run is `launch.run` with the real `train`, after its hooks: names of functions below, with arguments.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401  # and more that a run would import, each time for itself
import PIL.PngImagePlugin  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

import sophia_train.trainer
from sophia_train import distributed, durable, launch
from sophia_train.data.loader import Loader
from sophia_train.models.gpt2 import GPT2
from sophia_train.train import train


def at_step(step: int, action: Callable[[], None]) -> None:
    """Do something when `step` steps are completed and the next one begins."""
    original = Loader.batch

    def batch(self: Loader, number: int) -> Any:
        if number == step:
            action()
        return original(self, number)

    Loader.batch = batch


def send_signal(step: int, name: str) -> None:
    at_step(step, lambda: signal.raise_signal(signal.Signals[name]))


def send_signal_inside_a_save(name: str) -> None:
    nothing = durable.before

    def before(operation: str, path: Path) -> None:
        if path.name == "optimizer.safetensors":
            durable.before = nothing
            signal.raise_signal(signal.Signals[name])

    durable.before = before


def pause(step: int, ready: str, go: str) -> None:
    """Make the file `ready`, and wait until there is a file `go`."""

    def wait() -> None:
        Path(ready).touch()
        while not Path(go).exists():
            time.sleep(0.01)

    at_step(step, wait)


def spoil_gradient(steps: list[int], value: str) -> None:
    """Put one value into one gradient of the steps that follow so many completed ones."""
    original = sophia_train.trainer.accumulate_gradients

    for step in steps:

        def spoil() -> None:
            def accumulate(model: Any, *arguments: Any, **keywords: Any) -> Any:
                loss = original(model, *arguments, **keywords)
                list(model.parameters())[-1].grad.view(-1)[3] = float(value)
                sophia_train.trainer.accumulate_gradients = original
                return loss

            sophia_train.trainer.accumulate_gradients = accumulate

        at_step(step, spoil)


def run_out_of_memory(step: int) -> None:
    """Let every forward pass fail, as on a full device, once `step` steps are completed."""

    def forward(*arguments: Any, **keywords: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    at_step(step, lambda: setattr(GPT2, "forward", forward))


def fill_disk(name: str) -> None:
    """Let every write to a file whose name begins so meet a full disk."""

    def before(operation: str, path: Path) -> None:
        if operation == "write" and path.name.startswith(name):
            raise OSError(28, "No space left on device", str(path))

    durable.before = before


def fail(step: int, kind: str, seconds: float = 0.0) -> None:
    """Raise an error of this process, some time later than others might."""
    errors = {"disk": OSError(5, "Input/output error", "train.bin"), "defect": ZeroDivisionError("by zero")}

    def fail_now() -> None:
        time.sleep(seconds)
        raise errors[kind]

    at_step(step, fail_now)


def ask_nobody() -> None:
    """Let no process that fails wait for others that may."""
    distributed.COMMON_FAILURE_SECONDS = 0.0


def look_at(pids_file: str, state_file: str) -> None:
    """Note in which state the second process is one second into the last of this one's writing."""

    def before(operation: str, path: Path) -> None:
        if path.name == "status.json" and operation == "rename":
            time.sleep(1)  # more than the other one would take to leave
            stat = Path("/proc", Path(pids_file).read_text().split()[1], "stat")
            Path(state_file).write_text(stat.read_text().rpartition(")")[2].split()[0])

    durable.before = before


def hide_package(name: str) -> None:
    """Let `import name` fail as if it were not installed."""
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]
    sys.modules[name] = None


HOOKS = {
    function.__name__: function
    for function in (
        send_signal,
        send_signal_inside_a_save,
        pause,
        spoil_gradient,
        run_out_of_memory,
        fill_disk,
        fail,
        ask_nobody,
        look_at,
        hide_package,
    )
}


def child(request: dict[str, Any]) -> int:
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{request['output']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.alarm(request["timeout"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
    sys.argv[1:] = request["start"]
    for name, *arguments in request["hooks"]:
        HOOKS[name](*arguments)
    return launch.run(request["start"], train)


def start(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = child(request)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = {"pid": start(request)}
        else:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
