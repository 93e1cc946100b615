"""A run killed, or out of disk, at any durable operation and started again ends like an undisturbed one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).parent / "worker_kills.py"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, 257, 3000).astype("<u2")
    ids[:2000].tofile(folder / "train.bin")
    ids[2000:].tofile(folder / "val.bin")
    return folder


def work(what, folder, data, stride):
    command = [sys.executable, str(WORKER), what, str(folder), str(data), str(stride)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    "stride", [11, pytest.param(1, marks=pytest.mark.slow)], ids=["some operations", "every operation"]
)
@pytest.mark.parametrize("what", ["kill", "fail"])
def test_a_disturbed_run_ends_like_an_undisturbed_one(what, stride, tmp_path, data):
    report = work(what, tmp_path, data, stride)
    assert report["operations"] > 30
    assert report["differing"] == []
