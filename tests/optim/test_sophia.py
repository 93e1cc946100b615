"""Sophia against its definition, in float64 and by properties."""

import math

import pytest
import torch

from sophia_train.optim import Sophia

SETTINGS = [
    {},
    {"gamma": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1},
    {"eps_mode": "add", "eps": 1e-8, "gamma": 1.0},
    {"clip_threshold": None, "eps": 0.04, "gamma": 1.0},
    {"clip_threshold": 0.3, "maximize": True},
    {"bias_correction": "momentum"},
    {"bias_correction": "both", "gamma": 0.3, "clip_threshold": None, "eps": 0.04},
]


def reference(
    theta,
    gradients,
    estimates,
    *,
    lr,
    betas,
    gamma,
    eps,
    clip_threshold,
    weight_decay,
    eps_mode,
    bias_correction,
    maximize,
):
    """Algorithm 3, one coordinate at a time, in Python's float64."""
    theta = theta.double().flatten().tolist()
    m = [0.0] * len(theta)
    h = [0.0] * len(theta)
    refreshes = 0
    for step, (gradient, estimate) in enumerate(zip(gradients, estimates, strict=True), start=1):
        refreshes += estimate is not None
        m_weight = 1 - betas[0] ** step if bias_correction != "none" else 1.0
        h_weight = 1 - betas[1] ** refreshes if bias_correction == "both" else 1.0
        for i, g in enumerate(gradient.double().flatten().tolist()):
            if estimate is not None:
                h[i] = betas[1] * h[i] + (1 - betas[1]) * estimate.double().flatten()[i].item()
            m[i] = betas[0] * m[i] + (1 - betas[0]) * (-g if maximize else g)
            theta[i] -= lr * weight_decay * theta[i]
            m_hat, h_hat = m[i] / m_weight, h[i] / h_weight
            u = m_hat / (gamma * h_hat + eps if eps_mode == "add" else max(gamma * h_hat, eps))
            if clip_threshold is not None:
                u = min(max(u, -clip_threshold), clip_threshold)
            theta[i] -= lr * u
    return theta


def gradients_and_estimates(shape, steps, generator):
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]
    estimates = [
        torch.randn(shape, generator=generator, dtype=torch.float64).square() * 30 for _ in range(steps)
    ]
    estimates[1][0, 0] = -3.0  # negative curvature, as Hutchinson may say
    return gradients, [e if step % 2 == 0 or step == 1 else None for step, e in enumerate(estimates)]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_the_algorithm(settings, foreach):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    gradients, estimates = gradients_and_estimates((3, 5), 7, generator)
    param = torch.nn.Parameter(start.clone())
    optimizer = Sophia([param], lr=1e-2, foreach=foreach, **settings)
    for gradient, estimate in zip(gradients, estimates, strict=True):
        if estimate is not None:
            optimizer.update_hessian({param: estimate})
        param.grad = gradient
        optimizer.step()
    group = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "foreach", "fused")}
    expected = reference(start, gradients, estimates, **group)
    torch.testing.assert_close(param.flatten().tolist(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("settings", SETTINGS)
def test_foreach_gives_the_bits_of_the_loop(settings):
    weights = {}
    for foreach in (False, True):
        generator = torch.Generator().manual_seed(1)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 3), (7,), (2, 2, 2)]
        ]
        optimizer = Sophia(params, lr=3e-3, foreach=foreach, **settings)
        for step in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            if step % 2 == 0:
                optimizer.update_hessian({p: torch.rand(p.shape, generator=generator) * 50 for p in params})
            optimizer.step()
        weights[foreach] = params
    for loop, multi in zip(weights[False], weights[True], strict=True):
        assert torch.equal(loop, multi)


