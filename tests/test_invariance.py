"""The same batch and seed give the same numbers on 1, 2 and 4 processes, however they share a model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "worker_invariance.py"
MODES = {1: ["ddp"], 2: ["ddp", "fsdp"], 4: ["ddp", "fsdp", "hsdp"]}  # alone there is nobody to share with
SEVERAL = [(processes, mode) for processes, modes in MODES.items() if processes > 1 for mode in modes]
WITH_COPIES = [(processes, mode) for processes, mode in SEVERAL if mode == "ddp"]


def cases(on_all, with_copies):
    """Cases on several processes; some need whole gradients or parameters on each of them."""
    where = {case: SEVERAL for case in on_all} | {case: WITH_COPIES for case in with_copies}
    return [(case, *place) for case, places in where.items() for place in places]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of 1 process x 4 micro-batches, 2 x 2 and 4 x 1, by number of processes, mode and case."""
    from support import text

    found = {}
    for processes, modes in MODES.items():
        folder = tmp_path_factory.mktemp(f"processes_{processes}")
        text(folder)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        run = subprocess.run(
            [*torchrun, str(processes), str(WORKER), str(folder), "2", *modes],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        for path in folder.glob("*/*.safetensors"):
            found[processes, path.parent.name, path.stem] = load_file(path)
    return found


def relative_error(name, tensor, expected):
    """Error against the norm; without the biases of keys, whose gradients are nothing but noise."""
    if name.endswith("c_attn.bias"):
        third = expected.numel() // 3
        queries_and_values = [*range(third), *range(2 * third, 3 * third)]
        tensor, expected = tensor[queries_and_values], expected[queries_and_values]
    return ((tensor - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("case", "processes", "mode"), cases(["groups_1"], ["groups_4"]))
def test_loss_gradient_hessian_and_what_is_logged_of_them(results, processes, mode, case):
    one, many = results[1, "ddp", case], results[processes, mode, case]
    assert one.keys() == many.keys()
    for name, expected in one.items():
        if name.startswith("optim/") and expected == 0:
            assert many[name] == 0, name
        elif name == "optim/unclipped_fraction":
            assert abs(many[name] - expected) < 1e-3, name  # a coordinate at the edge may fall on either side
        else:
            assert relative_error(name, many[name], expected) < 1e-5, name


@pytest.mark.parametrize(
    ("case", "processes", "mode"), cases(["empirical_fisher", "gradient_magnitude"], ["hutchinson"])
)
def test_hessian_of_the_other_estimators(results, processes, mode, case):
    one, many = results[1, "ddp", case], results[processes, mode, case]
    assert one.keys() == many.keys()
    for name, expected in one.items():
        assert expected.any() and relative_error(name, many[name], expected) < 1e-10, name


@pytest.mark.parametrize(("processes", "mode"), SEVERAL)
@pytest.mark.parametrize("case", ["sophia", "adamw", "micro_batches"])
def test_weights_after_twenty_steps(results, processes, mode, case):
    one, many = results[1, "ddp", case], results[processes, mode, case]
    for name, expected in one.items():
        if name.startswith("weight/"):
            assert relative_error(name, many[name], expected) < 1e-8, name
    torch.testing.assert_close(many["validation"], one["validation"], rtol=1e-9, atol=0)


@pytest.mark.parametrize(("processes", "mode"), SEVERAL)
def test_global_batches_are_identical(results, processes, mode):
    assert torch.equal(results[processes, mode, "sophia"]["batches"], results[1, "ddp", "sophia"]["batches"])


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize(("processes", "mode"), [(2, "fsdp"), (4, "fsdp"), (4, "hsdp")])
def test_a_step_gathers_twice_and_reduces_once(results, processes, mode, micro_batch_size):
    found = results[processes, mode, f"exchanges_{micro_batch_size}"]
    units = 3  # two blocks and the rest
    assert (found["gather"], found["reduce"]) == (2 * units, units)


class TestStrict:
    @pytest.mark.parametrize("processes", [2, 4])
    @pytest.mark.parametrize("case", ["strict_sophia", "strict_adamw", "strict_odd"])
    def test_weights_are_the_same_bits(self, results, processes, case):
        one, many = results[1, "ddp", case], results[processes, "ddp", case]
        weights = [name for name in one if name.startswith("weight/")]
        assert weights and all(torch.equal(many[name], one[name]) for name in weights)

    @pytest.mark.parametrize("optimizer", ["sophia", "adamw"])
    def test_and_those_of_the_ordinary_sums_up_to_rounding(self, results, optimizer):
        strict, exact = results[1, "ddp", f"strict_{optimizer}"], results[1, "ddp", optimizer]
        for name, expected in exact.items():
            if name.startswith("weight/"):
                assert relative_error(name, strict[name].double(), expected) < 1e-2, name
