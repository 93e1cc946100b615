"""N-gram cross-entropies against counting with dictionaries."""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from sophia_train.data import statistics
from sophia_train.data.statistics import ngram_cross_entropy
from sophia_train.data.token_files import Tokens

MakeTokens = Callable[..., Tokens]
V = 11


def by_hand(train: list[int], validation: list[int], order: int) -> float:
    words = Counter(train[1:])
    pairs = Counter(zip(train, train[1:], strict=False))
    firsts = Counter(train[:-1])

    def p(previous: int, word: int) -> float:
        unigram = (words[word] + 1) / (len(train) - 1 + V)
        if order == 1:
            return unigram
        return (pairs[previous, word] + V * unigram) / (firsts[previous] + V)

    for previous in range(V):
        assert math.isclose(sum(p(previous, word) for word in range(V)), 1)
    targets = list(zip(validation, validation[1:], strict=False))
    return -sum(math.log(p(*pair)) for pair in targets) / len(targets)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_equals_counting_by_hand(
    make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch, order: int, chunk: int
) -> None:
    monkeypatch.setattr(statistics, "CHUNK_TOKENS", chunk)
    generator = np.random.default_rng(0)
    train = generator.integers(0, V - 2, 200)  # two words are never seen
    validation = generator.integers(0, V, 60)
    found = ngram_cross_entropy(make_tokens(train, (3, 90)), make_tokens(validation, (31,)), V, order)
    assert found == pytest.approx(by_hand(train.tolist(), validation.tolist(), order), rel=1e-12)


def test_a_bigram_source_has_its_entropy(make_tokens: MakeTokens) -> None:
    # each word is followed by one of two, at even odds: log 2 by pairs, log V by words
    steps = np.random.default_rng(1).integers(1, 3, 400_000)
    ids = np.cumsum(steps) % V
    train, validation = make_tokens(ids[:300_000]), make_tokens(ids[300_000:])
    assert ngram_cross_entropy(train, validation, V, 2) == pytest.approx(math.log(2), abs=1e-3)
    assert ngram_cross_entropy(train, validation, V, 1) == pytest.approx(math.log(V), abs=1e-3)


def test_what_cannot_be_counted_is_refused(make_tokens: MakeTokens) -> None:
    with pytest.raises(ValueError, match="too many bigrams"):
        ngram_cross_entropy(make_tokens(np.arange(9)), make_tokens(np.arange(9)), 50257, 2)
    with pytest.raises(ValueError, match="nothing to predict"):
        ngram_cross_entropy(make_tokens(np.arange(9)), make_tokens(np.arange(1)), V, 1)
