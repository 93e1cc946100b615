"""The order of training data: every batch is a pure function of the seed and the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from sophia_train.data.token_files import SCAN_TOKENS, Tokens
from sophia_train.errors import ConfigError, DataError
from sophia_train.seeds import derive

FEISTEL_ROUNDS = 8
IGNORE_INDEX = -1  # targets that carry no weight in the loss


class Batch(NamedTuple):
    """One rank's part of a global batch.

    Args:
        inputs: int64 [n_local, T].
        targets: int64 [n_local, T], the inputs shifted by one token.
        sequences: the index of each row in the global batch.
    """

    inputs: Tensor
    targets: Tensor
    sequences: list[int]


def document_blocks(tokens: Tokens, block_size: int, end_of_text: int) -> np.ndarray:
    """Choose blocks none of which starts within a document; attention stays plain causal.

    Each block starts at the first end of text, which precedes a document, at or after the end of the block
    before; a document that goes on beyond its block loses the rest. Reads all tokens once.

    Args:
        tokens: of a split.
        block_size: T, tokens per block; one more is needed, for the last target.
        end_of_text: the token between documents.

    Returns:
        int64 [n_blocks], the first position of each.
    """
    found = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(tokens), SCAN_TOKENS):
        part = tokens.read(start, min(SCAN_TOKENS, len(tokens) - start))
        found.append(np.flatnonzero(part == end_of_text) + start)
    documents = np.concatenate(found)
    following = np.searchsorted(documents, documents + block_size).tolist()
    chosen, at = [], 0
    last = len(tokens) - block_size - 1
    while at < len(documents) and documents[at] <= last:
        chosen.append(at)
        at = following[at]
    return documents[chosen]


class Batches:
    """Batches of fixed blocks, in a new order every epoch.

    Block b covers inputs [b T, b T + T) and targets one token later, so n tokens make (n - 1) // T blocks;
    or it starts where `starts` says.
    Sequence number step * batch_size + i of the run is block `permute(number % n_blocks)` of epoch
    number // n_blocks: every block once an epoch, with no state but the step. Row i of a global batch goes to
    rank i mod W, so the global batch is the same on any number of ranks.

    Args:
        tokens: the training split.
        block_size: T, tokens per sequence.
        batch_size: sequences per step over all ranks.
        seed: the run's seed.
        rank: which of the `world_size` ranks this is.
        world_size: W, the number of ranks.
        starts: int64 [n_blocks], where blocks start, as of `document_blocks`; None puts them end to end.

    Raises:
        DataError: there are fewer blocks than sequences in a batch.
        ConfigError: the ranks do not share the batch evenly.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        block_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        starts: np.ndarray | None = None,
    ) -> None:
        self.n_blocks = max(0, len(tokens) - 1) // block_size if starts is None else len(starts)
        if batch_size % world_size:
            raise ConfigError(f"batch_size={batch_size} is not a multiple of the {world_size} processes")
        if self.n_blocks < batch_size:
            raise DataError(
                f"{len(tokens):,} training tokens make {self.n_blocks} blocks of block_size={block_size}, "
                f"fewer than batch_size={batch_size}; use more text, or a smaller batch_size or block_size"
            )
        self._tokens = tokens
        self._block_size = block_size
        self._batch_size = batch_size
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._starts = starts

    def batch(self, step: int) -> Batch:
        """Return this rank's part of the batch of `step`, counted from 0."""
        sequences = range(self._rank, self._batch_size, self._world_size)
        numbers = np.arange(sequences.start, sequences.stop, sequences.step) + step * self._batch_size
        epochs, positions = np.divmod(numbers, self.n_blocks)
        blocks = np.empty_like(positions)
        for epoch in np.unique(epochs):
            key = derive(self._seed, "data order", int(epoch))
            here = epochs == epoch
            blocks[here] = permute(positions[here], self.n_blocks, key)
        starts = blocks * self._block_size if self._starts is None else self._starts[blocks]
        return Batch(*_read_blocks(self._tokens, starts, self._block_size), list(sequences))


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Map indices in [0, size) by the permutation of [0, size) that `key` chooses, in O(1) memory.

    A Feistel network on pairs (left, right) in [0, a) x [0, a), a = ceil(sqrt(size)): each round replaces
    them by (right, (left + F(right)) mod a), which can be undone whatever F is. Results outside the range go
    through the network again until they fall inside (cycle walking: Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002); with a^2 - size < 2 a + 1 that is rare.

    Args:
        indices: int64 [n].
        size: of the domain.
        key: any integer; its lowest 64 bits count.

    Returns:
        int64 [n].
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    keys = _scramble(np.arange(1, FEISTEL_ROUNDS + 1, dtype=np.uint64) + np.uint64(key % 2**64))
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = np.divmod(values[outside], side)
        for round_key in keys:
            left, right = right, (left + _scramble(right ^ round_key) % side) % side
        values[outside] = left * side + right
        outside = values >= size
    return values.astype(np.int64)


