"""When h is refreshed, what becomes of estimates that are not finite, and what a resume brings back."""

import logging

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, tiny
from support import build, start_trackers

from sophia_train import checkpoint
from sophia_train.hessian import GNB, EmpiricalFisher, GradientMagnitude, HessianUpdater, Hutchinson, Replica
from sophia_train.hessian.base import NoHessian
from sophia_train.optim import Sophia
from sophia_train.seeds import derive

ESTIMATORS = [GNB, Hutchinson, EmpiricalFisher, GradientMagnitude]


def loss_of(model, data):
    return F.cross_entropy(model(data.inputs).flatten(0, 1), data.targets.flatten())


def batches(n):
    generator = torch.Generator().manual_seed(1)
    template = batch(2)
    for _ in range(n):
        rows = torch.randint(0, 6, (2, 5), generator=generator)
        yield template._replace(inputs=rows[:, :-1], targets=rows[:, 1:])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_is_due_every_interval_and_at_the_start_if_told_so(estimator):
    due = [step for step in range(10) if estimator(interval=3).due(step)]
    assert due == [0, 3, 6, 9]
    due = [step for step in range(10) if estimator(interval=3, refresh_at_start=False).due(step)]
    assert due == [3, 6, 9]
    assert [estimator(interval=1, refresh_at_start=False).due(step) for step in range(3)] == [
        False,
        True,
        True,
    ]
    assert not any(NoHessian().due(step) for step in range(10))


@pytest.mark.parametrize("estimator", [GNB, Hutchinson])
def test_without_the_first_refresh_it_is_the_official_order_one_step_later_by_name(estimator):
    """Step, then refresh after the last step of each interval: the same weights, bitwise."""
    interval, data = 3, list(batches(11))
    made = estimator(interval=interval, refresh_at_start=False)
    settings = {"lr": 1e-2, "betas": (0.9, 0.9), "gamma": 1.0}

    ours = tiny()
    optimizer = Sophia(ours.parameters(), **settings)
    updater = HessianUpdater(made, optimizer, Replica(ours, 2), batch_size=2, seed=5)
    path = []
    for step in range(10):
        updater.before(data[step], step)
        loss_of(ours, data[step]).backward()
        updater.after_accumulation(data[step], step)
        optimizer.step()
        optimizer.zero_grad()
        path.append([p.detach().clone() for p in ours.parameters()])
    assert updater.refreshed == 9

    official = tiny()
    optimizer = Sophia(official.parameters(), **settings)
    for step in range(10):
        loss_of(official, data[step]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for p, expected in zip(official.parameters(), path[step], strict=True):
            assert torch.equal(p, expected), step
        if step % interval == interval - 1:  # the batch of the estimate is the next step's
            seed = derive(5, "hessian", step + 1)
            optimizer.update_hessian(made.estimate(Replica(official, 2), data[step + 1], seed))

    at_start = tiny()
    optimizer = Sophia(at_start.parameters(), **settings)
    updater = HessianUpdater(estimator(interval=3), optimizer, Replica(at_start, 2), batch_size=2, seed=5)
    updater.before(data[0], 0)
    loss_of(at_start, data[0]).backward()
    optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(at_start.parameters(), path[0], strict=True))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_optimizer_that_takes_no_hessian_is_refused(estimator):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    name = estimator.__name__
    with pytest.raises(ValueError, match=f"{name} estimates a Hessian, but AdamW takes none"):
        HessianUpdater(estimator(), optimizer, Replica(model, 1), batch_size=8, seed=0)
    for taken in (optimizer, Sophia(model.parameters())):
        updater = HessianUpdater(NoHessian(), taken, Replica(model, 1), batch_size=8, seed=0)
        assert updater.interval is None and updater.metrics(3) == {}


def trainer_with(estimator, folder, **changes):
    trainer, model = build(folder, dtype=torch.float64, **changes)
    trainer.hessian = HessianUpdater(
        estimator, trainer.optimizer, trainer.replica, batch_size=trainer.config.batch_size, seed=7
    )
    trainer.health.interval = estimator.interval
    return trainer, model


def everything(trainer, model):
    states = trainer.optimizer.state
    return {
        name: {"weight": p.detach(), **{key: torch.as_tensor(value) for key, value in states[p].items()}}
        for name, p in model.named_parameters()
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert tensors.keys() == other[name].keys()
        for key, value in tensors.items():
            assert torch.equal(value, other[name][key]), (name, key)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_estimate_that_is_not_finite_leaves_no_trace_but_its_count(
    estimator, first, value, tmp_path, monkeypatch
):
    """`first` is the first step whose estimate is spoiled, in one coordinate of one parameter."""
    original = estimator.estimate
    calls = []

    def spoiled(self, replica, batch, seed):
        estimates = original(self, replica, batch, seed)
        calls.append(seed)
        if len(calls) > first:
            list(estimates.values())[-1].view(-1)[0] = value
        return estimates

    monkeypatch.setattr(estimator, "estimate", spoiled)
    trainer, model = trainer_with(estimator(interval=1), tmp_path / "spoiled")
    results = [trainer.train_step(trainer._next_batch()) for _ in range(3)]
    assert len(calls) == 3 and not any(each.skipped for each in results)
    monkeypatch.setattr(estimator, "estimate", original)
    other = estimator(interval=100, refresh_at_start=first == 1)  # no refresh where the others were spoiled
    reference, expected = trainer_with(other, tmp_path / "reference")
    for _ in range(3):
        reference.train_step(reference._next_batch())
    assert_same(everything(trainer, model), everything(reference, expected))
    assert trainer.hessian.rejected == 3 - first and reference.hessian.rejected == 0
    assert trainer.hessian.refreshed == reference.hessian.refreshed == first - 1
    age = {"hessian/age": 3} if first else {}
    assert trainer.hessian.metrics(3) == {"optim/hessian_rejected": 3 - first, **age}

    messages = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append((record.levelname, record.getMessage()))

    logger, keep = logging.getLogger("sophia_train"), Keep()
    logger.addHandler(keep)
    try:
        metrics = trainer._measure(results[-1])
    finally:
        logger.removeHandler(keep)
    assert metrics["optim/hessian_rejected"] == 3 - first
    assert [text for level, text in messages if level == "WARNING" and "not finite and dropped" in text]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_resume_brings_back_age_and_count_and_goes_on_bitwise(estimator, tmp_path):
    made = estimator(interval=3)
    whole, whole_model = trainer_with(made, tmp_path / "whole")
    for _ in range(8):
        whole.train_step(whole._next_batch())

    trainer, model = trainer_with(made, tmp_path / "parts")
    start_trackers(trainer, tmp_path / "parts")
    for _ in range(5):
        trainer.train_step(trainer._next_batch())
    trainer.hessian._rejected = torch.tensor(4)
    trainer.save()
    trainer.trackers.close(0)
    again, again_model = trainer_with(made, tmp_path / "parts")
    assert again.hessian.refreshed == -1 and again.hessian.metrics(0) == {"optim/hessian_rejected": 0}
    again.restore(checkpoint.latest(tmp_path / "parts" / "checkpoints"))
    assert again.hessian.state_dict() == {"rejected": 4, "refreshed": 3}
    assert again.hessian.metrics(5) == {"optim/hessian_rejected": 4, "hessian/age": 2}
    for _ in range(3):
        again.train_step(again._next_batch())
    assert_same(everything(again, again_model), everything(whole, whole_model))
    assert again.hessian.metrics(8) == {"optim/hessian_rejected": 4, "hessian/age": 2}
