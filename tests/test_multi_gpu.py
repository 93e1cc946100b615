"""Runs on two GPUs, through NCCL, are the run on one."""

import os
import signal
import subprocess
import sys

import pytest
from launching import TORCHRUN, Launched, count_records, newest_step
from support import ENVIRONMENT, records

pytestmark = pytest.mark.multi_gpu

MODEL = "model=gpt2_nano model.n_layer=3 model.n_head=2 model.n_embd=128 model.block_size=64"
RUN = (
    f"data=token_files data.tokenizer=bytes {MODEL} max_steps=20 batch_size=16 micro_batch_size=4 "
    "schedule.warmup_steps=2 log_interval=1 eval_interval=10 save_interval=10 eval_tokens=640 tracker=jsonl"
).split()
EXACT = ["precision=fp32", "compile=false"]
SOPHIA = ["optimizer=sophia_g", "hessian.interval=4", "hessian.batch_size=8"]


@pytest.fixture(scope="module")
def train(token_files):
    """Trains on some GPUs, as a user would: `train(processes, folder, *overrides)`; returns the metrics."""

    def run(processes, folder, *overrides, code=0):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        arguments = [*RUN, f"data.path={token_files}", f"run_dir={folder}", *overrides]
        done = subprocess.run(
            [*torchrun, str(processes), "-m", "sophia_train", *arguments],
            env={**os.environ, **ENVIRONMENT, "ACCELERATE_USE_CPU": "false"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode == 0) == (code == 0), done.stderr[-3000:]
        return records(folder)

    return run


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    return {
        name: train(1, tmp_path_factory.mktemp(name), *EXACT, *overrides)
        for name, overrides in {"adamw": ["optimizer=adamw"], "sophia": SOPHIA}.items()
    }


def assert_close(found, expected, tolerance):
    keys = [key for key in expected[-1] if key.startswith(("train/", "val/", "optim/"))]
    assert len(found) == len(expected) and "optim/grad_norm" in keys
    for ours, theirs in zip(found, expected, strict=True):
        for key in set(keys) & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance, abs=tolerance), (ours["step"], key)


@pytest.mark.parametrize(
    ("mode", "name"), [("fsdp", "adamw"), ("fsdp", "sophia"), ("ddp", "sophia")], ids="-".join
)
def test_in_float32_the_metrics_are_those_of_one(mode, name, train, alone, tmp_path):
    overrides = ["optimizer=adamw"] if name == "adamw" else SOPHIA
    found = train(2, tmp_path, *EXACT, f"parallel={mode}", *overrides)
    assert_close(found, alone[name], 2e-3)


def test_compiled_in_bf16_with_all_that_saves_memory(train, alone, tmp_path):
    settings = ["precision=bf16", "compile=true", "activation_checkpointing=blocks", "gradient_type=bf16"]
    found = train(2, tmp_path, *settings, "parallel=fsdp", "save_in_background=true", *SOPHIA)
    ours, theirs = ([each["train/loss"] for each in metrics[1:]] for metrics in (found, alone["sophia"]))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_a_run_goes_on_with_another_number_and_another_mode(train, alone, tmp_path):
    train(2, tmp_path, *EXACT, *SOPHIA, "parallel=fsdp", "stop_at_step=7", code=75)
    train(2, tmp_path, *EXACT, *SOPHIA, "parallel=ddp", "stop_at_step=13", code=75)
    assert_close(train(1, tmp_path, *EXACT, *SOPHIA), alone["sophia"], 2e-3)


LONG = [*EXACT, *SOPHIA, "max_steps=100000", "save_interval=5"]
FAILS = """
import os
from sophia_train import launch, trainer
from sophia_train.errors import DataError
from sophia_train.train import train

step = trainer.Trainer.train_step

def failing(self, batch):
    if os.environ["RANK"] == "1" and self.state.step == 7:
        raise DataError("a shard is gone")
    return step(self, batch)

trainer.Trainer.train_step = failing
launch.launch(train)
"""


@pytest.fixture
def launched(token_files, tmp_path):
    """Starts a long run under torchrun: `launched(*program)`."""
    started = []

    def launch(*program):
        arguments = [*RUN, *LONG, f"data.path={token_files}", f"run_dir={tmp_path / 'run'}"]
        command = [*TORCHRUN[:-1], *program, *arguments]
        started.append(Launched(command, tmp_path / "output", ACCELERATE_USE_CPU="false"))
        return started[-1]

    yield launch
    for each in started:
        each.kill()


def test_one_process_is_killed(launched, train, tmp_path):
    """The other waits in NCCL, and torchrun ends it; the run goes on from its last checkpoint."""
    run = launched("-m", "sophia_train")
    run.wait_until(lambda: count_records(tmp_path / "run") > 10)
    os.kill(next(pid for pid, of in run.alive().items() if of == "1"), signal.SIGKILL)
    assert run.wait_for_nobody() != 0
    assert "Signal 9 (SIGKILL)" in run.output.read_text()
    saved = newest_step(tmp_path / "run")
    assert saved >= 5
    train(2, tmp_path / "run", *LONG, f"stop_at_step={saved + 3}", code=75)
    assert newest_step(tmp_path / "run") == saved + 3


def test_one_process_fails(launched, tmp_path):
    """It says why, the other is ended, and the last checkpoint is whole."""
    (tmp_path / "program.py").write_text(FAILS)
    run = launched(str(tmp_path / "program.py"))
    assert run.wait_for_nobody() != 0
    assert run.errors == ["error: process 1: a shard is gone"]
    assert newest_step(tmp_path / "run") == 5