def validation_blocks(
    tokens: Tokens,
    block_size: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    max_tokens: int | None = None,
) -> "ValidationBlocks":
    """Return one rank's fixed validation micro-batches: every block once over all ranks, block b to b mod W.

    Every rank gets the same number of micro-batches of the same shape, so that all make equal forwards; rows
    that this takes beyond the blocks have targets of -1 only.

    Args:
        tokens: the validation split.
        block_size: T, tokens per block.
        rank: which of the `world_size` ranks this is.
        world_size: W, the number of ranks.
        micro_batch_size: rows per micro-batch.
        max_tokens: use the first blocks only, no more target tokens than this.

    Raises:
        DataError: there is less than one block.
        ConfigError: `max_tokens` is less than one block.
    """
    n_blocks = max(0, len(tokens) - 1) // block_size
    if not n_blocks:
        raise DataError(
            f"{len(tokens):,} validation tokens are less than one block of block_size={block_size}; use more "
            "text, a larger data.validation_fraction or a smaller block_size"
        )
    if max_tokens is not None:
        if max_tokens < block_size:
            raise ConfigError(
                f"{max_tokens} validation tokens are less than block_size={block_size}; use at least that"
            )
        n_blocks = min(n_blocks, max_tokens // block_size)
    return ValidationBlocks(tokens, block_size, rank, world_size, micro_batch_size, n_blocks)


@dataclass(frozen=True, eq=False)
class ValidationBlocks(Sequence[tuple[Tensor, Tensor]]):
    """Micro-batches (inputs, targets), each int64 [micro_batch_size, T]; made by `validation_blocks`."""

    tokens: Tokens
    block_size: int
    rank: int
    world_size: int
    micro_batch_size: int
    n_blocks: int

    def __len__(self) -> int:
        rows = -(-self.n_blocks // self.world_size)
        return -(-rows // self.micro_batch_size)

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Tensor, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor] | Sequence[tuple[Tensor, Tensor]]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self[number] for number in numbers]
        rows = np.arange(self.micro_batch_size) + numbers * self.micro_batch_size
        blocks = rows * self.world_size + self.rank
        blocks = blocks[blocks < self.n_blocks]
        shape = (self.micro_batch_size, self.block_size)
        inputs = torch.zeros(shape, dtype=torch.int64)
        targets = torch.full(shape, IGNORE_INDEX)
        inputs[: len(blocks)], targets[: len(blocks)] = _read_blocks(
            self.tokens, blocks * self.block_size, self.block_size
        )
        return inputs, targets


def _read_blocks(tokens: Tokens, starts: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
    rows = np.empty((len(starts), block_size + 1), dtype=np.int64)
    for row, start in zip(rows, starts, strict=True):
        row[:] = tokens.read(int(start), block_size + 1)
    pairs = torch.from_numpy(rows)
    return pairs[:, :-1].contiguous(), pairs[:, 1:].contiguous()


def _scramble(x: np.ndarray) -> np.ndarray:
    """Mix 64 bits (the SplitMix64 generator: Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
