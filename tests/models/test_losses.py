"""Chunked losses against plain ones, and labels against the distribution they are drawn from."""

import pytest
import torch
import torch.nn.functional as F

from sophia_train.models.losses import cross_entropy, sample_labels, sampled_cross_entropy, token_keys


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


@pytest.mark.parametrize("words", [2, 9, 300])
def test_labels_follow_the_softmax(words):
    n = 100_000
    logits = torch.randn(words, generator=torch.Generator().manual_seed(words)) * 2
    labels = sample_labels(logits.expand(n, words), token_keys(torch.tensor([1]), n)[0])
    expected = logits.softmax(0) * n
    counts = torch.bincount(labels, minlength=words)
    chi_squared = ((counts - expected) ** 2 / expected)[expected > 5].sum().item()
    freedom = int((expected > 5).sum()) - 1
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_rare_words_are_drawn_as_often_as_they_should_be():
    # a rare word wins by very small noise: a coarse uniform has none
    rare = torch.full((1001,), 1e-7).log()
    rare[0] = 0.0
    drawn = 0
    for start in range(0, 300_000, 5000):
        labels = sample_labels(rare.expand(5000, 1001), token_keys(torch.tensor([start]), 5000)[0])
        drawn += int((labels > 0).sum())
    expected = 300_000 * 1e-4
    assert abs(drawn - expected) < 4.5 * expected**0.5


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
