"""Token files of every format read equal, and each kind of damage is refused by the name of its file."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import InMemory
from test_collectives import in_two_processes

from sophia_train.assembly import open_splits
from sophia_train.collectives import gather
from sophia_train.data.prepare import prepare
from sophia_train.data.token_files import LLMC_MAGIC, TokenFiles, Tokens, open_prepared
from sophia_train.data.tokenizers import Bytes
from sophia_train.data.units import ByKey, Document
from sophia_train.errors import DataError, MissingInputError

MakeTokens = Callable[..., Tokens]


def write_raw(path: Path, ids: np.ndarray) -> Path:
    ids.astype("<u2").tofile(path)
    return path


def write_llmc(path: Path, ids: np.ndarray, *, tokens: int | None = None, version: int = 1) -> Path:
    header = np.zeros(256, dtype="<i4")
    header[:3] = LLMC_MAGIC, version, len(ids) if tokens is None else tokens
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    return path


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50257, 1000)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A prepared folder with several shards in each split."""
    folder = tmp_path / "prepared"
    documents = [Document(f"{i}", [bytes(range(i, i + 20))]) for i in range(40)]
    prepare(
        folder,
        [InMemory(f"{i}", documents[i : i + 4]) for i in range(0, 40, 4)],
        Bytes(),
        source="test",
        revision="1",
        rule=ByKey(0.3),
        validation_shard_tokens=100,
    )
    return folder


def everything(tokens: Tokens) -> list[int]:
    return tokens.read(0, len(tokens)).tolist()


def test_reading_is_slicing_whatever_the_shards(make_tokens: MakeTokens, ids: np.ndarray) -> None:
    tokens = make_tokens(ids, (1, 2, 2, 300, 999))
    assert (len(tokens), tokens.n_shards, len(tokens.shards)) == (1000, 5, 5)  # the empty one is left out
    generator = np.random.default_rng(1)
    for start, stop in [(0, 0), (0, 1000), (1000, 1000), *np.sort(generator.integers(0, 1001, (200, 2)))]:
        part = tokens.read(int(start), int(stop - start))
        assert part.dtype == np.int64
        assert np.array_equal(part, ids[start:stop])
    for start, count in [(-1, 1), (0, 1001), (1000, 1), (5, -1)]:
        with pytest.raises(IndexError):
            tokens.read(start, count)


def test_nanogpt_and_llmc_files_read_equal(tmp_path: Path, ids: np.ndarray) -> None:
    train, validation = ids[:900], ids[900:]
    nanogpt, llmc = tmp_path / "nanogpt", tmp_path / "llmc"
    nanogpt.mkdir()
    llmc.mkdir()
    single = write_raw(nanogpt / "train.bin", train)
    write_raw(nanogpt / "val.bin", validation)
    for number, part in enumerate(np.split(train, [1, 500])):
        write_llmc(llmc / f"fineweb_train_{number:06d}.bin", part)
    held_out = write_llmc(llmc / "fineweb_val_000000.bin", validation)
    for data in (
        TokenFiles(path=str(nanogpt)),
        TokenFiles(path=str(llmc)),
        TokenFiles(path=str(single), validation_path=str(held_out)),
    ):
        data.prepare()
        assert everything(data.open("train")) == train.tolist()
        assert everything(data.open("validation")) == validation.tolist()
    assert TokenFiles(path=str(llmc)).open("train").n_shards == 3


def test_a_prepared_folder_opens_as_it_was_written(prepared: Path) -> None:
    data = TokenFiles(path=str(prepared), tokenizer="bytes")
    data.prepare()
    for split in ("train", "validation"):
        assert data.open(split).n_shards > 1  # type: ignore[arg-type]
        shards = sorted(prepared.glob(f"{split}_*.bin"))
        expected = np.concatenate([np.fromfile(path, "<u2") for path in shards])
        assert everything(data.open(split)) == expected.tolist()  # type: ignore[arg-type]


def assert_refused(data: TokenFiles, kind: type[Exception], *parts: str) -> None:
    with pytest.raises(kind) as error:
        data.prepare()
        data.open("train")
        data.open("validation")
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("shard", ["train_00000.bin", "train_00001.bin", "validation_00000.bin"])
@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (truncate, DataError, "truncated or altered: "),
        (lengthen, DataError, "truncated or altered: "),
        (flip_one_bit, DataError, "altered: its SHA-256"),
        (Path.unlink, MissingInputError, "is missing"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(
    prepared: Path, shard: str, damage: Callable[[Path], None], kind: type[Exception], says: str
) -> None:
    damage(prepared / shard)
    assert_refused(TokenFiles(path=str(prepared), tokenizer="bytes"), kind, shard, says, "anew")


def test_unverified_opening_checks_sizes_only(prepared: Path) -> None:
    data = TokenFiles(path=str(prepared), tokenizer="bytes", verify=False)
    flip_one_bit(prepared / "train_00000.bin")
    assert len(data.open("train"))
    truncate(prepared / "train_00000.bin")
    assert_refused(data, DataError, "train_00000.bin")


def test_another_tokenizer_is_refused(prepared: Path) -> None:
    assert_refused(
        TokenFiles(path=str(prepared)),
        DataError,
        str(prepared),
        "tokenizer=bytes",
        "data.tokenizer=gpt2",
    )


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"shards": {"train": []}},
        {"shards": {"train": [{"file": "../x.bin", "tokens": 1, "sha256": ""}], "validation": []}},
        {"shards": {"train": [{"file": "x.bin", "tokens": "many", "sha256": ""}], "validation": []}},
        {"shards": {"train": [{"file": "x.bin"}], "validation": []}},
        {"shards": None},
        {"surprise": 1},
    ],
)
def test_a_damaged_manifest_is_refused(prepared: Path, change: dict[str, object]) -> None:
    path = prepared / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert_refused(TokenFiles(path=str(prepared), tokenizer="bytes"), DataError, "manifest.json is damaged")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_is_refused_by_its_version(prepared: Path, version: object) -> None:
    path = prepared / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": version}))
    data = TokenFiles(path=str(prepared), tokenizer="bytes")
    assert_refused(data, DataError, "manifest.json", f"format_version={version}", "update")


