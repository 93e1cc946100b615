"""The same global batch and seed give the same numbers on 1, 2 and 4 processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "worker_invariance.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of 1 process x 4 micro-batches, 2 x 2 and 4 x 1, by number of processes."""
    from support import text

    found = {}
    for processes in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"processes_{processes}")
        text(folder)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        run = subprocess.run(
            [*torchrun, str(processes), str(WORKER), str(folder), "2"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        found[processes] = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    return found


def relative_error(name, tensor, expected):
    """Error against the norm; without the biases of keys, whose gradients are nothing but noise."""
    if name.endswith("c_attn.bias"):
        third = expected.numel() // 3
        queries_and_values = [*range(third), *range(2 * third, 3 * third)]
        tensor, expected = tensor[queries_and_values], expected[queries_and_values]
    return ((tensor - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", ["groups_1", "groups_4"])
def test_loss_gradient_and_hessian(results, processes, case):
    one, many = results[1][case], results[processes][case]
    assert one.keys() == many.keys()
    for name, expected in one.items():
        assert relative_error(name, many[name], expected) < 1e-5, name


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", ["hutchinson", "empirical_fisher", "gradient_magnitude"])
def test_hessian_of_the_other_estimators(results, processes, case):
    one, many = results[1][case], results[processes][case]
    assert one.keys() == many.keys()
    for name, expected in one.items():
        assert expected.any() and relative_error(name, many[name], expected) < 1e-10, name


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("optimizer", ["sophia", "adamw"])
def test_weights_after_twenty_steps(results, processes, optimizer):
    one, many = results[1][optimizer], results[processes][optimizer]
    for name, expected in one.items():
        if name.startswith("weight/"):
            assert relative_error(name, many[name], expected) < 1e-8, name
    torch.testing.assert_close(many["validation"], one["validation"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batches_are_identical(results, processes):
    assert torch.equal(results[processes]["sophia"]["batches"], results[1]["sophia"]["batches"])
