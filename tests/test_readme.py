"""The README's examples of other people's loops run as they are printed."""

import functools
import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README.partition("## In your own loop")[2], re.DOTALL)
WORDS, LENGTH, ROWS = 7, 6, 4


class Model(torch.nn.Module):
    """Word ids (B, T) to logits (B, T, V)."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(WORDS, 8)
        self.head = torch.nn.Linear(8, WORDS)

    def forward(self, ids):
        return self.head(self.embedding(ids))


@pytest.fixture
def names():
    """What an example takes for granted: a model, text with some order in it, and its sizes."""
    torch.manual_seed(0)
    text = (torch.arange(ROWS * (LENGTH + 1)) % WORDS).view(ROWS, LENGTH + 1)
    return {
        "model": Model(),
        "batches": [(text[:, :-1], text[:, 1:])] * 100,
        "batch_size": ROWS,
        "length": LENGTH,
        "device": "cpu",
        "torch": torch,
        "F": F,
    }


def loss(names):
    inputs, targets = names["batches"][0]
    return F.cross_entropy(names["model"](inputs).flatten(0, -2), targets.flatten()).item()


def test_there_are_four_and_none_is_long():
    assert len(BLOCKS) == 4
    assert all(len(block.strip().splitlines()) < 15 for block in BLOCKS)


def test_a_plain_loop(names):
    before = loss(names)
    exec(BLOCKS[0], names)
    assert loss(names) < before - 0.1


def test_attach_and_then_a_loss_scaler(names):
    exec(BLOCKS[0].partition("gnb =")[0], names)  # the imports
    before = loss(names)
    exec(BLOCKS[1], names)
    between = loss(names)
    exec(BLOCKS[2], names)
    assert loss(names) < between < before
    assert names["scaler"].get_scale() > 0


def test_transformers(names, transformers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": LENGTH, "vocab_size": WORDS}
    names["model"] = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, use_cache=False))
    ids = names["batches"][0][0][0].tolist()
    names["dataset"] = [{"input_ids": ids, "labels": ids}] * 16
    here = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    names["transformers"] = types.SimpleNamespace(
        Trainer=transformers.Trainer,
        TrainingArguments=functools.partial(transformers.TrainingArguments, **here),
    )
    exec(BLOCKS[0].partition("gnb =")[0], names)
    exec(BLOCKS[3].replace("max_steps=1000", "max_steps=12"), names)
    optimizer = names["trainer"].optimizer.optimizer
    assert names["trainer"].state.global_step == 12
    assert all((state["hessian"] > 0).any() for state in optimizer.state.values())
