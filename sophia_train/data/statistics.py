"""What counting alone achieves on a text: the losses that a trained model must beat."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from sophia_train.data.token_files import Tokens

CHUNK_TOKENS = 1 << 20
LARGEST_BIGRAM_VOCABULARY = 4096  # counts are a dense table: 128 MiB at this size


def ngram_cross_entropy(train: Tokens, validation: Tokens, vocab_size: int, order: Literal[1, 2]) -> float:
    """Return the cross-entropy of validation text under a unigram or bigram model of the training text.

    Unigram: p(w) = (c(w) + 1) / (N + V). Bigram: p(w | v) = (c(v, w) + V p(w)) / (c(v) + V), so that a pair
    never seen falls back to the unigram (MacKay and Bauman Peto, "A hierarchical Dirichlet language model",
    1995, with its weight fixed to V). Both are measured on the same targets, all but the first token.

    Args:
        train: what to count.
        validation: what to predict, at least two tokens.
        vocab_size: V; at most 4,096 for bigrams.
        order: 1 for unigrams, 2 for bigrams.

    Returns:
        Nats per token.

    Raises:
        ValueError: the vocabulary is too large to count its pairs, or there is nothing to predict.
    """
    if order == 2 and vocab_size > LARGEST_BIGRAM_VOCABULARY:
        raise ValueError(f"{vocab_size} words have too many bigrams; at most {LARGEST_BIGRAM_VOCABULARY}")
    if len(validation) < 2:
        raise ValueError(f"{len(validation)} validation tokens leave nothing to predict")
    v = vocab_size
    unigrams = np.zeros(v, dtype=np.int64)
    bigrams = np.zeros(v * v if order == 2 else 0, dtype=np.int64)
    for ids in _chunks(train):
        unigrams += np.bincount(ids[1:], minlength=v)
        if order == 2:
            bigrams += np.bincount(ids[:-1] * v + ids[1:], minlength=v * v)
    unigram = (unigrams + 1) / (unigrams.sum() + v)
    if order == 1:
        log_p = np.log(unigram)
        total = sum(float(log_p[ids[1:]].sum()) for ids in _chunks(validation))
    else:
        pairs = bigrams.reshape(v, v)
        log_p = np.log((pairs + v * unigram) / (pairs.sum(axis=1, keepdims=True) + v))
        total = sum(float(log_p[ids[:-1], ids[1:]].sum()) for ids in _chunks(validation))
    return -total / (len(validation) - 1)


def _chunks(tokens: Tokens) -> Iterator[np.ndarray]:
    """Yield runs of tokens that overlap by one, so that every pair is in exactly one of them."""
    for start in range(0, len(tokens) - 1, CHUNK_TOKENS):
        yield tokens.read(start, min(CHUNK_TOKENS + 1, len(tokens) - start))
