"""Chunked losses against plain ones, and labels against the distribution they are drawn from."""

import math

import pytest
import torch
import torch.nn.functional as F

from sophia_train.models.labels import CLASSES, sample_labels, token_keys
from sophia_train.models.losses import (
    Head,
    cross_entropy,
    fused_cross_entropy,
    sampled_cross_entropy,
)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (3, 7), generator=generator)
    targets[1, 2] = targets[2, 6] = -1
    return hidden, weight, targets


def plain(hidden, weight, targets):
    logits = (hidden @ weight.T).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [1, 4, 20, 21, 100])
def test_chunked_equals_plain_to_the_second_derivative(case, chunk_tokens):
    hidden, weight, targets = case
    losses = [
        plain(hidden, weight, targets),
        cross_entropy(hidden, lambda h: h @ weight.T, targets, chunk_tokens),
    ]
    gradients = [torch.autograd.grad(loss, (hidden, weight), create_graph=True) for loss in losses]
    probes = [torch.randn_like(hidden), torch.randn_like(weight)]
    products = [
        torch.autograd.grad(sum((g * v).sum() for g, v in zip(gs, probes, strict=True)), (hidden, weight))
        for gs in gradients
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(products[1], products[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("words", [11, 9])  # all rows of the weight, or two that are padding
@pytest.mark.parametrize("chunk_tokens", [1, 4, 20, 21, 100])
def test_fused_equals_plain_and_is_scaled_by_what_is_behind_it(case, chunk_tokens, words):
    hidden, weight, targets = case
    targets = targets.clamp(max=words - 1)
    losses = [
        plain(hidden, weight[:words], targets),
        fused_cross_entropy(hidden, Head(weight, words), targets, chunk_tokens),
    ]
    gradients = [torch.autograd.grad(loss * 0.37, (hidden, weight)) for loss in losses]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)
    assert (gradients[1][1][words:] == 0).all()


def test_fused_draws_the_labels_that_plain_draws(case):
    hidden, weight, targets = case
    keys = token_keys(torch.tensor([5, 2**62, 7]), hidden.shape[1]).where(targets >= 0, -1)
    head = Head(weight, 9)
    losses = [sampled_cross_entropy(hidden, lambda h: h @ weight[:9].T, keys)]
    losses += [sampled_cross_entropy(hidden, head, keys, chunk) for chunk in (4, 100)]
    whole, *fused = [torch.autograd.grad(loss, (hidden, weight)) for loss in losses]
    for gradients in fused:
        torch.testing.assert_close(gradients, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [fused_cross_entropy, sampled_cross_entropy])
def test_fused_refuses_to_be_differentiated_twice(case, loss):
    hidden, weight, targets = case  # a tied weight, too: it is in the hidden states and in the head
    value = loss((hidden * weight.sum()).tanh(), Head(weight, 11), targets)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(value, weight, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.func.jvp(torch.func.grad(lambda w: loss(hidden, Head(w, 11), targets)), (weight,), (weight,))


def test_fused_makes_no_gradient_that_nobody_asks_for(case):
    hidden, weight, targets = case
    with torch.no_grad():
        loss = fused_cross_entropy(hidden, Head(weight, 11), targets, 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, targets))


@pytest.mark.parametrize("compiled", [False, True])
def test_fused_in_mixed_precision_is_as_exact_as_plain(compiled):
    """Against float64: probabilities near 1 must not lose their distance from it to bfloat16."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((2, 64, 32), (70, 32)))
    weight *= 3  # some predictions are all but certain
    targets = (hidden @ weight[:67].T).argmax(-1)

    def gradient(loss, *leaves):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss(*leaves), leaves)])

    exact = gradient(lambda h, w: plain(h, w[:67], targets), hidden.double(), weight.double())
    errors = []
    fused = torch.compile(fused_cross_entropy) if compiled else fused_cross_entropy
    for loss in (cross_entropy, fused):
        with torch.autocast("cpu", torch.bfloat16):
            made = gradient(lambda h, w, loss=loss: loss(h, Head(w, 67), targets, 50), hidden, weight)
        errors.append((made - exact).norm() / exact.norm())
    assert errors[1] < 1.2 * errors[0] < 0.2


def test_tokens_that_do_not_count_have_no_gradient(case):
    hidden, weight, targets = case
    cross_entropy(hidden, lambda h: h @ weight.T, targets, 4).backward()
    assert (hidden.grad[1, 2] == 0).all() and (hidden.grad[2, 6] == 0).all()
    assert (hidden.grad[0] != 0).any(dim=-1).all()


def test_half_precision_logits_are_summed_in_float32():
    hidden = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    loss = cross_entropy(
        hidden, lambda h: h @ torch.randn(5, 4, dtype=torch.bfloat16).T, torch.ones(2, 3).long()
    )
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("words", [2, 9, 300, CLASSES + 1, 5000])
def test_labels_follow_the_softmax(words):
    n = 100_000 if words < CLASSES else 20_000
    logits = torch.randn(words, generator=torch.Generator().manual_seed(words)) * 2
    keys = token_keys(torch.tensor([1]), n)[0].split(5000)
    labels = torch.cat([sample_labels(logits.expand(len(each), words), each) for each in keys])
    expected = logits.softmax(0) * n
    counts = torch.bincount(labels, minlength=words)
    chi_squared = ((counts - expected) ** 2 / expected)[expected > 5].sum().item()
    freedom = int((expected > 5).sum()) - 1
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


@pytest.mark.parametrize(
    ("rare", "tokens", "chance"),
    [(range(1, 301), 300_000, 1e-4), (range(CLASSES, 3 * CLASSES, CLASSES), 30_000, 1e-3)],
    ids=["in classes of their own", "in the class of a word that is not rare"],
)
def test_rare_words_are_drawn_as_often_as_they_should_be(rare, tokens, chance):
    # a rare word wins by very small noise: a coarse uniform has none
    logits = torch.full((rare[-1] + 1,), -torch.inf)
    logits[0], logits[list(rare)] = 0.0, math.log(chance / len(rare))
    drawn = 0
    for keys in token_keys(torch.tensor([1]), tokens)[0].split(5000):
        drawn += int((sample_labels(logits.expand(5000, -1), keys) > 0).sum())
    expected = tokens * chance
    assert abs(drawn - expected) < 4.5 * expected**0.5


def test_rounding_changes_labels_only_where_words_nearly_tie():
    """As often as it moves the distributions; the inverse of summed probabilities would change far more."""
    n, generator = 2000, torch.Generator().manual_seed(1)
    logits = torch.randn(n, 3 * CLASSES, generator=generator) * 2
    rounded = logits + torch.randn(logits.shape, generator=generator) * 0.03
    keys = token_keys(torch.tensor([1]), n)[0]
    changed = (sample_labels(logits, keys) != sample_labels(rounded, keys)).double().mean()
    moved = (logits.softmax(-1) - rounded.softmax(-1)).abs().sum(-1).mean() / 2  # total variation
    assert moved / 2 < changed < 3 * moved


def test_neighbouring_tokens_and_sequences_draw_independently():
    keys = token_keys(torch.arange(400), 400)
    labels = sample_labels(torch.zeros(keys.numel(), 2), keys.flatten()).view(400, 400).float() * 2 - 1
    n = labels.numel()
    shifts = [(labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])]
    shifts += [(labels[1:, 1:], labels[:-1, :-1]), (labels[1:, :-1], labels[:-1, 1:])]
    for one, other in shifts:
        assert abs((one * other).mean()) < 5 / n**0.5


def test_labels_do_not_depend_on_the_chunk_or_the_micro_batch(case):
    hidden, weight, _ = case
    keys = token_keys(torch.tensor([5, 2**62, 7]), hidden.shape[1])

    def head(h):
        return h @ weight.T

    def gradient(*losses):
        return torch.autograd.grad(sum(losses), weight)[0]

    whole = gradient(sampled_cross_entropy(hidden, head, keys))
    chunked = gradient(sampled_cross_entropy(hidden, head, keys, 4))
    rows = gradient(*(sampled_cross_entropy(hidden[i : i + 1], head, keys[i : i + 1]) for i in range(3)))
    other = gradient(sampled_cross_entropy(hidden, head, keys + 1))
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows, whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(other, whole)