@pytest.mark.parametrize("content", [b"", b'{"format', b"\xff", b"[]"])
def test_a_manifest_that_cannot_be_read_is_refused(prepared: Path, content: bytes) -> None:
    (prepared / "manifest.json").write_bytes(content)
    assert_refused(TokenFiles(path=str(prepared), tokenizer="bytes"), DataError, "manifest.json")


def test_a_folder_without_manifest_is_not_prepared(prepared: Path) -> None:
    (prepared / "manifest.json").unlink()
    with pytest.raises(MissingInputError, match="prepared is not a prepared data folder.*prepare_data"):
        open_prepared(prepared, "train", "bytes", verify=True)


def open_on_two(path: Path, rank: int) -> list[list[str]]:
    """Open a folder's tokens on one of two processes; returns the names of the files that each verified."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    verified, read, digest = [], Tokens.read, hashlib.file_digest

    def read_tokens(tokens: Tokens, start: int, count: int) -> np.ndarray:
        verified.append(tokens.shards[0].path.name)
        return read(tokens, start, count)

    def digest_file(file: Any, kind: str) -> Any:
        verified.append(Path(file.name).name)
        return digest(file, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokens, "read", read_tokens)
        patch.setattr(hashlib, "file_digest", digest_file)
        data = TokenFiles(path=str(path), tokenizer="bytes")
        open_splits(data, SimpleNamespace(local_process_index=rank))  # type: ignore[arg-type]
    return gather(verified)


def verify_shares(path: Path, rank: int) -> None:
    by_process = open_on_two(path, rank)
    assert all(by_process)
    assert sorted(name for each in by_process for name in each) == sorted(f.name for f in path.glob("*.bin"))


def refuse(path: Path, damaged: str, rank: int) -> None:
    with pytest.raises(DataError, match=damaged):
        open_on_two(path, rank)


@pytest.mark.parametrize("kind", ["prepared", "raw"])
def test_of_two_processes_each_verifies_a_share_and_both_refuse_damage(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("prepared") if kind == "prepared" else tmp_path
    if kind == "raw":
        for number in range(3):
            write_raw(folder / f"train_{number}.bin", np.arange(200) % 256)
            write_raw(folder / f"val_{number}.bin", np.arange(100) % 256)
    in_two_processes(functools.partial(verify_shares, folder))
    damaged = sorted(folder.glob("*.bin"))[1]  # of the share of one
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    in_two_processes(functools.partial(refuse, folder, damaged.name))


def test_llmc_files_must_agree_with_their_header(tmp_path: Path, ids: np.ndarray) -> None:
    write_raw(tmp_path / "val.bin", ids)
    data = TokenFiles(path=str(tmp_path))
    path = tmp_path / "train.bin"
    for tokens in (999, 1001):
        write_llmc(path, ids, tokens=tokens)
        assert_refused(data, DataError, "train.bin is truncated or altered", f"{tokens:,}", "copy it again")
    write_llmc(path, ids, version=2)
    assert_refused(data, DataError, "train.bin", "version 2")
    write_llmc(path, ids)
    truncate(path)
    assert_refused(data, DataError, "train.bin is truncated or altered")


@pytest.mark.parametrize("size", [0, 1, 11, 2001])
def test_raw_files_are_whole_tokens(tmp_path: Path, ids: np.ndarray, size: int) -> None:
    write_raw(tmp_path / "train.bin", ids)
    (tmp_path / "val.bin").write_bytes(bytes(size))
    assert_refused(TokenFiles(path=str(tmp_path)), DataError, "val.bin is truncated", f"{size:,} bytes")


def test_ids_outside_the_vocabulary_are_refused(
    tmp_path: Path, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sophia_train.data.token_files.SCAN_TOKENS", 64)
    write_raw(tmp_path / "train.bin", ids)
    write_llmc(tmp_path / "val.bin", np.append(ids, 50257))
    data = TokenFiles(path=str(tmp_path))
    assert_refused(data, DataError, "val.bin holds token 50257", "data.tokenizer=gpt2 has only 50257")
    assert len(TokenFiles(path=str(tmp_path), verify=False).open("validation")) == 1001
    write_llmc(tmp_path / "val.bin", np.append(ids, 50256))
    data.open("validation")


def test_what_is_not_there_is_named(tmp_path: Path, ids: np.ndarray) -> None:
    assert_refused(TokenFiles(path=str(tmp_path / "no")), MissingInputError, "data.path=", "does not exist")
    assert_refused(TokenFiles(path=str(tmp_path)), MissingInputError, "no manifest.json and no *train*.bin")
    file = write_raw(tmp_path / "train.bin", ids)
    assert_refused(TokenFiles(path=str(tmp_path)), MissingInputError, "no *val*.bin")
    assert_refused(TokenFiles(path=str(file)), MissingInputError, "set data.validation_path")
    missing = TokenFiles(path=str(file), validation_path=str(tmp_path / "val.bin"))
    assert_refused(missing, MissingInputError, "val.bin is missing")
