"""Split rules: who is held out stays the same for ever, and by rows is what `datasets` would take."""

import pickle

import numpy as np
import pytest

from sophia_train.data.units import ByKey, ByRow, Document

NANOGPT = {"fraction": 0.0005, "seed": 2357}

# The test rows, in their order, of datasets 5.2.0: train_test_split(test_size=fraction, seed=2357)
DATASETS = {
    (1000, 0.0005): [388],
    (2000, 0.0005): [79],
    (2001, 0.0005): [79, 1706],
    (3999, 0.0005): [1788, 151],
    (4000, 0.0005): [1788, 151],
    (10_000, 0.0005): [8290, 1229, 4733, 8519, 1700],
    (10, 0.25): [8, 3, 0],
    (7, 0.1): [6],
    (700, 0.01): [476, 475, 360, 257, 401, 73, 258],
    # 0.07 * 300 is more than 21 in floating point
    (300, 0.07): [
        *(2, 99, 289, 142, 270, 197, 61, 189, 98, 4, 223),
        *(284, 18, 254, 259, 152, 155, 95, 23, 237, 182, 164),
    ],
}


def held_out(rule: ByRow) -> list[int]:
    rows = [Document("the same", [], row) for row in range(rule.rows)]
    return [document.row for document in rows if rule.split_of(document) == "validation"]


@pytest.mark.parametrize(("rows", "fraction"), DATASETS)
def test_rows_are_those_of_datasets(rows: int, fraction: float) -> None:
    assert held_out(ByRow(fraction, 2357, rows)) == sorted(DATASETS[rows, fraction])


@pytest.mark.parametrize(("rows", "fraction"), [(20_000, 0.0005), (1400, 0.07), (12_345, 0.3)])
@pytest.mark.parametrize("seed", [0, 2357])
def test_rows_are_the_first_of_a_permutation(rows: int, fraction: float, seed: int) -> None:
    first = np.random.default_rng(seed).permutation(rows)[: int(np.ceil(fraction * rows))]
    rule = ByRow(fraction, seed, rows)
    assert held_out(rule) == sorted(first.tolist())
    assert held_out(pickle.loads(pickle.dumps(rule))) == held_out(ByRow(fraction, seed, rows))
    assert rule == ByRow(fraction, seed, rows) and rule.describe() == f"rows, seed {seed}"


def test_openwebtext_holds_out_as_many_documents_as_nanogpt() -> None:
    assert len(ByRow(**NANOGPT, rows=8_013_769).held_out) == 4007  # as its README prints


def test_the_split_depends_on_the_key_alone() -> None:
    keys = [f"{i}.txt" for i in range(20_000)]

    def of(fraction: float) -> list[str]:
        return [key for key in keys if ByKey(fraction).split_of(Document(key, [], -1)) == "validation"]

    assert 0.045 < len(of(0.05)) / len(keys) < 0.055
    assert set(of(0.05)) < set(of(0.1))
    # written down, since it must stay the same for ever
    assert [key for key in of(0.05) if int(key[:-4]) < 100] == [
        "49.txt",
        "54.txt",
        "63.txt",
        "67.txt",
        "85.txt",
    ]
    assert ByKey(0.05).split_of(Document("49.txt", [b"other text"], 7)) == "validation"
    assert ByKey(0.05).split_of(Document("not UTF-8 \udcff", [])) == "train"
    assert ByKey(0.05).describe() == "documents"
