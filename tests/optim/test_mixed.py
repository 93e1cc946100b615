"""Several optimizers as one: the same steps, one state, one schedule."""

import pytest
import torch

from sophia_train.optim import Sophia
from sophia_train.optim.evaluation_weights import evaluation_weights, has_evaluation_weights
from sophia_train.optim.mixed import MixedOptimizer

SHAPES = [(4, 3), (5,), (2, 2)]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def separate(params):
    return [
        Sophia([{"params": params[:1]}, {"params": params[1:2], "weight_decay": 0.0}], lr=1e-2),
        torch.optim.AdamW(params[2:], lr=3e-2, weight_decay=0.1),
    ]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return {p: torch.rand(p.shape, generator=generator) * 30 for p in params}


def test_steps_as_its_parts_would_alone():
    alone, together = parameters(), parameters()
    parts, mixed = separate(alone), MixedOptimizer(separate(together))
    for step in range(6):
        for params, hessian in ((alone, parts[0].update_hessian), (together, mixed.update_hessian)):
            hessian(set_gradients(params, step))
        for part in parts:
            part.step()
        mixed.step()
        mixed.zero_grad()
        assert all(p.grad is None for p in together)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert mixed.unclipped_fraction() == parts[0].unclipped_fraction()
    assert mixed.unclipped_fraction([together[1]]) == parts[0].unclipped_fraction([alone[1]])
    assert mixed.unclipped_fraction([together[2]]).isnan()  # AdamW's: it clips nothing


def test_a_schedule_reaches_every_part():
    params = parameters()
    mixed = MixedOptimizer(separate(params))
    before = [p.detach().clone() for p in params]
    scheduler = torch.optim.lr_scheduler.LambdaLR(mixed, lambda step: 0.0)
    set_gradients(params, 0)
    mixed.step()
    scheduler.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert [group["lr"] for group in mixed.param_groups] == [0.0] * 3


def test_one_state_dict_has_it_all_and_resumes_bitwise():
    def run(params, optimizer, steps):
        for step in steps:
            optimizer.update_hessian(set_gradients(params, step))
            optimizer.step()

    whole = parameters()
    run(whole, MixedOptimizer(separate(whole)), range(6))
    first = parameters()
    optimizer = MixedOptimizer(separate(first))
    run(first, optimizer, range(3))
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = MixedOptimizer(separate(second))
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    assert {len(resumed.state[p]) for p in second} == {3}


def test_an_estimate_that_is_not_finite_anywhere_is_dropped_everywhere():
    params = parameters()
    mixed = MixedOptimizer([Sophia(params[:1]), Sophia(params[1:])])
    assert mixed.update_hessian({p: torch.ones_like(p) for p in params})
    before = [mixed.state[p]["hessian"].clone() for p in params]
    estimates = {p: torch.ones_like(p) for p in params}
    estimates[params[2]][0] = float("nan")
    assert not mixed.update_hessian(estimates)
    assert all(torch.equal(mixed.state[p]["hessian"], b) for p, b in zip(params, before, strict=True))


def test_can_what_one_of_its_parts_can():
    params = parameters()
    plain = MixedOptimizer([torch.optim.SGD(params[:1]), torch.optim.AdamW(params[1:])])
    assert not any(hasattr(plain, name) for name in ("update_hessian", "unclipped_fraction", "eval"))


def test_the_closure_is_called_once():
    params = parameters()
    mixed, calls = MixedOptimizer(separate(params)), []

    def closure():
        calls.append(1)
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in params]
    assert mixed.step(closure) == sum(b.square().sum() for b in before) and calls == [1]
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_parameter_has_one_optimizer():
    params = parameters()
    with pytest.raises(ValueError, match="more than one parameter group"):
        MixedOptimizer([torch.optim.SGD(params), torch.optim.SGD(params[:1])])


class Averaging(torch.optim.SGD):
    """Keeps other weights to evaluate, as schedule-free optimizers do, and swaps by arithmetic."""

    def eval(self):
        self._swap(0.3)

    def train(self):
        self._swap(-0.3 / 0.7)

    @torch.no_grad()
    def _swap(self, weight):
        for group in self.param_groups:
            for p in group["params"]:
                p.lerp_(torch.full_like(p, 0.123), weight)


def test_weights_to_evaluate_are_swapped_in_and_back_bitwise():
    params = parameters()
    mixed = MixedOptimizer([Averaging(params[:1]), torch.optim.SGD(params[1:])])
    assert has_evaluation_weights(mixed) and not has_evaluation_weights(torch.optim.SGD(params))
    before = [p.detach().clone() for p in params]
    with evaluation_weights(mixed):
        torch.testing.assert_close(params[0], before[0] + 0.3 * (0.123 - before[0]))
        assert torch.equal(params[1], before[1])
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    with pytest.raises(KeyError), evaluation_weights(mixed):
        raise KeyError
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
