"""Products in float8: the same parameters, gradients up to its rounding, and what it refuses.

On a CPU torchao emulates the rounding; `test_gpu.py` has the products themselves.
"""

import builtins

import pytest
import torch

from sophia_train.errors import ConfigError, UnavailableError
from sophia_train.models.float8 import use_float8
from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.models.losses import fused_cross_entropy

CPU = torch.device("cpu")
CONFIG = {"n_layer": 2, "n_head": 2, "block_size": 32, "vocab_size": 100}


def make(n_embd=64):
    model = GPT2(GPT2Config(n_embd=n_embd, **CONFIG))
    model.initialize(0)
    return model


def gradient(model):
    ids = torch.randint(0, 100, (4, 33), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids[:, :-1], ids[:, 1:], loss_fn=fused_cross_entropy)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_are_those_of_bf16_up_to_rounding():
    pytest.importorskip("torchao")
    model = make()
    loss, plain = gradient(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    use_float8(model, CPU)
    assert list(model.state_dict()) == list(state)
    rough_loss, rough = gradient(model)
    assert rough_loss == pytest.approx(loss, rel=1e-3) and rough_loss != loss
    for name, expected in plain.items():
        error = ((rough[name] - expected).norm() / expected.norm()).item()
        assert error < 0.2, name
    model.load_state_dict(state)  # of any precision
    assert gradient(model)[0] == rough_loss


def test_a_width_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"model.n_embd=40.*precision=bf16"):
        use_float8(make(40), CPU)


def test_without_torchao_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_torchao(name, *rest):
        if name.startswith("torchao"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_torchao)
    with pytest.raises(UnavailableError, match="pip install"):
        use_float8(make(), CPU)
