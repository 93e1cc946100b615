"""A run goes on with other processes, and another way to share the model, as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sophia_train import checkpoint

WORKER = Path(__file__).parent / "worker_elastic.py"


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(
        [*command, str(processes), str(WORKER), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def tensors(path):
    manifest = checkpoint.read_manifest(path)
    kinds = {kind: checkpoint.tensors_of(path, manifest, kind) for kind in ("model", "optimizer")}
    return {f"{kind} {name}": saved[:] for kind, found in kinds.items() for name, saved in found.items()}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder of a run over a chain of launches, and that of one launch."""
    folder, alone = tmp_path_factory.mktemp("chain"), tmp_path_factory.mktemp("alone")
    links = [(1, "ddp", 2), (4, "fsdp", 3), (2, "ddp", 5), (4, "hsdp", 6), (2, "fsdp", 7), (1, "ddp", "end")]
    for processes, mode, stop in links:
        torchrun(processes, "go on", str(folder), mode, str(stop), "float64")
    torchrun(1, "go on", str(alone), "ddp", "end", "float64")
    return folder, alone


def test_over_a_chain_the_batches_are_the_same_in_the_same_order(chain):
    found, expected = ((folder / "run" / "batches.jsonl").read_text() for folder in chain)
    assert [json.loads(line)[0] for line in found.splitlines()] == list(range(8))
    assert found == expected


def test_over_a_chain_the_end_is_the_same(chain):
    found, expected = (tensors(checkpoint.latest(folder / "run" / "checkpoints")) for folder in chain)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


def test_a_state_moves_to_other_processes_bit_by_bit(chain):
    """What a launch restored and saved at once, on its own processes, is what it had been given."""
    again = sorted(chain[0].glob("again_*/step_*"))
    kept = {path.name: path for path in (chain[0] / "run" / "checkpoints").glob("step_*")}
    compared = [(path, kept[path.name]) for path in again if path.name in kept]
    assert len(again) == 5 and len(compared) >= 2
    for path, source in compared:
        ours, theirs = tensors(path), tensors(source)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    files = {path.name: len(list(path.glob("model*.safetensors"))) for path in again}
    assert sorted(files.values()) == [1, 2, 2, 2, 4]


@pytest.mark.parametrize(
    ("stride", "modes"),
    [(3, ["ddp", "fsdp"]), pytest.param(1, ["ddp", "fsdp", "hsdp"], marks=pytest.mark.slow)],
    ids=["after some steps", "after any step"],
)
def test_four_processes_that_are_broken_off_go_on_bitwise(stride, modes, tmp_path):
    torchrun(4, "breaks", str(tmp_path), str(stride), *modes)
    assert json.loads((tmp_path / "wrong.json").read_text()) == []
