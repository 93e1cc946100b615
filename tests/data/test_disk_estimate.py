"""What a preparation says it needs, beside what it then takes."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest

from sophia_train.data import sources
from sophia_train.data.base import SPLITS
from sophia_train.data.disk_estimate import DiskEstimate, estimate, text_bytes
from sophia_train.data.manifest import Manifest
from sophia_train.data.tokenizers import train_bpe


@pytest.mark.parametrize("kind", ["bytes", "file", "gz"])
def test_it_is_near_what_is_taken(tmp_path: Path, kind: str) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    text = "the quick brown fox jumps over the lazy dog\n" * 3000
    tokenizer = "bytes"
    if kind == "gz":
        words = np.random.default_rng(0).integers(97, 110, 200_000).astype(np.uint8).tobytes()
        (texts / "long.txt.gz").write_bytes(gzip.compress(words))
    else:
        (texts / "long.txt").write_text(text)
    if kind == "file":
        tokenizer = str(tmp_path / "made.json")
        Path(tokenizer).write_text(train_bpe([text], 300))
    folder = tmp_path / "not" / "there" / "yet"
    data = sources.Text(path=str(texts), folder=str(folder), tokenizer=tokenizer)
    found = estimate(folder, data.units(), data.load_tokenizer())
    assert found.stored == sum(path.stat().st_size for path in texts.iterdir())
    assert found.place == tmp_path and not folder.exists()
    data.prepare()
    record = Manifest.read(folder)
    assert 0.5 < found.needed / (2 * sum(map(record.tokens, SPLITS))) < 2
    assert 0.5 < text_bytes(data.units()) / record.text_bytes < 2


def test_the_free_space_is_that_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(path), usage._replace(free=7))[1])
    found = estimate(tmp_path / "new", [], sources.PythonStdlib().load_tokenizer())
    assert (found.free, found.needed, asked) == (7, 0, [tmp_path])


def test_it_is_said_in_a_line() -> None:
    found = DiskEstimate(stored=328_079_870, needed=2.5e12, free=1000, place=Path("data"))
    assert found.describe() == "about 2.5 TB of tokens from 328 MB; 1.0 kB free"
    assert found.shortage() == (
        "data has 1.0 kB free, and about 2.5 TB are needed; make room, or choose another data.folder"
    )
