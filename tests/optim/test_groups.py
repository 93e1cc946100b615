"""Whose parameters are whose."""

import pytest
import torch

from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.optim.groups import choose, decay_groups


@pytest.fixture
def model():
    with torch.device("meta"):
        return GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=10, bias=True))


def test_every_parameter_is_somebodys_once(model):
    shares = choose(model, {"a": ["embeddings"], "b": ["norms", "*.h.1.mlp.*"]})
    assert sorted(sum(shares.values(), [])) == sorted(name for name, _ in model.named_parameters())
    assert shares["a"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert "transformer.h.1.mlp.c_fc.bias" in shares["b"] and "transformer.h.0.ln_1.weight" in shares["b"]


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        ("embeddings", lambda name, p: "wte" in name or "wpe" in name),
        ("head", lambda name, p: "wte" in name),  # tied
        ("matrices", lambda name, p: p.ndim == 2 and ".h." in name),
        ("norms", lambda name, p: ".ln_" in name and name.endswith("weight")),
        ("biases", lambda name, p: name.endswith("bias")),
        ("vectors", lambda name, p: p.ndim == 1),
    ],
)
def test_kinds_are_what_their_names_say(model, kind, fits):
    expected = [name for name, p in model.named_parameters() if fits(name, p)]
    assert choose(model, {"x": [kind]})["x"] == expected


def test_frozen_parameters_are_nobodys(model):
    model.transformer.wpe.weight.requires_grad_(False)
    assert choose(model, {"x": ["embeddings"]})["x"] == ["transformer.wte.weight"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"x": ["embedings"]}, "embedings is no parameter of the model; kinds are embeddings, head"),
        ({"x": ["*.nowhere"]}, "nowhere is no parameter"),
        ({"x": ["embeddings"], "y": ["head"]}, "head takes transformer.wte.weight, which x has already"),
    ],
)
def test_what_cannot_be_is_refused(model, wanted, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        choose(model, wanted)


def test_matrices_of_linear_maps_are_decayed_and_nothing_else(model):
    decayed, rest = decay_groups(model)
    kinds = choose(model, {"matrices": ["matrices"]})
    named = dict(model.named_parameters())
    assert [id(p) for p in decayed["params"]] == [id(named[name]) for name in kinds["matrices"]]
    assert [id(p) for p in rest["params"]] == [id(named[name]) for name in kinds[""]]
    assert "weight_decay" not in decayed and rest["weight_decay"] == 0.0


def test_there_are_no_empty_groups(model):
    only = [name for name, p in model.named_parameters() if p.ndim == 1]
    groups = decay_groups(model, only)
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0.0
