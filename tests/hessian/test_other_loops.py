"""Estimators in loops that are not ours: plain PyTorch, schedulers, mixed precision, one call to `attach`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, flat, tiny

from sophia_train.hessian import (
    GNB,
    EmpiricalFisher,
    GradientMagnitude,
    Hutchinson,
    NoHessian,
    Replica,
    attach,
    estimate,
)
from sophia_train.optim import Sophia

FREE = [
    EmpiricalFisher(interval=3),
    EmpiricalFisher(interval=2, scale_by_tokens=False),
    GradientMagnitude(interval=3),
]
ALL = [GNB(), GNB(groups=2), Hutchinson(), EmpiricalFisher(), GradientMagnitude()]


class SmallLM(torch.nn.Module):
    """Word ids (B, T) to logits (B, T, V), with a look back over the words so far."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 8)
        self.mix = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        self.head = torch.nn.Linear(8, 7)

    def forward(self, ids):
        return self.head(self.mix(self.embedding(ids).cumsum(1)))


def classifier():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(1)
    data = [
        (
            torch.randn(6, 5, generator=generator),
            torch.randint(0, 3, (6,), generator=generator),
        )
        for _ in range(8)
    ]
    return model, data


def language_model():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 7, (4, 6), generator=generator) for _ in range(8)]
    return SmallLM(), [(row[:, :-1], row[:, 1:]) for row in rows]


KINDS = {"classifier": classifier, "language model": language_model}


def loss_of(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def assert_same(one, other):
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def layer_wise(model):
    return [{"params": [p], "lr": 1e-2 * 0.9**depth} for depth, p in enumerate(model.parameters())]


def schedulers(optimizer):
    return {
        "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20),
        "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", [GNB(interval=2), GNB(interval=3, groups=2), Hutchinson(interval=2)])
@pytest.mark.parametrize("scheduler", ["one cycle", "lambda"])
def test_a_plain_loop_learns(kind, estimator, scheduler):
    model, data = KINDS[kind]()
    optimizer = Sophia(layer_wise(model), betas=(0.9, 0.9), weight_decay=0.0)
    schedule = schedulers(optimizer)[scheduler]()
    inputs, targets = data[0]
    losses = []
    for step in range(15):
        if estimator.due(step):
            used = optimizer.update_hessian(estimate(estimator, model, inputs, targets, seed=step))
            assert used
        loss = loss_of(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = [p.detach().clone() for p in model.parameters()]
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        for p, old, rate in zip(model.parameters(), before, rates, strict=True):
            assert (p - old).abs().max() <= rate * (1 + 1e-3) + 1e-7  # each layer at its own rate
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and len({group["lr"] for group in optimizer.param_groups}) == (
        1 if scheduler == "one cycle" else len(optimizer.param_groups)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ALL)
def test_estimating_leaves_gradients_and_modes_as_they_were(kind, estimator):
    model, data = KINDS[kind]()
    modules = list(model.modules())
    for number, module in enumerate(modules):  # some frozen in evaluation mode, as when fine-tuning
        module.training = number % 2 == 1
    loss_of(model, *data[0]).backward()
    held = [(p.grad, p.grad.clone(), p.detach().clone()) for p in model.parameters()]
    estimates = estimate(estimator, model, *data[1], seed=0)
    assert set(estimates) == set(model.parameters())
    assert [module.training for module in modules] == [n % 2 == 1 for n in range(len(modules))]
    for p, (gradient, value, weight) in zip(model.parameters(), held, strict=True):
        assert p.grad is gradient and torch.equal(gradient, value) and torch.equal(p, weight)


def test_an_error_while_estimating_leaves_them_too():
    model, data = classifier()
    loss_of(model, *data[0]).backward()
    held = [p.grad for p in model.parameters()]
    model[1].register_forward_hook(lambda *_: 1 / 0)
    model.eval()
    with pytest.raises(ZeroDivisionError):
        estimate(GNB(), model, *data[1], seed=0)
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), held, strict=True))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("estimator", [GNB(), GNB(groups=2), Hutchinson()])
def test_is_the_estimate_that_our_trainer_makes(estimator, masked):
    model, data = tiny(), batch(4, masked)
    theirs = estimator.estimate(Replica(model, 2), data, 5)
    for micro_batch_size in (None, 3):
        ours = estimate(
            estimator, model, data.inputs, data.targets, seed=5, micro_batch_size=micro_batch_size
        )
        assert ours.keys() == theirs.keys()
        for p, value in ours.items():
            torch.testing.assert_close(value, theirs[p], rtol=1e-10, atol=1e-14)


def test_gnb_of_a_classifier_is_the_gauss_newton_diagonal_in_the_mean():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3, bias=False).double()
    inputs = torch.randn(4, 2, dtype=torch.float64)
    p = model(inputs).softmax(-1).detach()
    exact = ((p * (1 - p))[:, :, None] * (inputs**2)[:, None, :]).mean(0)
    targets = torch.zeros(4, dtype=torch.int64)
    estimates = [estimate(GNB(), model, inputs, targets, seed=s)[model.weight] for s in range(600)]
    stacked = torch.stack(estimates)
    assert ((stacked.mean(0) - exact) / (stacked.std(0) / 600**0.5)).abs().max() < 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", FREE)
