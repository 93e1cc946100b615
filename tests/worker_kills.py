"""Run as a program: tiny runs in forked children, killed at chosen durable operations, and continued.

Forks of one process that has imported everything: a fresh interpreter for each kill would take minutes.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  # and more that a run would import, each time for itself
import PIL.PngImagePlugin  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.distributed.fsdp  # noqa: F401

from sophia_train import durable, launch
from sophia_train.train import train

TINY = (
    "data=token_files data.tokenizer=bytes model=gpt2_nano model.n_layer=1 model.n_head=2 model.n_embd=16 "
    "model.block_size=8 max_steps=6 batch_size=4 micro_batch_size=2 schedule.warmup_steps=2 log_interval=1 "
    "eval_interval=3 save_interval=2 keep_checkpoints=2 tracker=jsonl optimizer=sophia_g hessian.interval=2 "
    "eval_tokens=64 resume=auto"
).split()


def in_child(work: Callable[[], int]) -> int:
    """Exit code of `work` in a forked child; minus the signal's number if one killed it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(folder: Path, data: Path, at_operation: Callable[[int, str], None] | None = None) -> int:
    """One invocation of the run in `folder`; `at_operation` is called before each durable operation."""

    def work() -> int:
        count = 0

        def before(operation: str, path: Path) -> None:
            nonlocal count
            count += 1
            at_operation(count, operation)

        if at_operation is not None:
            durable.before = before
        return launch.run([*TINY, f"data.path={data}", f"run_dir={folder}"], train)

    return in_child(work)


def outcome(folder: Path) -> dict:
    """What a finished run left: digests of its last checkpoint, state, metrics; clock readings left out."""
    newest = max((folder / "checkpoints").iterdir())
    manifest = json.loads((newest / "manifest.json").read_text())
    clocks = ("seconds", "perf/")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in lines]
    state = {k: v for k, v in manifest["state"].items() if k != "seconds"}
    leftovers = [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")]
    return {
        "checkpoint": newest.name,
        "files": manifest["files"],
        "state": state,
        "hessian": manifest["hessian"],
        "metrics": metrics,
        "checkpoints": sorted(p.name for p in (folder / "checkpoints").glob("step_*")),
        "leftovers": leftovers,
        "status": json.loads((folder / "status.json").read_text())["code"],
    }


def kill_everywhere(folder: Path, data: Path, stride: int) -> dict:
    """Kill the run at every `stride`-th durable operation, each time continue it to its end."""
    log = folder / "operations"
    undisturbed = folder / "undisturbed"

    def note(count: int, operation: str) -> None:
        with log.open("a") as file:
            file.write(f"{count} {operation}\n")

    assert run(undisturbed, data, note) == 0
    expected, operations = outcome(undisturbed), len(log.read_text().splitlines())
    differing = []
    for victim in range(1, operations + 1, stride):

        def kill(count: int, operation: str, victim: int = victim) -> None:
            if count == victim:
                os.kill(os.getpid(), signal.SIGKILL)

        killed = folder / f"killed_{victim}"
        first = run(killed, data, kill)
        second = run(killed, data)
        if (first, second) != (-signal.SIGKILL, 0) or outcome(killed) != expected:
            differing.append([victim, first, second])
    return {"operations": operations, "differing": differing}


def fail_everywhere(folder: Path, data: Path, stride: int) -> dict:
    """Let every `stride`-th durable operation meet a full disk, each time continue the run to its end."""
    undisturbed, wrong, count_file = folder / "undisturbed", [], folder / "count"
    assert run(undisturbed, data, lambda count, _: count_file.write_text(str(count)) and None) == 0
    expected, operations = outcome(undisturbed), int(count_file.read_text())
    for victim in range(1, operations + 1, stride):

        def fail(count: int, operation: str, victim: int = victim) -> None:
            if count == victim:
                raise OSError(28, "No space left on device")

        failed = folder / f"failed_{victim}"
        first = run(failed, data, fail)
        second = run(failed, data)
        if first not in (0, 74) or second != 0 or outcome(failed) != expected:
            wrong.append([victim, first, second])
    return {"operations": operations, "differing": wrong}


if __name__ == "__main__":
    what, folder, data, stride = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    report = {"kill": kill_everywhere, "fail": fail_everywhere}[what](folder, data, stride)
    (folder / "report.json").write_text(json.dumps(report))
