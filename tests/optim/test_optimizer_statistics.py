"""What is logged about the optimizer's state, against the definitions."""

import pytest
import torch

from sophia_train.optim import Sophia
from sophia_train.optim.mixed import MixedOptimizer
from sophia_train.optim.statistics import QUANTILES, hessian_statistics, layer_of, optimizer_statistics


@pytest.fixture
def stepped():
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.nn.Parameter(torch.randn(50, 20, generator=generator))
        for name in ("transformer.h.0.a.weight", "transformer.h.0.b.weight", "transformer.wte.weight")
    }
    optimizer = Sophia(params.values(), gamma=0.05)
    estimates = {p: torch.randn(50, 20, generator=generator) * 40 for p in params.values()}
    estimates[params["transformer.wte.weight"]][:10] = 0
    optimizer.update_hessian(estimates)
    for p in params.values():
        p.grad = torch.randn(50, 20, generator=generator) * 0.1
    optimizer.step()
    return optimizer, params


def test_fractions_norms_and_gamma(stepped):
    optimizer, params = stepped
    found = optimizer_statistics(optimizer)
    h = torch.cat([optimizer.state[p]["hessian"].flatten() for p in params.values()])
    m = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in params.values()])
    assert found["optim/hessian_negative_fraction"].item() == pytest.approx((h < 0).float().mean().item())
    assert found["optim/hessian_zero_fraction"].item() == pytest.approx(200 / 3000)
    assert found["optim/hessian_norm"].item() == pytest.approx(h.norm().item())
    assert found["optim/momentum_norm"].item() == pytest.approx(m.norm().item())
    assert found["optim/gamma"].item() == pytest.approx(0.05)


def test_layers_and_quantiles(stepped):
    optimizer, params = stepped
    found = hessian_statistics(optimizer, {p: name for name, p in params.items()})
    h = torch.cat([optimizer.state[p]["hessian"].flatten() for p in params.values()])
    for level in QUANTILES:
        name = f"hessian/quantile_{level * 100:02.0f}"
        assert found[name].item() == pytest.approx(h.quantile(level).item())
    layers = {
        "h.0": ["transformer.h.0.a.weight", "transformer.h.0.b.weight"],
        "wte": ["transformer.wte.weight"],
    }
    total = 0.0
    for layer, names in layers.items():
        members = [params[name] for name in names]
        share = found[f"hessian/unclipped_fraction/{layer}"]
        assert share == optimizer.unclipped_fraction(members)
        total += share.item() * sum(p.numel() for p in members)
    assert total / 3000 == pytest.approx(optimizer.unclipped_fraction().item())


def test_an_optimizer_without_a_hessian_has_none():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([param])
    param.grad = torch.ones(3)
    optimizer.step()
    assert hessian_statistics(optimizer, {param: "w"}) == {}
    assert set(optimizer_statistics(optimizer)) == {"optim/param_norm", "optim/momentum_norm"}


def test_a_part_with_another_optimizer_is_left_out(stepped):
    sophia, params = stepped
    other = torch.nn.Parameter(torch.ones(3))
    mixed = MixedOptimizer([sophia, torch.optim.AdamW([other])])
    names = {p: name for name, p in params.items()} | {other: "transformer.ln_f.weight"}
    assert hessian_statistics(mixed, names).keys() == hessian_statistics(sophia, names).keys()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.h.11.attn.c_attn.weight", "h.11"),
        ("transformer.wte.weight", "wte"),
        ("transformer.ln_f.bias", "ln_f"),
        ("model.layers.3.mlp.weight", "layers.3"),
        ("weight", "weight"),
        ("0.weight", "0"),
    ],
)
def test_layers_are_named_as_the_model_names_them(name, layer):
    assert layer_of(name) == layer
