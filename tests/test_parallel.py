"""Runs whose processes share one model: what they write is what a run of one process writes."""

import json
import runpy
import shutil
from dataclasses import replace

import pytest
import torch
from launching import run_together
from support import MODEL, ROOT, TINY, records, result
from torch import nn
from torch._dynamo.utils import counters

from sophia_train import checkpoint, distributed, parallel
from sophia_train.models import convert
from sophia_train.models.gpt2 import GPT2

LENGTH = ["batch_size=8", "micro_batch_size=2", "sample_interval=3", "sample_tokens=12", "max_steps=6"]


@pytest.fixture(scope="module")
def launch(runs, token_files):
    def run(processes, *overrides, **options):
        arguments = [*TINY, *LENGTH, f"data.path={token_files}", *overrides]
        if {"optimizer=adamw", "optimizer=schedule_free"} & set(overrides):
            arguments.remove("hessian.interval=2")
        return run_together(runs, processes, *arguments, **options)

    return run


@pytest.fixture(scope="module")
def alone(launch, tmp_path_factory):
    """The folder of the run on one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert [each.code for each in launch(1, f"run_dir={folder}", "optimizer=sophia_g")] == [0]
    return folder


def close(found, expected, path=""):
    assert found.keys() == expected.keys(), path
    for key, value in expected.items():
        if isinstance(value, float):
            assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-6), (path, key)
        else:
            assert found[key] == value, (path, key)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel=fsdp"],
        ["parallel=hsdp", "shard_processes=2"],
        ["parallel=fsdp", "activation_checkpointing=blocks", "save_in_background=true"],
        ["parallel=ddp", "save_in_background=true"],
    ],
    ids=" ".join,
)
def test_on_four_processes_it_is_the_same_run(overrides, launch, alone, tmp_path):
    folder = tmp_path / "run"
    ended = launch(4, f"run_dir={folder}", "optimizer=sophia_g", *overrides)
    assert [each.code for each in ended] == [0] * 4, ended
    assert [each.err for each in ended[1:]] == [""] * 3
    for found, expected in zip(records(folder), records(alone), strict=True):
        close(found, expected, expected["step"])
    found, expected = result(folder), result(alone)
    assert found["state"] == expected["state"] and found["temporary"] == []
    assert found["samples"].keys() == expected["samples"].keys()
    parts = 2 if "parallel=hsdp" in overrides else 4
    names = [
        f"{k}-{n:05d}-of-{parts:05d}.safetensors" for k in ("model", "optimizer") for n in range(1, parts + 1)
    ]
    assert sorted(found["files"]) == sorted(names)
    ours, theirs = (checkpoint.load_weights(each)[0] for each in (folder, alone))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def sharded(launch, tmp_path_factory):
    """A finished run on four processes that shared its model."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    ended = launch(4, f"run_dir={folder}", "parallel=fsdp", "optimizer=adamw")
    assert [each.code for each in ended] == [0] * 4, ended
    return folder


def test_sharded_weights_go_out_as_one_folder(sharded, tmp_path, capsys):
    export = runpy.run_path(str(ROOT / "scripts" / "export_hf.py"))["main"]
    assert export([str(sharded), "--out", str(tmp_path / "out")]) == 0
    weights = checkpoint.load_weights(sharded)[0]
    exported = convert.load_folder(tmp_path / "out")[1]
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)


def test_sharded_weights_are_started_from(sharded, launch, tmp_path):
    ended = launch(1, f"run_dir={tmp_path / 'run'}", f"init_from={sharded}", "optimizer=adamw", "max_steps=3")
    assert ended[0].code == 0, ended
    first = records(tmp_path / "run")[0]
    assert first["val/loss"] == pytest.approx(records(sharded)[-1]["val/loss"], rel=1e-5)


