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


def test_one_process_is_killed(token_files, train, tmp_path):
    """The other, which waits in NCCL for it, ends as well; the run goes on from its last checkpoint."""
    folder, long = tmp_path / "run", [*EXACT, *SOPHIA, "max_steps=100000", "save_interval=5"]
    command = [*TORCHRUN, "sophia_train", *RUN, *long, f"data.path={token_files}", f"run_dir={folder}"]
    launched = Launched(command, tmp_path / "output", ACCELERATE_USE_CPU="false")
    try:
        launched.wait_until(lambda: count_records(folder) > 10)
        os.kill(next(pid for pid, of in launched.alive().items() if of == "1"), signal.SIGKILL)
        assert launched.wait_for_nobody() != 0
    finally:
        launched.kill()
    assert len(launched.errors) == 1 and "gone" in launched.errors[0]
    saved = newest_step(folder)
    assert saved >= 5
    train(2, folder, *long, f"stop_at_step={saved + 3}", code=75)
    assert newest_step(folder) == saved + 3
