"""scripts/slurm/train.sbatch trains on several machines, and its job is queued again until the run has ended.

Stand-ins for commands of Slurm start the tasks of all "machines" here; torchrun and the trainers are real.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import Launched, count_records, newest_step, run_together
from support import ROOT, TINY, result

SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"

COMMANDS = {
    # starts one task a machine; if one fails, all processes of the others are killed
    "srun": """\
import os, psutil, subprocess, sys, time
assert sys.argv[1] == "--kill-on-bad-exit=1"
tasks = []
for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    environment = {**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "STEP": "0"}
    tasks.append(subprocess.Popen(sys.argv[2:], env=environment, start_new_session=True))
while not any(codes := [task.poll() for task in tasks]) and None in codes:
    time.sleep(0.05)
for task in tasks:
    if task.poll() is None:
        for process in [*psutil.Process(task.pid).children(recursive=True), psutil.Process(task.pid)]:
            process.kill()
        task.wait()
sys.exit(max(code for code in codes if code is not None))
""",
    "scontrol": """\
import os, sys
if sys.argv[1] == "show":
    assert sys.argv[2:] == ["hostnames", "node[1-2]"]
    print("localhost\\nlocalhost")
else:
    assert sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]]
    open(os.environ["REQUEUED"], "w")
""",
}


@pytest.fixture
def job(tmp_path):
    """Starts the job of the script once, as Slurm does each time it comes to its turn."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, content in COMMANDS.items():
        (commands / name).write_text(f"#!{sys.executable}\n{content}")
    (commands / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for path in commands.iterdir():
        path.chmod(0o755)
    started = []

    def job(*arguments):
        environment = {
            "PATH": os.pathsep.join([str(commands), os.environ["PATH"]]),
            "REQUEUED": str(tmp_path / f"requeued_{len(started)}"),
            "SLURM_JOB_NAME": "long",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_GPUS_ON_NODE": "2",
        }
        output = tmp_path / f"output_{len(started)}"
        started.append(Launched(["bash", SCRIPT, *arguments], output, cwd=tmp_path, **environment))
        return started[-1], Path(environment["REQUEUED"])

    yield job
    for launched in started:
        launched.kill()


def warn(launched):
    """Send what `--signal=USR1@120` does: to all processes of the step, not to the script."""
    for pid in launched.alive("STEP"):
        os.kill(pid, signal.SIGUSR1)


@pytest.mark.slow
def test_the_job_is_queued_again_until_the_run_has_ended(job, runs, token_files, tmp_path):
    arguments = [*TINY, "max_steps=150", "batch_size=8", "save_interval=50", f"data.path={token_files}"]
    folder = tmp_path / "runs" / "long"
    launched, requeued = job(*arguments)
    launched.wait_until(lambda: count_records(folder) > 10)
    warn(launched)
    assert launched.wait_for_nobody() != 0
    step = newest_step(folder)
    assert requeued.exists() and 10 <= step < 150 and step == count_records(folder) - 1
    assert json.loads((folder / "environment.json").read_text())["processes"] == 4
    launched, requeued = job(*arguments)
    assert launched.wait_for_nobody() == 0, launched.output.read_text()
    assert not requeued.exists()
    ended = run_together(runs, 4, *arguments, f"run_dir={tmp_path / 'whole'}")
    assert [each.code for each in ended] == [0, 0, 0, 0]
    assert result(folder) == result(tmp_path / "whole")


def test_a_job_that_fails_is_not_queued_again(job, token_files, tmp_path):
    """Not for what the run said another time, either."""
    folder = tmp_path / "runs" / "long"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"code": 75, "reason": "", "step": 3}')
    launched, requeued = job(*TINY, f"data.path={token_files}", "batch_size=9")
    assert launched.wait_for_nobody() != 0
    assert len(launched.errors) == 1 and "batch_size=9" in launched.errors[0]
    assert not requeued.exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
