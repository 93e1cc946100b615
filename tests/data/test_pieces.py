"""Long text in pieces: all of it, bounded, and the same tokens."""

import os
import random

import pytest

from sophia_train.data import pieces
from sophia_train.data.tokenizers import load_tokenizer

WORDS = ["the", " quick", "'s", "\n", "\n\n", " ", "  \n", "\t", "9", "...", "é", "\u2028", "\x1c", "\xa0"]


@pytest.mark.parametrize("alphabet", ["ab\n", "a \n", "a", "\n", "é世\n\u2028 "])
def test_pieces_add_up_and_are_bounded(monkeypatch: pytest.MonkeyPatch, alphabet: str) -> None:
    monkeypatch.setattr(pieces, "CHUNK_CHARACTERS", 50)
    monkeypatch.setattr(pieces, "LONGEST_PIECE", 400)
    text = "".join(random.Random(0).choices(alphabet, k=3000))
    found = list(pieces.cut(text))
    assert "".join(found) == text
    assert max(map(len, found)) <= 450 and len(found) > 5


@pytest.mark.parametrize("text", ["", "x", "a\nb" * 16])
def test_short_text_is_one_piece(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(pieces, "CHUNK_CHARACTERS", 50)
    assert list(pieces.cut(text)) == [text]


@pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="GPT-2's vocabulary is not cached")
@pytest.mark.parametrize("chunk", [1, 20, 1000])
def test_gpt2_tokens_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(pieces, "CHUNK_CHARACTERS", chunk)
    tokenizer = load_tokenizer("gpt2")
    text = "".join(random.Random(0).choices(WORDS, k=4000))
    found = list(pieces.cut(text))
    assert len(found) > 5
    assert [i for piece in found for i in tokenizer.encode(piece)] == tokenizer.encode(text)