@pytest.mark.parametrize("victim", ["model-00002-of-00004", "optimizer-00004-of-00004"])
def test_a_damaged_part_is_refused_by_all(victim, sharded, launch, tmp_path):
    shutil.copytree(sharded, tmp_path / "run")
    path = checkpoint.latest(tmp_path / "run" / "checkpoints") / f"{victim}.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    ended = launch(4, f"run_dir={tmp_path / 'run'}", "parallel=fsdp", "optimizer=adamw")
    assert [each.code for each in ended] == [65] * 4, ended
    assert victim in ended[0].errors[0] and "sha256" in ended[0].errors[0]


def test_a_disk_that_is_full_for_one_ends_all_and_the_last_checkpoint_stays(launch, tmp_path):
    folder = tmp_path / "run"
    arguments = [f"run_dir={folder}", "parallel=fsdp", "optimizer=adamw"]
    assert [each.code for each in launch(4, *arguments, "stop_at_step=2")] == [75] * 4
    ended = launch(4, *arguments, hooks=4 * [[["fill_disk", "model-00003"]]])
    assert [each.code for each in ended] == [74] * 4, ended
    assert "No space left" in ended[0].errors[0]
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest.name == "step_00000002" and checkpoint.verify(newest)["step"] == 2
    assert json.loads((folder / "status.json").read_text())["code"] == 74
    assert [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert [each.code for each in launch(4, *arguments)] == [0] * 4


def test_gradients_are_sent_in_bf16(launch, alone, tmp_path):
    folder = tmp_path / "run"
    overrides = ["optimizer=sophia_g", "gradient_type=bf16"]
    assert [each.code for each in launch(2, f"run_dir={folder}", *overrides, "parallel=fsdp")] == [0, 0]
    found, expected = records(folder), records(alone)
    assert found[1]["optim/grad_norm"] != expected[1]["optim/grad_norm"]
    assert found[1]["optim/grad_norm"] == pytest.approx(expected[1]["optim/grad_norm"], rel=0.01)
    assert found[-1]["val/loss"] == pytest.approx(expected[-1]["val/loss"], rel=0.01)
    refused = launch(2, f"run_dir={tmp_path / 'ddp'}", *overrides, "parallel=ddp")
    assert [each.code for each in refused] == [64, 64] and "gradient_type=bf16" in refused[0].errors[0]


def test_strict_runs_end_in_the_same_bits_on_any_number_of_processes(launch, tmp_path):
    digests = set()
    for processes in (1, 2, 4):
        folder = tmp_path / str(processes)
        overrides = ["optimizer=sophia_g", "strict=true", "micro_batch_size=1"]
        assert [each.code for each in launch(processes, f"run_dir={folder}", *overrides)] == [0] * processes
        weights = checkpoint.load_weights(folder)[0]
        digests.add(b"".join(bytes(weights[name].flatten().view(torch.uint8)) for name in sorted(weights)))
    assert len(digests) == 1


def test_weights_that_are_kept_for_evaluation_are_sharded_too(launch, tmp_path):
    pytest.importorskip("pytorch_optimizer")
    metrics = []
    for processes, mode in ((1, "ddp"), (2, "fsdp")):
        folder = tmp_path / mode
        overrides = ["optimizer=schedule_free", f"parallel={mode}"]
        assert [each.code for each in launch(processes, f"run_dir={folder}", *overrides)] == [0] * processes
        metrics.append(records(folder))
    for found, expected in zip(*reversed(metrics), strict=True):
        close(found, expected, expected["step"])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which Dynamo reads and hides
@pytest.mark.parametrize("own_scales", [False, True])
def test_every_block_is_compiled_and_the_same_code_serves_for_equal_ones(own_scales, monkeypatch):
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: plain(module, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = GPT2(replace(MODEL, n_layer=10, scale_attn_by_inverse_layer_idx=own_scales))
    words = torch.randint(0, MODEL.vocab_size, (2, MODEL.block_size))
    expected = model(words, words)
    with torch._dynamo.config.patch(recompile_limit=8):
        prepared, _ = parallel.prepare(model, distributed.start("fp32", 1), "ddp", compiled="blocks")
        found = prepared(words, words)
        with torch.no_grad():
            prepared(words, words)
    assert counters["frames"]["ok"] == counters["frames"]["total"] == (20 if own_scales else 2)
    torch.testing.assert_close(found, expected)