@pytest.mark.parametrize("clip", [0.05, None])
def test_attach_is_calling_update_hessian_by_hand(kind, estimator, clip):
    model, data = KINDS[kind]()
    other = copy.deepcopy(model)
    tokens = data[0][1].numel()
    attached = Sophia(layer_wise(model), betas=(0.9, 0.9))
    by_hand = Sophia(layer_wise(other), betas=(0.9, 0.9))
    attach(attached, estimator, tokens=tokens)
    for step, (inputs, targets) in enumerate(data):
        for net in (model, other):
            loss_of(net, inputs, targets).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        if estimator.due(step):
            by_hand.update_hessian(estimate(estimator, other, inputs, targets, seed=0))
        for optimizer in (attached, by_hand):
            optimizer.step()
            optimizer.zero_grad()
        assert_same(model, other)
    h = flat(attached.state[p]["hessian"] for p in model.parameters())
    assert torch.equal(h, flat(by_hand.state[p]["hessian"] for p in other.parameters())) and h.any()


@pytest.mark.parametrize("first_part", [3, 4])
def test_attached_to_a_loaded_state_it_goes_on_in_step(first_part):
    model, data = language_model()
    whole = copy.deepcopy(model)

    def train(net, optimizer, part):
        attach(optimizer, EmpiricalFisher(interval=3), tokens=20)
        for inputs, targets in part:
            loss_of(net, inputs, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    train(whole, Sophia(whole.parameters(), lr=1e-2), data)
    saved = train(model, Sophia(model.parameters(), lr=1e-2), data[:first_part]).state_dict()
    again = Sophia(model.parameters(), lr=1e-2)
    again.load_state_dict(copy.deepcopy(saved))
    train(model, again, data[first_part:])
    assert_same(model, whole)


def test_attach_can_be_undone():
    model, data = classifier()
    optimizer = Sophia(model.parameters(), lr=1e-2)
    handle = attach(optimizer, GradientMagnitude(interval=1), tokens=6)

    def step():
        loss_of(model, *data[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        return flat(optimizer.state[p]["hessian"].clone() for p in model.parameters())

    first, second = step(), step()
    assert not torch.equal(first, second)
    handle.remove()
    assert torch.equal(step(), second)


@pytest.mark.parametrize("estimator", [GNB(), Hutchinson(), NoHessian()])
def test_attach_refuses_what_makes_a_pass_of_its_own(estimator):
    model, _ = classifier()
    name = type(estimator).__name__
    with pytest.raises(ValueError, match=name):
        attach(Sophia(model.parameters()), estimator, tokens=6)


@pytest.mark.parametrize("estimator", FREE)
def test_attach_refuses_an_optimizer_that_takes_no_hessian(estimator):
    model, _ = classifier()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=f"{type(estimator).__name__} .* AdamW takes none"):
        attach(optimizer, estimator, tokens=6)


@pytest.mark.parametrize("estimator", [GNB(), GNB(groups=2), Hutchinson()])
@pytest.mark.parametrize("kind", ["language model", "gpt2"])
def test_under_autocast_it_comes_close(estimator, kind):
    if kind == "gpt2":
        model, data = tiny().float(), batch(4)
        inputs, targets = data.inputs, data.targets
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.3 if p.ndim > 1 else 1)
    else:
        model, ((inputs, targets), *_) = language_model()

    def mean(autocast):
        total = 0.0
        for seed in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                estimates = estimate(estimator, model, inputs, targets, seed=seed)
                values = flat(estimates[p] for p in model.parameters())
                # the same region still trains: nothing that was cached has lost its gradient
                loss_of(model, inputs, targets).backward()
            assert all(p.grad is not None and p.grad.any() for p in model.parameters())
            model.zero_grad()
            assert values.dtype == torch.float32 and values.isfinite().all()
            total = total + values
        return total / 20

    exact, rounded = mean(False), mean(True)
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.1 * exact.norm()


class TestGradScaler:
    """Loss scaling, as with fp16."""

    @pytest.mark.parametrize("unscale", [True, False])
    def test_attach_sees_unscaled_gradients(self, unscale):
        model, data = classifier()
        other = copy.deepcopy(model)
        optimizer, plain = (Sophia(net.parameters(), lr=1e-2) for net in (model, other))
        for each in (optimizer, plain):
            attach(each, EmpiricalFisher(interval=2), tokens=6)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        for inputs, targets in data:
            scaler.scale(loss_of(model, inputs, targets)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            loss_of(other, inputs, targets).backward()
            plain.step()
            plain.zero_grad()
        assert scaler.get_scale() > 2.0**10
        for p, q in zip(model.parameters(), other.parameters(), strict=True):  # powers of 2 do not round
            torch.testing.assert_close(
                optimizer.state[p]["hessian"], plain.state[q]["hessian"], rtol=0, atol=0
            )
        assert_same(model, other)

    def test_an_infinite_gradient_skips_refresh_and_step(self):
        model, data = classifier()
        optimizer = Sophia(model.parameters(), lr=1e-2)
        attach(optimizer, EmpiricalFisher(interval=1), tokens=6)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)

        def step(spoil):
            scaler.scale(loss_of(model, *data[0])).backward()
            if spoil:
                model[0].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            return copy.deepcopy([list(model.parameters()), optimizer.state_dict()["state"]])

        before, after = step(False), step(True)
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert scaler.get_scale() == 2.0**3
        weights, state = step(False)
        assert state[0]["step"] == 2 and not torch.equal(weights[0], before[0][0])

    def test_fp16_autocast(self):
        model, data = classifier()
        optimizer = Sophia(model.parameters(), lr=1e-2)
        attach(optimizer, EmpiricalFisher(interval=2), tokens=6)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        losses = []
        for _ in range(12):
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, *data[0])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for p in model.parameters():
            h = optimizer.state[p]["hessian"]
            assert h.isfinite().all() and 0 < h.max() < 10  # of a scaled gradient: a million times that
