"""The GNB estimator against the exact Gauss-Newton diagonal, by curvlinops."""

import dataclasses

import pytest
import torch
from curvlinops import GGNLinearOperator
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia_train.data.batches import Batch
from sophia_train.hessian import GNB, HessianUpdater, NoHessian, Replica
from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.optim import Sophia

CONFIG = GPT2Config(n_layer=1, n_head=2, n_embd=4, block_size=4, vocab_size=6)


def tiny(**changes):
    model = GPT2(dataclasses.replace(CONFIG, **changes)).double()
    model.initialize(3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20 if p.ndim > 1 else 1)  # away from the flat start
        model.transformer.wte.weight[CONFIG.vocab_size :] = 0
    return model


def batch(n):
    generator = torch.Generator().manual_seed(8)
    rows = torch.randint(0, CONFIG.vocab_size, (n, CONFIG.block_size + 1), generator=generator)
    return Batch(rows[:, :-1], rows[:, 1:], list(range(n)))


class FlatLogits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model(inputs).flatten(0, 1)


def exact_diagonal(model, data):
    """Diagonal of the Gauss-Newton matrix of the mean loss over tokens; tied weights are one parameter."""
    params = dict(model.named_parameters())
    operator = GGNLinearOperator(
        FlatLogits(model),
        torch.nn.CrossEntropyLoss(),
        list(params.values()),
        [(data.inputs, data.targets.flatten())],
        batch_size_fn=torch.numel,
        check_deterministic=False,
    )
    with sdpa_kernel(SDPBackend.MATH):  # the oracle differentiates forwards, which no other kernel can
        matrix = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    return dict(zip(params, matrix.diagonal().split([p.numel() for p in params.values()]), strict=True))


@pytest.mark.parametrize(("groups", "refreshes"), [(1, 4000), (4, 1500)])
def test_the_mean_is_the_exact_gauss_newton_diagonal(groups, refreshes):
    model, data = tiny(), batch(4)
    exact = exact_diagonal(model, data)
    gnb, replica = GNB(groups=groups), Replica(model, 4)
    sums = {name: torch.zeros(2, p.numel(), dtype=torch.float64) for name, p in model.named_parameters()}
    for seed in range(refreshes):
        estimates = gnb.estimate(replica, data, seed)
        for name, p in model.named_parameters():
            value = estimates[p].flatten()
            sums[name] += torch.stack([value, value**2])
    for name, (total, squares) in sums.items():
        mean = total / refreshes
        error = ((squares / refreshes - mean**2).clamp(min=0) / refreshes).sqrt()
        z = (mean - exact[name]) / error.clamp(min=1e-12)
        assert z.abs().max() < 6, name
        assert z.mean().abs() < 2.0, name  # no common drift, as a wrong B would make
        # the estimate is sharp enough for the test to mean something
        assert (error.sum() / exact[name].sum()) < 0.15, name


def test_groups_lower_the_variance():
    model, data = tiny(), batch(4)

    def spread(groups):
        estimates = [GNB(groups=groups).estimate(Replica(model, 4), data, seed) for seed in range(300)]
        stacked = torch.stack([torch.cat([e.flatten() for e in each.values()]) for each in estimates])
        return (stacked.var(0).sum() / stacked.mean(0).square().sum()).item()

    assert spread(4) < 0.6 * spread(1)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_the_estimate_does_not_depend_on_the_micro_batch(groups, micro_batch_size):
    model, data = tiny(), batch(6)
    gnb = GNB(groups=groups)
    whole = gnb.estimate(Replica(model, 6), data, 0)
    split = gnb.estimate(Replica(model, micro_batch_size), data, 0)
    for p in model.parameters():
        torch.testing.assert_close(split[p], whole[p], rtol=1e-10, atol=1e-14)


def test_b_counts_tokens():
    # one sequence twice is two samples of the same mean: with B in tokens, h-hat keeps its expectation
    model, data = tiny(), batch(1)
    twice = Batch(data.inputs.repeat(2, 1), data.targets.repeat(2, 1), [0, 1])

    def mean(data):
        estimates = [GNB().estimate(Replica(model, 2), data, seed) for seed in range(1500)]
        return sum(sum(e.sum() for e in each.values()) for each in estimates) / len(estimates)

    assert mean(twice).item() == pytest.approx(mean(data).item(), rel=0.15)


def test_leaves_gradients_and_mode_as_they_were():
    model, data = tiny(), batch(2)
    model.train()
    GNB().estimate(Replica(model, 2), data, 0)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_dropout_is_off_while_estimating():
    data = batch(2)
    estimates = []
    for dropout in (0.0, 0.5):
        model = tiny(dropout=dropout).train()
        estimates.append(list(GNB().estimate(Replica(model, 2), data, 0).values()))
    assert all(torch.equal(a, b) for a, b in zip(*estimates, strict=True))


def test_the_updater_uses_the_first_sequences_when_it_is_due():
    model, data = tiny(), batch(4)
    optimizer = Sophia(model.parameters(), betas=(0.9, 0.0))
    updater = HessianUpdater(
        GNB(interval=3, batch_size=2), optimizer, Replica(model, 4), batch_size=4, seed=5
    )
    for step in range(5):
        before = {p: optimizer.state[p].get("hessian", torch.zeros(())).clone() for p in model.parameters()}
        updater.before(data, step)
        updater.after_accumulation(data, step)
        changed = any(not torch.equal(optimizer.state[p]["hessian"], before[p]) for p in model.parameters())
        assert changed is (step in (0, 3))
        assert updater.pass_sequences(step) == (2 if step in (0, 3) else 0)
    first = {p: optimizer.state[p]["hessian"].clone() for p in model.parameters()}
    other = Batch(data.inputs.clone(), data.targets, data.sequences)
    other.inputs[2:] = 0  # beyond the sub-batch
    updater.before(other, 3)
    assert all(torch.equal(optimizer.state[p]["hessian"], first[p]) for p in model.parameters())


def test_an_optimizer_that_takes_no_hessian_is_refused():
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="GNB estimates a Hessian, but AdamW takes none"):
        HessianUpdater(GNB(), optimizer, Replica(model, 1), batch_size=8, seed=0)
    HessianUpdater(NoHessian(), optimizer, Replica(model, 1), batch_size=8, seed=0)


def test_rejected_estimates_are_counted_and_survive_a_resume():
    model, data = tiny(), batch(2)
    optimizer = Sophia(model.parameters())
    updater = HessianUpdater(GNB(interval=1), optimizer, Replica(model, 2), batch_size=2, seed=0)
    updater.before(data, 0)
    assert updater.rejected == 0
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    updater.before(data, 1)
    assert updater.rejected == 1
    again = HessianUpdater(GNB(), optimizer, Replica(model, 2), batch_size=2, seed=0)
    again.load_state_dict(updater.state_dict())
    assert again.rejected == 1


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"interval": 0}, "interval"),
        ({"batch_size": 0}, "batch_size"),
        ({"groups": 0}, "groups"),
        ({"batch_size": 9}, "batch_size"),
        ({"batch_size": 3}, "batch_size"),
        ({"batch_size": 4, "groups": 8}, "groups"),
        ({"groups": 3}, "groups"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        GNB(**settings).check(batch_size=8, world_size=2)
