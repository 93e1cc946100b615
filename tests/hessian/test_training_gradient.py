"""Estimators made of the training gradient: their formulas, and how far they are from curvature."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, flat, tiny
from support import build

from sophia_train.hessian import EmpiricalFisher, GradientMagnitude, HessianUpdater, Replica, estimate

FORMULAS = {
    "empirical fisher": (EmpiricalFisher(), lambda g, tokens: tokens * g**2),
    "squared gradient": (EmpiricalFisher(scale_by_tokens=False), lambda g, tokens: g**2),
    "gradient magnitude": (GradientMagnitude(), lambda g, tokens: g.abs()),
}


@pytest.mark.parametrize("case", FORMULAS)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_its_formula_and_leaves_the_gradient(case, masked):
    estimator, formula = FORMULAS[case]
    model, data = tiny(), batch(4, masked)
    F.cross_entropy(model(data.inputs).flatten(0, 1), data.targets.flatten(), ignore_index=-1).backward()
    held = {p: p.grad for p in model.parameters()}
    before = {p: p.grad.clone() for p in model.parameters()}
    estimates = estimator.estimate(Replica(model, 4), data, 0)
    tokens = 16 - 7 * masked  # what `batch` masks, counted by hand
    for p in model.parameters():
        assert torch.equal(estimates[p], formula(before[p], tokens))
        assert p.grad is held[p] and torch.equal(p.grad, before[p])
        assert estimates[p].data_ptr() != p.grad.data_ptr()


@pytest.mark.parametrize("case", FORMULAS)
def test_the_trainer_hands_over_the_gradient_before_it_clips(case, tmp_path):
    estimator, formula = FORMULAS[case]
    averages = {}
    for clip in (None, 1e-3):
        trainer, model = build(tmp_path / str(clip), dtype=torch.float64, gradient_clip=clip)
        trainer.hessian = HessianUpdater(
            estimator, trainer.optimizer, trainer.replica, batch_size=trainer.config.batch_size, seed=0
        )
        data = trainer._next_batch()
        loss = F.cross_entropy(model(data.inputs).flatten(0, 1), data.targets.flatten())
        gradient = flat(torch.autograd.grad(loss, list(model.parameters())))
        reported = trainer.train_step(data)
        assert reported.clipped is (clip is not None)
        weight = 1 - trainer.optimizer.param_groups[0]["betas"][1]
        averages[clip] = flat(trainer.optimizer.state[p]["hessian"] for p in model.parameters())
        expected = weight * formula(gradient, data.targets.numel())
        torch.testing.assert_close(averages[clip], expected, rtol=1e-9, atol=1e-16)
    assert torch.equal(averages[None], averages[1e-3])


class Softmax:
    """A linear softmax model whose tokens are independent draws of a pair (x, y), all of them enumerated."""

    def __init__(self, labels_of_the_model):
        generator = torch.Generator().manual_seed(2)
        self.model = torch.nn.Linear(2, 3, bias=False).double()
        with torch.no_grad():
            self.model.weight.copy_(torch.randn(3, 2, generator=generator, dtype=torch.float64))
        self.xs = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        labels = self.model(self.xs).softmax(-1).detach()
        if not labels_of_the_model:
            labels = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)
        self.pairs = [(x, y, 0.5 * labels[x, y].item()) for x, y in itertools.product(range(2), range(3))]

    def gradient(self, pairs):
        """Gradient of the mean loss over tokens, left in `.grad`."""
        inputs, targets = self.xs[[x for x, _, _ in pairs]], torch.tensor([y for _, y, _ in pairs])
        self.model.zero_grad()
        F.cross_entropy(self.model(inputs), targets).backward()
        return self.model.weight.grad.clone(), inputs, targets

    def mean(self, tokens, function):
        """Exact mean over all batches of so many tokens, and their labels."""
        total = 0.0
        for pairs in itertools.product(self.pairs, repeat=tokens):
            probability = torch.tensor([p for _, _, p in pairs], dtype=torch.float64).prod()
            total = total + probability * function(*self.gradient(pairs))
        return total

    def estimate(self, estimator, tokens):
        def one(gradient, inputs, targets):
            return estimate(estimator, self.model, inputs, targets, seed=0)[self.model.weight]

        return self.mean(tokens, one)

    def gauss_newton(self):
        """Diagonal of E[J' (diag(p) - p p') J]: d logit_i / d W_ij = x_j."""
        p = self.model(self.xs).softmax(-1).detach()
        return ((p * (1 - p))[:, :, None] * (self.xs**2)[:, None, :]).mean(0)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_the_bias_of_the_empirical_fisher_is_the_one_it_confesses(tokens):
    case = Softmax(labels_of_the_model=False)
    squares = case.mean(1, lambda g, *_: g**2)
    mean = case.mean(1, lambda g, *_: g)
    expected = squares + (tokens - 1) * mean**2
    torch.testing.assert_close(case.estimate(EmpiricalFisher(), tokens), expected, rtol=1e-12, atol=1e-15)
    assert (mean**2).sum() > 0.05 * squares.sum()  # the term that grows with the batch is there
    # and the first term is no Gauss-Newton diagonal either, for the labels are not the model's
    assert (squares - case.gauss_newton()).abs().sum() > 0.1 * case.gauss_newton().sum()


@pytest.mark.parametrize("tokens", [1, 3])
def test_on_the_models_own_labels_the_empirical_fisher_has_no_bias(tokens):
    case = Softmax(labels_of_the_model=True)  # this is GNB: Bartlett's identities hold
    assert case.mean(1, lambda g, *_: g).abs().max() < 1e-12
    exact = case.gauss_newton()
    torch.testing.assert_close(case.estimate(EmpiricalFisher(), tokens), exact, rtol=1e-12, atol=1e-15)
    floor = case.estimate(EmpiricalFisher(scale_by_tokens=False), tokens)
    torch.testing.assert_close(floor, exact / tokens, rtol=1e-12, atol=1e-15)


def test_the_gradient_magnitude_is_no_curvature():
    case = Softmax(labels_of_the_model=True)
    means = [case.estimate(GradientMagnitude(), tokens) for tokens in (1, 2, 3)]
    # noise in the gradient is all that it sees here, and the more tokens the less
    assert means[0].sum() > 1.2 * means[1].sum() > 1.2 * 1.02 * means[2].sum()
    assert (means[2] - case.gauss_newton()).abs().sum() > 0.1 * case.gauss_newton().sum()
    # of the gradient's unit: inputs twice as long quadruple curvature at zero weights, and double this
    sizes, curvatures = [], []
    for scale in (1, 2):
        case = Softmax(labels_of_the_model=False)
        with torch.no_grad():
            case.model.weight.zero_()
        case.xs *= scale
        sizes.append(case.estimate(GradientMagnitude(), 1))
        curvatures.append(case.gauss_newton())
    torch.testing.assert_close(sizes[1], 2 * sizes[0])
    torch.testing.assert_close(curvatures[1], 4 * curvatures[0])


def test_their_sub_batch_is_no_setting():
    for estimator in (EmpiricalFisher, GradientMagnitude):
        with pytest.raises(TypeError, match="batch_size"):
            estimator(batch_size=2)
        assert estimator().size(12) == 12 and estimator().passes == 0
