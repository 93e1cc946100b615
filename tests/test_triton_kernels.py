"""The Triton kernels on the CPU, in Triton's interpreter; `test_gpu.py` has the same checks on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_kernels_equal_plain_torch_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton comes with a CUDA build of torch, or alone")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kernel_checks.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4
