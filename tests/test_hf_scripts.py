"""Exporting a run to a Hugging Face folder and importing one."""

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch

from sophia_train import checkpoint
from sophia_train.models import convert
from sophia_train.models.gpt2 import GPT2, GPT2Config

SCRIPTS = Path(__file__).parents[1] / "scripts"
CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=70, bias=True)


@pytest.fixture
def export_hf():
    return runpy.run_path(str(SCRIPTS / "export_hf.py"))["main"]


@pytest.fixture
def import_hf():
    return runpy.run_path(str(SCRIPTS / "import_hf.py"))["main"]


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints at steps 3 and 7, and the newest weights."""
    model = GPT2(CONFIG)
    for step in (3, 7):
        model.initialize(step)
        optimizer = torch.optim.AdamW(model.parameters())
        extra = {"config": {"model": dataclasses.asdict(CONFIG)}}
        checkpoint.save(tmp_path / "run" / "checkpoints", step, model, optimizer, extra)
    return tmp_path / "run", {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_run_goes_out_and_comes_back_bitwise(run, tmp_path, export_hf, import_hf, capsys):
    folder, weights = run
    out, back = tmp_path / "exported", tmp_path / "imported"
    assert export_hf([str(folder), "--out", str(out)]) == 0
    assert "step 7" in capsys.readouterr().out
    assert import_hf([str(out), "--out", str(back)]) == 0
    assert f"init_from={back} model.n_layer=2" in capsys.readouterr().out
    for path in (out, back):
        config, state = convert.load_folder(path)
        assert config == CONFIG
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[name], weights[name]) for name in weights)


def test_a_single_checkpoint_can_be_exported(run, tmp_path, export_hf):
    folder, weights = run
    older = folder / "checkpoints" / "step_00000003"
    assert export_hf([str(older), "--out", str(tmp_path / "exported")]) == 0
    state = convert.load_folder(tmp_path / "exported")[1]
    assert not torch.equal(state["transformer.wpe.weight"], weights["transformer.wpe.weight"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{run}"], 64, "--out"),
        (["{run}", "--out", "{new}", "--fast"], 64, "--fast"),
        (["{run}/nowhere", "--out", "{new}"], 66, "nowhere"),
        (["{run}", "--out", "{run}"], 73, "exists already"),
    ],
)
@pytest.mark.parametrize("script", ["export_hf", "import_hf"])
def test_mistakes_end_in_one_line(script, arguments, code, message, run, tmp_path, request, capsys):
    main = request.getfixturevalue(script)
    places = {"run": run[0], "new": tmp_path / "new"}
    assert main([argument.format(**places) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "new").exists()


def test_an_altered_checkpoint_is_not_exported(run, tmp_path, export_hf, capsys):
    weights = run[0] / "checkpoints" / "step_00000007" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert export_hf([str(run[0]), "--out", str(tmp_path / "exported")]) == 65
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
