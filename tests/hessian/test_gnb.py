"""The GNB estimator against its formula; `test_convergence.py` has it against the exact diagonal."""

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, flat, tiny

from sophia_train.data.batches import Batch
from sophia_train.hessian import GNB, HessianUpdater, Replica
from sophia_train.models.labels import sample_labels, token_keys
from sophia_train.optim import Sophia
from sophia_train.seeds import derive


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_is_b_times_the_square_of_a_gradient_on_sampled_labels(groups, masked, micro_batch_size):
    """The formula, written out: what is masked takes no part, neither in the gradients nor in any B."""
    model, data = tiny(), batch(4, masked)
    estimates = GNB(groups=groups).estimate(Replica(model, micro_batch_size), data, 9)
    logits = model(data.inputs)
    keys = token_keys(torch.tensor([derive(9, "labels", i) for i in range(4)]), data.targets.shape[1])
    labels = sample_labels(logits.detach().flatten(0, 1), keys.flatten()).view_as(keys)
    labels = labels.masked_fill(data.targets < 0, -1)
    expected, count = 0.0, (labels >= 0).sum()
    for group in range(groups):
        mine = labels[group::groups]
        tokens = (mine >= 0).sum()
        loss = F.cross_entropy(logits[group::groups].flatten(0, 1), mine.flatten(), ignore_index=-1)
        gradient = flat(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
        expected = expected + tokens / count * tokens * gradient**2
    torch.testing.assert_close(
        flat(estimates[p] for p in model.parameters()), expected, rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_gradient_clip_bounds_the_gradient_that_is_squared(micro_batch_size):
    model, data = tiny(), batch(4)

    def estimate(clip):
        estimates = GNB(gradient_clip=clip).estimate(Replica(model, micro_batch_size), data, 3)
        return flat(estimates[p] for p in model.parameters())

    free = estimate(None)
    norm = (free.sum() / data.targets.numel()).sqrt()
    assert torch.equal(estimate(1.01 * norm.item()), free)
    for share in (0.9, 0.01):
        clip = share * norm.item()
        # torch's clip adds 1e-6 to the norm
        torch.testing.assert_close(estimate(clip), free * (clip / (norm + 1e-6)) ** 2, rtol=1e-12, atol=0)


def test_groups_lower_the_variance():
    model, data = tiny(), batch(4)

    def spread(groups):
        estimates = [GNB(groups=groups).estimate(Replica(model, 4), data, seed) for seed in range(150)]
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
        estimates = [GNB().estimate(Replica(model, 2), data, seed) for seed in range(500)]
        return sum(sum(e.sum() for e in each.values()) for each in estimates) / len(estimates)

    assert mean(twice).item() == pytest.approx(mean(data).item(), rel=0.2)


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
