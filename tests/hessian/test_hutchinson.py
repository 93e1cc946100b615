"""Hutchinson's estimator against an independent double backward; `test_convergence.py` has its mean."""

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, flat, hessian_diagonal, tiny
from support import records
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia_train import distributed
from sophia_train.hessian import Hutchinson, Replica, hutchinson
from sophia_train.optim import Sophia
from sophia_train.seeds import derive


def probes_of(estimator, model, seed):
    return [estimator._probe(p, derive(seed, "probe", i)) for i, p in enumerate(model.parameters())]


def product_by_double_backward(model, data, probes):
    """u * (H u), the way everybody else computes it."""
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(data.inputs).flatten(0, 1)
        loss = F.cross_entropy(logits, data.targets.flatten(), ignore_index=-1)
        gradients = torch.autograd.grad(loss, params, create_graph=True)
        along = sum((g * u).sum() for g, u in zip(gradients, probes, strict=True))
        products = torch.autograd.grad(along, params)
    return flat(u * hu for u, hu in zip(probes, products, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("probe", ["gaussian", "rademacher"])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_is_the_probe_times_the_hessians_product_with_it(probe, micro_batch_size, masked):
    model, data = tiny(bias=True), batch(4, masked)
    assert model.head_weight is model.transformer.wte.weight  # tied: one parameter, used twice
    estimator = Hutchinson(probe=probe, micro_batch_size=micro_batch_size)
    for seed in (0, 1):
        estimates = estimator.estimate(Replica(model, 2), data, seed)
        expected = product_by_double_backward(model, data, probes_of(estimator, model, seed))
        ours = flat(estimates[p] for p in model.parameters())
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_blocks_that_are_recomputed_in_training_are_not_here():
    model, data = tiny(n_layer=2), batch(4)
    expected = Hutchinson().estimate(Replica(model, 4), data, 0)
    model.transformer.recompute_blocks = True
    found = Hutchinson().estimate(Replica(model, 4), data, 0)
    assert all(torch.equal(found[p], expected[p]) for p in model.parameters())
    assert model.transformer.recompute_blocks
    with pytest.raises(IndexError):  # a word that there is not
        Hutchinson().estimate(Replica(model, 4), data._replace(inputs=data.inputs + 1000), 0)
    assert model.transformer.recompute_blocks


@pytest.mark.parametrize("prepared", [False, True])
def test_is_one_graph_for_the_compiler(prepared, monkeypatch):
    """A break would leave the whole of it uncompiled, at four times the cost, and say nothing."""
    model, data = tiny(), batch(4)
    params = list(model.parameters())
    whole = Replica(model, 4)
    if prepared:  # by Accelerate, for mixed precision, and compiled, as the trainer does
        accelerator = distributed.start("bf16", 1)
        model.float().compile()
        whole = Replica(accelerator.prepare_model(model), 4, autocast=accelerator.autocast)
    plain = Hutchinson().estimate(whole, data, 0)
    one_graph = hutchinson.compiled_product(backend="eager", fullgraph=True)
    monkeypatch.setattr(hutchinson, "hessian_product", one_graph)
    compiled = Hutchinson().estimate(whole, data, 0)
    found, expected = (flat(each[p] for p in params) for each in (compiled, plain))
    tolerance = 0.02 if prepared else 1e-6  # bf16, and its rounding
    assert (found - expected).norm() < tolerance * expected.norm()


def test_probes_are_what_they_are_called():
    model = tiny()
    for probe in ("gaussian", "rademacher"):
        drawn = flat(u for seed in range(50) for u in probes_of(Hutchinson(probe=probe), model, seed))
        assert abs(drawn.mean()) < 4 / len(drawn) ** 0.5
        assert drawn.square().mean().item() == pytest.approx(1, abs=6 / len(drawn) ** 0.5)
        assert (drawn.abs() == 1).all().item() is (probe == "rademacher")
        one, same, other = (flat(probes_of(Hutchinson(probe=probe), model, s)) for s in (1, 1, 2))
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_rademacher_varies_less():
    model, data = tiny(), batch(2)

    def variance(probe):
        estimator = Hutchinson(probe=probe)
        estimates = [estimator.estimate(Replica(model, 2), data, seed) for seed in range(60)]
        return torch.stack([flat(each[p] for p in model.parameters()) for each in estimates]).var(0).sum()

    assert variance("rademacher") < 0.8 * variance("gaussian")


def test_rademacher_is_exact_where_the_hessian_is_diagonal():
    class Separate(torch.nn.Module):  # coordinates that do not meet
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))

        def forward(self, inputs, targets, loss_fn):
            return (inputs * self.weight**3).sum()

    model = Separate()
    inputs, targets = torch.arange(1.0, 6.0, dtype=torch.float64)[None], torch.zeros(1, 1, dtype=torch.int64)
    data = batch(1)._replace(inputs=inputs, targets=targets)
    exact = 6 * inputs[0] * model.weight.detach()
    for seed in range(3):
        (estimate,) = Hutchinson(probe="rademacher").estimate(Replica(model, 1), data, seed).values()
        torch.testing.assert_close(estimate, exact, rtol=1e-12, atol=0)
        (noisy,) = Hutchinson(probe="gaussian").estimate(Replica(model, 1), data, seed).values()
        assert not torch.allclose(noisy, exact, rtol=0.1)


