"""AdaHessian against its definition, in float64 and by properties."""

import math

import pytest
import torch

from sophia_train.optim.adahessian import AdaHessian

SETTINGS = [
    {},
    {"betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-4},
    {"hessian_power": 0.5, "betas": (0.0, 0.5)},
    {"hessian_power": 0.0},
]


def reference(theta, gradients, estimates, *, lr, betas, eps, weight_decay, hessian_power):
    """The algorithm, one coordinate at a time, in Python's float64."""
    theta = theta.double().flatten().tolist()
    m = [0.0] * len(theta)
    v = [0.0] * len(theta)
    refreshes = 0
    for step, (gradient, estimate) in enumerate(zip(gradients, estimates, strict=True), start=1):
        refreshes += estimate is not None
        for i, g in enumerate(gradient.flatten().tolist()):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            if estimate is not None:
                v[i] = betas[1] * v[i] + (1 - betas[1]) * estimate.flatten()[i].item() ** 2
            if not refreshes:
                continue
            m_hat = m[i] / (1 - betas[0] ** step)
            v_hat = v[i] / (1 - betas[1] ** refreshes)
            theta[i] -= lr * weight_decay * theta[i]
            theta[i] -= lr * m_hat / (v_hat ** (hessian_power / 2) + eps)
    return theta


@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_the_algorithm(settings):
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(10, 3, 5, generator=generator, dtype=torch.float64)
    estimates = [torch.randn(3, 5, generator=generator, dtype=torch.float64) * 30 for _ in gradients]
    estimates = [e if step in (1, 2, 5) else None for step, e in enumerate(estimates)]  # late, then rarely
    param = torch.nn.Parameter(start.clone())
    optimizer = AdaHessian([param], lr=1e-2, **settings)
    for gradient, estimate in zip(gradients, estimates, strict=True):
        if estimate is not None:
            assert optimizer.update_hessian({param: estimate})
        param.grad = gradient
        optimizer.step()
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    expected = reference(start, gradients, estimates, **group)
    torch.testing.assert_close(param.flatten().tolist(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("refreshes", [1, 2, 7])
def test_bias_correction_counts_refreshes_and_not_steps(refreshes, steps):
    """Under estimates and gradients that never change, each step is lr g / |h|, as rare as estimates are."""
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = AdaHessian([param], lr=0.1, eps=1e-12, weight_decay=0.0)
    for _ in range(refreshes):
        optimizer.update_hessian({param: torch.tensor([4.0, -0.5])})
        for _ in range(steps):
            before = param.detach().clone()
            param.grad = torch.tensor([1.0, 1.0])
            optimizer.step()
            assert (before - param).tolist() == pytest.approx([0.025, 0.2], rel=1e-4)


def test_before_the_first_estimate_a_parameter_stays_and_its_momentum_gathers():
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([first, second], lr=0.1)
    optimizer.update_hessian({first: torch.ones(2)})
    for _ in range(3):
        first.grad = second.grad = torch.full((2,), 1e30)
        optimizer.step()
    assert torch.equal(second, torch.ones(2)) and (first < 0).all()
    assert optimizer.state[second]["exp_avg"].tolist() == pytest.approx([1e30 * (1 - 0.92**3)] * 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])  # the last one's square is infinite
def test_an_estimate_that_is_not_finite_is_as_if_it_had_not_been_made(bad):
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([first, second])
    assert optimizer.update_hessian({first: torch.ones(3), second: torch.ones(2)})
    before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in (first, second)]
    assert not optimizer.update_hessian({first: torch.ones(3), second: torch.tensor([1.0, bad])})
    for p, state in zip((first, second), before, strict=True):
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())


def test_a_first_estimate_that_is_not_finite_moves_nothing():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([param])
    assert not optimizer.update_hessian({param: torch.tensor([1.0, math.nan])})
    param.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(param, torch.ones(2))


def test_estimates_for_strangers_are_refused():
    optimizer = AdaHessian([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="none of the estimates"):
        optimizer.update_hessian({torch.nn.Parameter(torch.zeros(1)): torch.zeros(1)})


def test_a_closure_is_called_with_gradients():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([param])
    optimizer.update_hessian({param: torch.ones(2)})

    def closure():
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert (param < 1).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("eps", 0.0),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, -0.1)),
        ("weight_decay", -1.0),
        ("hessian_power", 1.5),
        ("hessian_power", -0.5),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        AdaHessian([torch.nn.Parameter(torch.zeros(1))], **{name: value})
