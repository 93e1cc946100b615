"""The order of training data: exact on any number of ranks, every block once an epoch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sophia_train.data import batches as batches_module
from sophia_train.data.batches import Batches, document_blocks, permute, validation_blocks
from sophia_train.data.token_files import Tokens
from sophia_train.errors import ConfigError, DataError

MakeTokens = Callable[..., Tokens]

SIZES = [*range(1, 40), 63, 64, 65, 100, 101, 1023, 1024, 1025, 4099]


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1])
def test_permute_is_a_permutation_of_every_size(key: int) -> None:
    for size in SIZES:
        assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permute_maps_each_index_alone() -> None:
    whole = permute(np.arange(1000), 1000, 7)
    some = np.array([999, 0, 5, 5, 123])
    assert np.array_equal(permute(some, 1000, 7), whole[some])


def test_permute_sends_every_index_everywhere_equally_often() -> None:
    for size in (2, 3, 7, 16):
        keys = 100 * size
        counts = np.zeros((size, size))
        for key in range(keys):
            counts[np.arange(size), permute(np.arange(size), size, key)] += 1
        expected = keys / size
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        freedom = (size - 1) ** 2
        assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_permute_leaves_no_order_between_neighbours() -> None:
    order = permute(np.arange(100_000), 100_000, 3)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("n_tokens", "block_size", "batch_size"), [(101, 4, 7), (100, 1, 99), (64, 9, 7), (33, 4, 8), (30, 7, 1)]
)
def test_every_block_comes_once_an_epoch(
    make_tokens: MakeTokens, n_tokens: int, block_size: int, batch_size: int
) -> None:
    batches = Batches(make_tokens(np.arange(n_tokens)), block_size=block_size, batch_size=batch_size, seed=1)
    n_blocks = (n_tokens - 1) // block_size
    epochs = 5
    steps = -(-n_blocks * epochs // batch_size)
    starts = torch.cat([batches.batch(step).inputs[:, 0] for step in range(steps)])
    every_block = list(range(0, n_blocks * block_size, block_size))
    orders = starts[: n_blocks * epochs].view(epochs, n_blocks).tolist()
    assert all(sorted(order) == every_block for order in orders)
    if n_blocks > 5:
        assert len({tuple(order) for order in orders}) == epochs


def test_targets_are_the_tokens_after_the_inputs(make_tokens: MakeTokens) -> None:
    ids = np.random.default_rng(0).integers(0, 70_000, 500)
    batches = Batches(make_tokens(ids, (130, 131, 400)), block_size=16, batch_size=6, seed=3)
    assert batches.n_blocks == 31
    blocks = {tuple(ids[i * 16 : i * 16 + 17].tolist()) for i in range(31)}
    for step in range(12):
        batch = batches.batch(step)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.shape == batch.targets.shape == (6, 16)
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        rows = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)
        assert {tuple(row) for row in rows.tolist()} <= blocks


def test_the_order_is_a_function_of_the_seed_alone(make_tokens: MakeTokens) -> None:
    def order(seed: int, steps: list[int]) -> list[list[int]]:
        tokens = make_tokens(np.arange(400))
        batches = Batches(tokens, block_size=4, batch_size=8, seed=seed)
        found = {step: batches.batch(step).inputs[:, 0].tolist() for step in steps}
        return [found[step] for step in sorted(steps)]

    forwards = order(5, list(range(30)))
    assert order(5, list(range(30))[::-1]) == forwards  # no state: any order of asking
    assert order(6, list(range(30))) != forwards


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_together_have_the_same_batch(make_tokens: MakeTokens, world_size: int) -> None:
    tokens = make_tokens(np.arange(1000))
    alone = Batches(tokens, block_size=10, batch_size=12, seed=9)
    ranks = [
        Batches(tokens, block_size=10, batch_size=12, seed=9, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in range(25):  # over three epochs, which end inside a batch
        expected = alone.batch(step)
        assert expected.sequences == list(range(12))
        seen = []
        for rank, batches in enumerate(ranks):
            inputs, targets, sequences = batches.batch(step)
            assert sequences == list(range(rank, 12, world_size))
            assert torch.equal(inputs, expected.inputs[sequences])
            assert torch.equal(targets, expected.targets[sequences])
            seen += sequences
        assert sorted(seen) == expected.sequences


def test_shards_change_nothing(make_tokens: MakeTokens) -> None:
    ids = np.random.default_rng(1).integers(0, 50257, 300)
    one = Batches(make_tokens(ids), block_size=8, batch_size=4, seed=2)
    many = Batches(make_tokens(ids, (1, 2, 9, 100, 100, 299)), block_size=8, batch_size=4, seed=2)
    for step in range(12):
        for a, b in zip(one.batch(step), many.batch(step), strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_less_than_a_batch_is_refused_with_the_numbers(make_tokens: MakeTokens) -> None:
    tokens = make_tokens(np.arange(80))
    with pytest.raises(DataError) as error:
        Batches(tokens, block_size=10, batch_size=8, seed=1)
    for part in ("80 training tokens", "7 blocks", "block_size=10", "batch_size=8", "use"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert Batches(make_tokens(np.arange(81)), block_size=10, batch_size=8, seed=1).n_blocks == 8
    with pytest.raises(DataError, match="0 training tokens"):
        Batches(make_tokens(np.arange(0)), block_size=10, batch_size=8, seed=1)


def test_ranks_that_cannot_share_a_batch_are_refused(make_tokens: MakeTokens) -> None:
    with pytest.raises(ConfigError, match="batch_size=6 is not a multiple of the 4 processes"):
        Batches(make_tokens(np.arange(100)), block_size=2, batch_size=6, seed=1, world_size=4)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 40])
def test_validation_has_each_token_once_and_equal_work_for_all(
    make_tokens: MakeTokens, world_size: int, micro_batch_size: int
) -> None:
    tokens = make_tokens(np.arange(1, 105), (50,))  # 103 targets are 25 blocks of 4, with 3 left over
    ranks = [validation_blocks(tokens, 4, rank, world_size, micro_batch_size) for rank in range(world_size)]
    assert len({len(blocks) for blocks in ranks}) == 1
    seen = []
    for blocks in ranks:
        assert len(blocks) == len(list(blocks))
        for inputs, targets in blocks:
            assert inputs.shape == targets.shape == (micro_batch_size, 4)
            counted = targets >= 0
            assert torch.equal(counted.all(dim=1), counted.any(dim=1))  # a row counts, or none of it
            assert torch.equal(targets[counted], inputs[counted] + 1)
            assert (targets[~counted] == -1).all()
            seen += targets[counted].tolist()
    assert sorted(seen) == list(range(2, 102))


def test_validation_blocks_go_to_ranks_in_turn(make_tokens: MakeTokens) -> None:
    tokens = make_tokens(np.arange(100))
    for rank in range(3):
        blocks = validation_blocks(tokens, 9, rank, 3, 2)
        starts = [int(row[0]) for inputs, targets in blocks for row in inputs[targets[:, 0] >= 0]]
        assert starts == list(range(0, 99, 9))[rank::3]


def test_validation_is_the_same_each_time(make_tokens: MakeTokens) -> None:
    blocks = validation_blocks(make_tokens(np.arange(50)), 4, 0, 1, 3)
    first, second = list(blocks), list(blocks)
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )
    assert torch.equal(blocks[-1][0], first[-1][0])
    assert len(blocks[1:3]) == 2 and torch.equal(blocks[1:3][0][0], first[1][0])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_max_tokens_takes_the_first_blocks(make_tokens: MakeTokens) -> None:
    tokens = make_tokens(np.arange(100))
    for max_tokens, expected in [(4, 4), (39, 36), (40, 40), (10_000, 96)]:
        targets = torch.cat([t for _, t in validation_blocks(tokens, 4, 0, 1, 2, max_tokens)])
        assert targets[targets >= 0].tolist() == list(range(1, expected + 1))
    with pytest.raises(ConfigError, match="3 validation tokens"):
        validation_blocks(tokens, 4, 0, 1, 2, max_tokens=3)


def test_less_than_a_validation_block_is_refused(make_tokens: MakeTokens) -> None:
    with pytest.raises(DataError, match="4 validation tokens are less than one block of block_size=4"):
        validation_blocks(make_tokens(np.arange(4)), 4, 0, 1, 1)
    assert len(validation_blocks(make_tokens(np.arange(5)), 4, 0, 1, 1)) == 1


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_no_block_starts_within_a_document(
    make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    monkeypatch.setattr(batches_module, "SCAN_TOKENS", 37)
    generator = np.random.default_rng(0)
    ids = np.where(generator.random(3000) < 0.05, 9, generator.integers(0, 9, 3000))
    tokens = make_tokens(ids, (500, 501, 2000))
    starts = document_blocks(tokens, block_size, end_of_text=9)
    assert (ids[starts] == 9).all()
    ends = np.concatenate([[0], starts + block_size])
    for before, start in zip(ends, np.append(starts, len(ids) - block_size), strict=True):
        assert start >= before or start == len(ids) - block_size  # blocks do not overlap
        assert not (ids[before:start] == 9).any()  # and none could have started earlier
    batches = Batches(tokens, block_size=block_size, batch_size=5, seed=1, starts=starts)
    assert batches.n_blocks == len(starts)
    steps = -(-len(starts) // 5)
    seen = np.concatenate([batches.batch(step).inputs.numpy() for step in range(steps)])[: len(starts)]
    assert sorted(map(tuple, seen)) == sorted(tuple(ids[start : start + block_size]) for start in starts)
    targets = batches.batch(0).targets.numpy()
    assert (batches.batch(0).inputs.numpy()[:, 1:] == targets[:, :-1]).all()


def test_text_without_ends_has_no_such_blocks(make_tokens: MakeTokens) -> None:
    tokens = make_tokens(np.zeros(100, dtype=int))
    assert len(document_blocks(tokens, 10, end_of_text=9)) == 0
    with pytest.raises(DataError, match="make 0 blocks"):
        Batches(tokens, block_size=10, batch_size=1, seed=0, starts=np.empty(0, dtype=np.int64))