def test_where_the_estimate_is_negative_sophia_makes_a_signed_step():
    model, data = tiny(), batch(4)
    exact = flat(hessian_diagonal(model, data).values())
    assert (exact < 0).any()  # there is negative curvature to be found
    lr = 1e-3
    optimizer = Sophia(model.parameters(), lr=lr, betas=(0.0, 0.0), weight_decay=0.0, gamma=1.0)
    optimizer.update_hessian(Hutchinson().estimate(Replica(model, 4), data, 0))
    F.cross_entropy(model(data.inputs).flatten(0, 1), data.targets.flatten()).backward()
    before = flat(p.detach().clone() for p in model.parameters())
    gradient = flat(p.grad for p in model.parameters())
    h = flat(optimizer.state[p]["hessian"] for p in model.parameters())
    optimizer.step()
    moved = flat(p.detach() for p in model.parameters()) - before
    negative, clear = h < 0, gradient.abs() > 1e-9  # beyond eps = 1e-12 over the floor
    assert (negative & clear).sum() > 20
    signed = -lr * gradient.sign()
    torch.testing.assert_close(moved[negative & clear], signed[negative & clear], rtol=1e-9, atol=1e-15)
    preconditioned = (h > gradient.abs()) & clear
    assert preconditioned.any() and (moved[preconditioned].abs() < lr).all()


@pytest.mark.parametrize("around", ["the model's forward", "everything"])
def test_under_autocast_it_is_close(around):
    """Accelerate puts it around `forward` only, and says so; other callers put it around everything."""
    model, data = tiny().float(), batch(4)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3 if p.ndim > 1 else 1)

    def mean(**precision):
        replica = Replica(model, 4, **precision)
        estimates = [Hutchinson(micro_batch_size=2).estimate(replica, data, s) for s in range(20)]
        return sum(flat(each[p] for p in model.parameters()) for each in estimates) / 20

    exact = mean()
    autocast = torch.autocast("cpu", torch.bfloat16)
    if around == "everything":
        with autocast:
            rounded = mean()
    else:
        model.forward = autocast(model.forward)
        rounded = mean(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert not torch.equal(exact, rounded) and rounded.dtype == torch.float32
    assert (exact - rounded).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("training", [True, False])
def test_leaves_gradients_mode_and_weights_as_they_were(training):
    model, data = tiny(dropout=0.5).train(training), batch(2)
    gradients = [torch.full_like(p, 3.0) for p in model.parameters()]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    before = [p.detach().clone() for p in model.parameters()]
    first = Hutchinson().estimate(Replica(model, 2), data, 0)
    second = Hutchinson().estimate(Replica(model, 2), data, 0)
    assert model.training is training
    for p, weight, gradient in zip(model.parameters(), before, gradients, strict=True):
        assert p.grad is gradient and (gradient == 3).all() and torch.equal(p, weight)
        assert torch.equal(first[p], second[p])  # and dropout was off
        assert not first[p].requires_grad


def test_frozen_parameters_take_no_part():
    model, data = tiny(), batch(2)
    model.transformer.wpe.weight.requires_grad_(False)
    estimates = Hutchinson().estimate(Replica(model, 2), data, 0)
    assert set(estimates) == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("settings", "name"), [({"probe": "uniform"}, "probe"), ({"micro_batch_size": 0}, "micro_batch_size")]
)
def test_what_does_not_fit_is_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        Hutchinson(**settings)


def test_a_run_in_bf16_uses_it(request, tmp_path):
    run = request.getfixturevalue("tiny")  # the command line, where Accelerate makes the autocast
    assert run(tmp_path, "optimizer=sophia_h", "hessian.batch_size=2", "precision=bf16").code == 0
    losses = [line["train/loss"] for line in records(tmp_path) if "train/loss" in line]
    rejected = [line["optim/hessian_rejected"] for line in records(tmp_path) if "train/loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0] and not any(rejected)