def test_a_coordinate_moves_at_most_lr():
    param = torch.nn.Parameter(torch.zeros(1000))
    optimizer = Sophia([param], lr=0.01, weight_decay=0.0)
    for seed in range(5):
        before = param.detach().clone()
        generator = torch.Generator().manual_seed(seed)
        optimizer.update_hessian({param: torch.randn(1000, generator=generator) * 100})
        param.grad = torch.randn(1000, generator=generator) * 10.0 ** torch.randint(
            -9, 9, (1000,), generator=generator
        )
        optimizer.step()
        assert (param - before).abs().max() <= 0.01 * (1 + 1e-5)


def test_without_a_hessian_every_step_is_signed():
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = Sophia([param], lr=0.01)
    param.grad = torch.tensor([1e-6, -1e-6, 1e6, 0.0])
    optimizer.step()
    assert param.tolist() == pytest.approx([-0.01, 0.01, -0.01, 0.0])
    assert optimizer.unclipped_fraction().item() == 0.25  # the one that has no gradient at all


def test_weight_decay_is_decoupled():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = Sophia([param], lr=0.1, weight_decay=0.5)
    param.grad = torch.zeros(3)
    optimizer.step()
    assert param.tolist() == pytest.approx([0.95] * 3)


def test_unclipped_fraction_counts_what_the_step_did_not_clip():
    param = torch.nn.Parameter(torch.zeros(10))
    optimizer = Sophia([param], lr=1.0, betas=(0.0, 0.0), gamma=1.0, weight_decay=0.0)
    optimizer.update_hessian({param: torch.ones(10)})
    param.grad = torch.linspace(0.15, 1.95, 10)
    optimizer.step()
    unclipped = (param.abs() < 1).float().mean()
    assert optimizer.unclipped_fraction().item() == pytest.approx(unclipped.item())
    assert 0 < unclipped < 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_estimate_that_is_not_finite_is_as_if_it_had_not_been_made(bad):
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    optimizer = Sophia([first, second])
    assert optimizer.update_hessian({first: torch.ones(3), second: torch.ones(2)})
    before = [optimizer.state[p]["hessian"].clone() for p in (first, second)]
    used = optimizer.update_hessian({first: torch.ones(3), second: torch.tensor([1.0, bad])})
    assert not used
    for p, hessian in zip((first, second), before, strict=True):
        assert torch.equal(optimizer.state[p]["hessian"], hessian)


def test_parameters_without_a_gradient_stay_as_they_are():
    with_grad, without = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Sophia([with_grad, without])
    with_grad.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(without, torch.ones(2)) and without not in optimizer.state
    assert set(optimizer.state[with_grad]) == {"step", "exp_avg", "hessian"}


def test_groups_keep_their_own_settings_and_schedulers_work():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = Sophia([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}], weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        a.grad, b.grad = torch.ones(1), torch.ones(1)
        optimizer.step()
        scheduler.step()
    assert (a.item(), b.item()) == pytest.approx((-0.15, -0.3))


def test_state_dict_round_trip_continues_bitwise():
    def run(steps, optimizer, param):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            optimizer.update_hessian({param: torch.rand(5, generator=generator)})
            param.grad = torch.randn(5, generator=generator)
            optimizer.step()

    whole = torch.nn.Parameter(torch.ones(5))
    run(range(6), Sophia([whole]), whole)
    half = torch.nn.Parameter(torch.ones(5))
    optimizer = Sophia([half])
    run(range(3), optimizer, half)
    other = torch.nn.Parameter(half.detach().clone())
    resumed = Sophia([other])
    resumed.load_state_dict(optimizer.state_dict())
    run(range(3, 6), resumed, other)
    assert torch.equal(whole, other)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("gamma", -0.1),
        ("eps", 0.0),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, -0.1)),
        ("clip_threshold", 0.0),
        ("weight_decay", -1.0),
        ("eps_mode", "plus"),
        ("bias_correction", "some"),
        ("lr", math.nan),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        Sophia([torch.nn.Parameter(torch.zeros(1))], **{name: value})


def test_estimates_for_strangers_are_refused():
    optimizer = Sophia([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="none of the estimates"):
        optimizer.update_hessian({torch.nn.Parameter(torch.zeros(1)): torch.zeros(1)})


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Sophia(embedding.parameters()).step()
