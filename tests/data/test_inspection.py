"""Looking into token files: counts against a plain loop, whatever the chunks, and in bounded memory."""

from pathlib import Path

import numpy as np
import pytest
from data.conftest import MakeTokens
from support import InMemory

from sophia_train.data.inspection import Contents, count, document_at, find_tokens, missing_units
from sophia_train.data.prepare import prepare
from sophia_train.data.sources import Text
from sophia_train.data.token_files import LLMC_MAGIC, Tokens
from sophia_train.data.tokenizers import Bytes
from sophia_train.data.units import ByKey, Document
from sophia_train.errors import DataError, MissingInputError

END = 0


def documents(generator: np.random.Generator, n: int) -> list[np.ndarray]:
    """Documents of lengths that a logarithmic scale spreads, some of them empty."""
    lengths = np.floor(2 ** generator.uniform(-1, 8, n)).astype(int)
    return [generator.integers(1, 50, length) for length in lengths]


def joined(texts: list[np.ndarray], precedes: bool) -> np.ndarray:
    end = np.array([END])
    return np.concatenate([part for text in texts for part in ((end, text) if precedes else (text, end))])


def bins(texts: list[np.ndarray]) -> list[int]:
    counts = [0] * 64
    for text in texts:
        counts[len(text).bit_length()] += 1
    return counts


@pytest.mark.parametrize("precedes", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 20])
def test_counts_are_exact_whatever_the_chunks(make_tokens: MakeTokens, precedes: bool, chunk: int) -> None:
    texts = documents(np.random.default_rng(0), 60)
    texts[0] = np.array([5, 6, 7])  # nanoGPT's files cannot begin with an empty one and be told apart
    ids = joined(texts, precedes)
    found = count(make_tokens(ids, cuts=(10, 500)), END, chunk=chunk)
    assert found.read == found.tokens == len(ids)
    assert found.lengths.tolist() == bins(texts) and found.documents == len(texts)
    assert found.longest == max(map(len, texts)) and found.length_sum == sum(map(len, texts))
    assert found.frequencies.tolist() == np.bincount(ids).tolist()


@pytest.mark.parametrize("precedes", [True, False])
def test_an_empty_document_at_the_end_counts(make_tokens: MakeTokens, precedes: bool) -> None:
    texts = [np.array([1, 2]), np.array([], dtype=int)]
    assert count(make_tokens(joined(texts, precedes)), END).lengths.tolist() == bins(texts)


def test_a_document_without_end_of_text_counts(make_tokens: MakeTokens) -> None:
    assert count(make_tokens(np.array([1, 2, 3])), END).lengths.tolist()[:4] == [0, 0, 1, 0]
    found = count(make_tokens(np.array([1, 2, END, 3])), END, chunk=2)
    assert found.documents == 2 and found.longest == 2


def test_no_tokens_are_no_documents() -> None:
    found = count(Tokens([]), END)
    assert (found.tokens, found.read, found.documents) == (0, 0, 0)


def test_of_much_a_part_is_read_from_everywhere(make_tokens: MakeTokens) -> None:
    generator = np.random.default_rng(1)
    texts = [generator.integers(1, 50, length) for length in generator.integers(1, 30, 5000)]
    ids = joined(texts, True)
    tokens = make_tokens(ids, cuts=(20_000,))
    reads: list[tuple[int, int]] = []
    read = tokens.read

    def watched(start: int, n: int) -> np.ndarray:
        reads.append((start, n))
        return read(start, n)

    tokens.read = watched  # type: ignore[method-assign]
    found = count(tokens, END, most=10_000, chunk=1000)
    assert found.read == 10_000 and found.tokens == len(ids)
    assert max(n for _, n in reads) <= 1000 and reads[-1][0] == len(ids) - 1000
    whole = count(tokens, END)
    assert found.lengths[6:].sum() == 0  # no two documents are taken for one
    share, true = (each.lengths[:6] / each.documents for each in (found, whole))
    assert np.abs(share - true).max() < 0.1
    assert found.length_sum / found.documents == pytest.approx(whole.length_sum / whole.documents, rel=0.1)


def test_bins_begin_at_powers_of_two() -> None:
    contents = Contents(0)
    contents.add_lengths(np.array([0, 1, 2, 3, 4, 7, 8, 1023, 1024, 2**40]))
    assert np.flatnonzero(contents.lengths).tolist() == [0, 1, 2, 3, 4, 10, 11, 41]


def test_documents_are_found_at_a_position_and_after_it(make_tokens: MakeTokens) -> None:
    tokens = make_tokens(np.array([END, 1, 2, END, 3, 4, 5, END]))
    assert document_at(tokens, END, 0, 10) == (1, [1, 2])
    assert document_at(tokens, END, 2, 10) == (4, [3, 4, 5])
    assert document_at(tokens, END, 2, 2) == (4, [3, 4])
    assert document_at(tokens, END, 5, 10) is None
    assert document_at(make_tokens(np.array([1, 2, END, 3])), END, 0, 10) == (0, [1, 2])
    assert document_at(make_tokens(np.array([1, 2, 3])), END, 1, 10) == (1, [2, 3])


def test_all_formats_are_found(tmp_path: Path) -> None:
    ids = np.arange(10, dtype="<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = LLMC_MAGIC, 1, 10
    (tmp_path / "fineweb_train_000001.bin").write_bytes(header.tobytes() + ids.tobytes())
    (tmp_path / "fineweb_val_000000.bin").write_bytes(ids.tobytes())
    record, splits = find_tokens(tmp_path)
    assert record is None and {split: len(tokens) for split, tokens in splits.items()} == {
        "train": 10,
        "validation": 10,
    }
    assert splits["train"].read(0, 10).tolist() == ids.tolist()
    _, one = find_tokens(tmp_path / "fineweb_val_000000.bin")
    assert {name: len(tokens) for name, tokens in one.items()} == {"fineweb_val_000000.bin": 10}
    (tmp_path / "fineweb_val_000000.bin").unlink()
    assert list(find_tokens(tmp_path)[1]) == ["train"]

    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("abcdefghij" * 10)
    Text(path=str(texts), folder=str(tmp_path / "prepared")).prepare()
    record, splits = find_tokens(tmp_path / "prepared")
    assert record is not None and record.text_bytes == 100
    assert sum(map(len, splits.values())) == 101
    path = tmp_path / "prepared" / "train_00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="truncated"):
        find_tokens(tmp_path / "prepared")


def test_what_is_not_there_is_missing_input(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(MissingInputError, match=str(path)):
            find_tokens(path)


def test_units_are_missing_until_they_are_done(tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    units = [
        InMemory(f"u{i}", [Document(f"{i}-{j}", [f"text {i} {j}"]) for j in range(20)]) for i in range(5)
    ]

    def work(share: tuple[int, int]) -> None:
        prepare(folder, units, Bytes(), source="test", revision="1", rule=ByKey(0.2), share=share)

    assert missing_units(folder, units) == [0, 1, 2, 3, 4]
    work((1, 2))
    assert missing_units(folder, units) == [0, 2, 4]
    work((0, 2))
    assert missing_units(folder, units) == []
    work((0, 1))
    assert missing_units(folder, units) == []
