"""The Hub: what faults of a network do not change, and one clear line where it cannot go on."""

import gzip
import io
import json
import pickle
import random
import shlex
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hub_server import Hub, serving

from sophia_train.config import build, compose
from sophia_train.data import hub as hub_module
from sophia_train.data import hub_client, hub_files, parquet, pieces, text_files
from sophia_train.data.base import SPLITS, Split
from sophia_train.data.hub import HuggingFace
from sophia_train.data.hub_client import Patience
from sophia_train.data.hub_files import RangeFile
from sophia_train.data.manifest import Manifest
from sophia_train.data.prepare import prepare
from sophia_train.data.units import ByKey, Document, Unit
from sophia_train.errors import ConfigError, DataError, MissingInputError, RunError, UnavailableError

REPO = "owner/some-data"
FILES = [f"default/train/{number:04d}.parquet" for number in range(3)]


def texts_of_file(number: int, count: int = 60) -> list[str]:
    generator = random.Random(number)
    return [generator.randbytes(generator.randint(0, 40)).hex() + "é\n" for _ in range(count)]


def parquet_bytes(texts: list[Any], rows: int = 7, column: str = "text", **options: Any) -> bytes:
    """A file of several row groups, with a column beside the text."""
    table = pa.table({"id": list(range(len(texts))), column: texts, "score": [0.5] * len(texts)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows, **options)
    return buffer.getvalue()


CONTENT = {name: parquet_bytes(texts_of_file(number)) for number, name in enumerate(FILES)}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds waited for, which pass at once."""
    waited: list[float] = []
    monkeypatch.setattr(hub_client, "_sleep", waited.append)
    return waited


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[Hub]:
    """A server with one dataset, converted and as it was, and an empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(hub_module, "patience", Patience(read_seconds=0.3))
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.commit(REPO, "refs/convert/parquet", {**CONTENT, "README.md": b"#"})
        yield server
        hub_client._session().close()


def prepared(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts_in(data: HuggingFace, split: Split) -> list[str]:
    tokens = data.open(split)
    ids = tokens.read(0, len(tokens)).tolist()
    starts = [i for i, token in enumerate(ids) if token == 256] + [len(ids)]
    return [bytes(ids[a + 1 : b]).decode() for a, b in zip(starts, starts[1:], strict=False)]


class InMemory(Unit):
    def __init__(self, name: str, documents: list[Document]) -> None:
        self.name, self._documents, self.stored_bytes = name, documents, 1

    def documents(self) -> Iterator[Document]:
        yield from self._documents


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[HuggingFace], dict[str, bytes]]:
    """What comes of the same rows without any network."""

    def make(data: HuggingFace) -> dict[str, bytes]:
        units = [
            InMemory(name, [Document(f"{name}:{row}", [text]) for row, text in enumerate(texts_of_file(i))])
            for i, name in enumerate(FILES)
        ]
        folder = tmp_path_factory.mktemp("expected") / "p"
        prepare(
            folder,
            units,
            data.load_tokenizer(),
            source=data.source,
            revision=data.revision(),
            rule=ByKey(data.validation_fraction),
        )
        return prepared(folder)

    return make


FAULTS = [
    ("cdn", "timeout"),
    ("cdn", "429"),
    ("resolve", "429 RateLimit"),
    ("cdn", "500"),
    ("resolve", "503"),
    ("cdn", "reset"),
    ("cdn", "ends early"),
    ("cdn", "ends early, length unknown"),
    ("cdn", "wrong range"),
    ("cdn", "range ignored"),
    ("cdn", "range ignored, ends early"),
    ("cdn", "too long"),
    ("cdn", "packed"),
    ("cdn", "stale link"),
    ("cdn", "corrupt"),
    ("tree", "500"),
    ("tree", "ends early"),
    ("tree", "ends early, length unknown"),
    ("revision", "timeout"),
    ("revision", "429"),
    ("revision", "reset"),
]


def test_documents_are_those_of_the_rows_and_the_token_stays_at_the_hub(
    hub: Hub, expected: Callable[[HuggingFace], dict[str, bytes]]
) -> None:
    data = HuggingFace(repo=REPO, validation_fraction=0.3)
    data.prepare()
    assert prepared(data.prepared_folder) == expected(data)
    assert Manifest.read(data.prepared_folder).revision == hub.refs[REPO]["refs/convert/parquet"]
    assert all(headers.get("Authorization") == "Bearer hf_secret" for _, headers in hub.asked(REPO))
    assert len(hub.asked("/cdn/")) > 5
    assert not any("Authorization" in headers for _, headers in hub.asked("/cdn/"))
    assert not any(b"hf_secret" in content for content in prepared(data.prepared_folder).values())


@pytest.mark.parametrize(
    ("fault", "at"),
    [(fault, at) for fault in FAULTS for at in ([0, 3] if fault[0] in ("cdn", "resolve") else [0])],
)
def test_faults_change_nothing(
    hub: Hub, expected: Callable[[HuggingFace], dict[str, bytes]], fault: tuple[str, str], at: int
) -> None:
    where, how = fault
    hub.faults = [(where, "pass")] * at + [fault]
    data = HuggingFace(repo=REPO, validation_fraction=0.3)
    data.prepare()
    assert hub.faults == []
    assert prepared(data.prepared_folder) == expected(data)


@pytest.mark.parametrize("how", [how for where, how in FAULTS if where == "cdn" and how != "corrupt"])
def test_bytes_are_those_of_the_file_with_nothing_to_decode(hub: Hub, how: str) -> None:
    content = random.Random(0).randbytes(5_000_000)  # more than one chunk
    commit = hub.commit(REPO, "main", {"x.bin": content})
    repository = hub_client.Repository(hub.url, REPO, Patience(read_seconds=0.3))
    for start, stop in [(0, len(content)), (0, 4_000_000), (1000, len(content)), (7, 8), (5, 5)]:
        hub.faults = [("cdn", how), ("cdn", "pass"), ("cdn", how)]
        assert repository.read(commit, "x.bin", len(content), start, stop) == content[start:stop]
    if how == "ends early":  # what came is kept
        starts = [int(headers["Range"][6:].split("-")[0]) for _, headers in hub.asked("/cdn/")]
        assert starts[:2] == [0, starts[1]] and starts[1] > 1_000_000


def test_two_workers_and_many_faults_change_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "patience", Patience(read_seconds=0.3, wait_seconds=0, longest_wait=0))
    monkeypatch.setattr(hub_module, "UNIT_BYTES", 1000)
    data = HuggingFace(repo=REPO, validation_fraction=0.3, folder="faults")
    hub.faults = [each for fault in FAULTS if fault[0] == "cdn" for each in (("cdn", "pass"), fault)]
    data.prepare(workers=2)
    assert hub.faults == []
    good = HuggingFace(repo=REPO, validation_fraction=0.3, folder="good")
    good.prepare()
    assert prepared(data.prepared_folder) == prepared(good.prepared_folder)


def test_a_failure_for_good_in_a_worker_is_told_as_any(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "patience", Patience(wait_seconds=0))
    hub.faults = [("0000.parquet", "pass")] * 2 + [("cdn", "500")] * 99
    with pytest.raises(UnavailableError, match=r"in 6 tries \(HTTP 500\); .* go on with: python") as error:
        HuggingFace(repo=REPO).prepare(workers=2)
    assert error.value.code == 69


def test_slices_share_out_the_rows(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = HuggingFace(repo=REPO, validation_fraction=0.3)
    whole.prepare()
    monkeypatch.setattr(hub_module, "UNIT_BYTES", 1000)
    monkeypatch.setattr(hub_files, "WINDOW_BYTES", 300)
    monkeypatch.setattr(hub_files, "HOLE_BYTES", 10)
    data = HuggingFace(repo=REPO, validation_fraction=0.3, folder="sliced")
    units = data.units()
    assert len(units) > 9 and len({unit.name for unit in units}) == len(units)
    assert sum(unit.stored_bytes for unit in units) == sum(map(len, CONTENT.values()))
    assert pickle.loads(pickle.dumps(units)) == units
    assert b"hf_secret" not in pickle.dumps(units)
    keys = [document.key for unit in units for document in unit.documents()]
    assert keys == [f"{name}:{row}" for name in FILES for row in range(60)]
    data.prepare()
    for split in ("train", "validation"):
        assert texts_in(data, split) == texts_in(whole, split)  # type: ignore[arg-type]
    monkeypatch.setattr(hub_module, "MOST_UNITS", 1)
    assert len(data.units()) == 3


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_row_groups_at_the_edge_of_a_slice_are_in_one(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, off: int
) -> None:
    """The text of a row group begins right at the edge, a byte before, or a byte after."""
    whole = HuggingFace(repo=REPO, validation_fraction=0.3, folder="whole")
    whole.prepare()
    metadata = parquet.read_footer(io.BytesIO(CONTENT[FILES[0]]), FILES[0])
    begins = [first for first, _ in parquet.locate(metadata, "text", FILES[0]).chunks]
    assert len(begins) > 5
    keys = [f"{name}:{row}" for name in FILES for row in range(60)]
    for begin in begins:
        monkeypatch.setattr(hub_module, "UNIT_BYTES", begin - off)
        units = HuggingFace(repo=REPO, folder="new").units()
        assert any(unit.name == f"{FILES[0]}@{begin - off}" for unit in units)
        assert [document.key for unit in units for document in unit.documents()] == keys
    data = HuggingFace(repo=REPO, validation_fraction=0.3, folder="sliced")
    monkeypatch.setattr(hub_module, "UNIT_BYTES", begins[3] - off)
    data.prepare()
    assert sum(Manifest.read(data.prepared_folder).documents.values()) == len(keys)
    for split in SPLITS:
        assert texts_in(data, split) == texts_in(whole, split)


def test_a_prepared_folder_needs_no_request(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"repo": REPO, "validation_fraction": 0.3, "rows_seed": 3}
    HuggingFace(**settings).prepare()
    words = [f"data.{key}={value}" for key, value in settings.items()]
    hub.requests.clear()
    with socket.socket() as unused:  # bound, and nobody listens
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr("requests.Session.request", None)
        data = build(compose(["data=hf", "data.tokenizer=bytes", *words]).data)
        assert data.is_prepared
        data.prepare()
        assert data.revision() == hub.refs[REPO]["refs/convert/parquet"]
        assert [len(data.open(split)) for split in SPLITS] == [
            Manifest.read(data.prepared_folder).tokens(split) for split in SPLITS
        ]
        assert str(data.prepared_folder) in data.describe()
    assert not hub.requests


@pytest.mark.parametrize(("made", "asked"), [(None, 1), (1, None), (1, 2)])
def test_a_folder_with_other_rows_held_out_is_refused(hub: Hub, made: int | None, asked: int | None) -> None:
    HuggingFace(repo=REPO, validation_fraction=0.3, rows_seed=made, folder="p").prepare()
    hub.refusals[REPO] = (404, "RepoNotFound")
    HuggingFace(repo=REPO, validation_fraction=0.3, rows_seed=made, folder="p").prepare()
    names = {None: "documents", 1: "rows, seed 1", 2: "rows, seed 2"}
    with pytest.raises(DataError, match=f"p was prepared with split_rule={names[made]}, not {names[asked]};"):
        HuggingFace(repo=REPO, validation_fraction=0.3, rows_seed=asked, folder="p").prepare()


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_long_rows_come_in_pieces(hub: Hub, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(pieces, "CHUNK_CHARACTERS", 50)
    monkeypatch.setattr(pieces, "LONGEST_PIECE", 400)
    texts = ["short\n", "a line\n" * 100, "é" * 3000, ""]
    rows = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    content = {"parquet": parquet_bytes(texts), "jsonl": rows}[kind]
    hub.commit(REPO, "main", {f"a.{kind}": content})
    [unit] = HuggingFace(repo=REPO, ref="main", files=f"a.{kind}").units()
    found = [[str(piece) for piece in document.pieces] for document in unit.documents()]
    assert ["".join(each) for each in found] == texts
    assert max(len(piece) for each in found for piece in each) <= 450
    assert [len(each) > 5 for each in found] == [False, True, True, False]


def test_waits_grow_and_a_server_may_ask_for_longer_ones(hub: Hub, waits: list[float]) -> None:
    data = HuggingFace(repo=REPO)
    hub.faults = [("cdn", "500"), ("cdn", "429"), ("cdn", "429 RateLimit"), ("resolve", "503")]
    data.units()
    assert waits == [1, 2, 7, 55]
    dates = {"Retry-After": "Wed, 21 Oct 2065 07:28:00 GMT"}
    assert hub_client._seconds_asked_for(dates) > 1e9
    assert hub_client._seconds_asked_for({"Retry-After": "soon"}) == 0


def test_a_failure_for_good_is_told_once_and_its_command_goes_on(
    hub: Hub, expected: Callable[[HuggingFace], dict[str, bytes]]
) -> None:
    data = HuggingFace(repo=REPO, validation_fraction=0.3)
    data.prepare(share=(0, 3))
    hub.faults = [("cdn", "500")] * 6
    with pytest.raises(UnavailableError) as error:
        data.prepare()
    message = str(error.value)
    assert (
        "default/train/0001.parquet" in message and "in 6 tries (HTTP 500)" in message and "\n" not in message
    )
    command = message.rpartition("go on with: ")[2]
    moved = hub.commit(REPO, "refs/convert/parquet", {FILES[0]: parquet_bytes(["other text"])})
    hub.requests.clear()
    words = shlex.split(command)
    assert words[:2] == ["python", "scripts/prepare_data.py"]
    again = build(compose(words[2:]).data)
    again.prepare()
    assert not hub.asked(moved) and not hub.asked("/revision/")
    ranges = [headers["Range"] for _, headers in hub.asked("/cdn/") if _.endswith(FILES[0])]
    assert not any(each.startswith("bytes=4-") for each in ranges)  # its text was not fetched again
    assert prepared(again.prepared_folder) == expected(data)
    # prepared, it needs no Hub, and is not refused because of the branch
    hub.refusals[REPO] = (404, "RepoNotFound")
    HuggingFace(repo=REPO, validation_fraction=0.3).prepare()
    with pytest.raises(DataError, match=f"with revision=.*, not {moved}; choose another data.folder"):
        HuggingFace(
            repo=REPO, validation_fraction=0.3, ref=moved, folder=str(again.prepared_folder)
        ).prepare()


def test_a_commit_that_is_gone_is_named(hub: Hub) -> None:
    data = HuggingFace(repo=REPO, folder="p")
    data.prepare(share=(0, 3))
    gone = hub.refs[REPO]["refs/convert/parquet"]
    del hub.commits[gone]
    with pytest.raises(MissingInputError, match=f"commit {gone} .* is gone from the Hub; .* remove .p.parts"):
        HuggingFace(repo=REPO, folder="p").prepare()


def test_bytes_that_never_decode_are_told(hub: Hub) -> None:
    content = bytearray(CONTENT[FILES[1]])
    content[100:2000] = bytes(1900)
    hub.commit(REPO, "refs/convert/parquet", {**CONTENT, FILES[1]: bytes(content)})
    with pytest.raises(DataError, match=r"train/0001.parquet is damaged \(row .*; get it anew"):
        HuggingFace(repo=REPO).prepare()
    hub.commit(REPO, "refs/convert/parquet", {FILES[0]: b"no parquet" * 9})
    with pytest.raises(DataError, match="0000.parquet is damaged .its footer"):
        HuggingFace(repo=REPO, split="train", folder="q").prepare()


def test_damage_that_decoded_is_not_patched_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    [first, *_] = HuggingFace(repo=REPO).units()
    reads = iter([["good", "bad", None], ["good", "mended", "more"]])

    def rows(_: object) -> Iterator[tuple[int, str]]:
        for row, text in enumerate(next(reads)):
            if text is None:
                raise parquet.Damaged("x")
            yield row, text

    monkeypatch.setattr(hub_files.HubUnit, "_parquet_rows", rows)
    with pytest.raises(UnavailableError, match="reads differently each time"):
        list(first.documents())


def test_held_out_rows_are_those_of_the_permutation(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "UNIT_BYTES", 1000)
    data = HuggingFace(repo=REPO, validation_fraction=0.05, rows_seed=2357)
    data.prepare()
    rows = [text for number in range(3) for text in texts_of_file(number)]
    order = np.random.default_rng(2357).permutation(len(rows))
    held_out = set(order[: int(np.ceil(0.05 * len(rows)))].tolist())
    assert texts_in(data, "validation") == [text for row, text in enumerate(rows) if row in held_out]
    assert texts_in(data, "train") == [text for row, text in enumerate(rows) if row not in held_out]
    assert Manifest.read(data.prepared_folder).split_rule == "rows, seed 2357"


@pytest.mark.parametrize("fault", [None, "ends early", "reset", "range ignored", "corrupt"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_json_lines(hub: Hub, monkeypatch: pytest.MonkeyPatch, packing: str, fault: str | None) -> None:
    monkeypatch.setattr(hub_files, "WINDOW_BYTES", 1000)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 700)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[packing]
    lines = [json.dumps({"body": text}) for text in texts_of_file(0)]
    hub.commit(REPO, "main", {f"data/a.jsonl{packing}": pack("\n".join(lines).encode())})
    hub.faults = [("cdn", "pass"), ("cdn", fault)] if fault else []
    data = HuggingFace(repo=REPO, ref="main", files=f"data/*.jsonl{packing}", text_column="body")
    [unit] = data.units()
    found = [(document.key, list(document.pieces)) for document in unit.documents()]
    assert found == [
        (f"data/a.jsonl{packing}:{i}", [text]) for i, text in enumerate(texts_of_file(0), start=1)
    ]
    assert hub.faults == []


def test_json_lines_that_are_wrong_are_named(hub: Hub) -> None:
    hub.commit(REPO, "main", {"a.jsonl": b'{"text": "x"}\n{"text": null}', "b.jsonl.gz": b"no", "c.txt": b""})
    with pytest.raises(DataError, match=r'some-data/a.jsonl:2 is not a JSON object with a string "text"'):
        HuggingFace(repo=REPO, ref="main", files="a.*").prepare()
    with pytest.raises(DataError, match=r"b.jsonl.gz cannot be unpacked"):
        HuggingFace(repo=REPO, ref="main", files="b.*").prepare()
    with pytest.raises(DataError, match="c.txt is neither .parquet nor .jsonl"):
        HuggingFace(repo=REPO, ref="main", files="*").prepare()
    with pytest.raises(ConfigError, match="data.rows_seed counts rows of Parquet, not of a.jsonl"):
        HuggingFace(repo=REPO, ref="main", files="a.*", rows_seed=1).prepare()


def many_subsets(hub: Hub) -> None:
    files = {
        f"{subset}/{split}/0.parquet": parquet_bytes(["x"]) for subset in "ab" for split in ("test", "dev")
    }
    hub.commit("o/many", "refs/convert/parquet", {**files, "c/partial-train/0.parquet": parquet_bytes(["x"])})
    hub.commit("o/raw", "main", {"script.py": b"", "data/x.tar": b"", ".gitattributes": b""})
    hub.commit(REPO, "main", {"data/a/1.parquet": CONTENT[FILES[0]], "data/2.parquet": CONTENT[FILES[1]]})


@pytest.mark.parametrize(
    ("settings", "says", "code"),
    [
        ({"repo": "o/no"}, "data.repo=o/no is not to be seen at http.*; check the name, or .* HF_TOKEN", 66),
        ({"repo": "o/gated"}, "data.repo=o/gated is gated; accept its conditions at .*/datasets/o/gated", 69),
        ({"repo": "o/teapot"}, r"refuses to serve o/teapot \(HTTP 418\)", 69),
        ({"ref": "v9"}, "has no data.ref=v9", 66),
        ({"repo": "o/raw"}, "has no refs/convert/parquet, .*data.ref=main .*it has: data/ script.py", 66),
        ({"repo": "o/raw", "ref": "main"}, "no SUBSET/SPLIT/.*; set data.files .it has: data/ script", 66),
        ({"repo": "o/many"}, "has several subsets; set data.subset; it has: a b c", 66),
        ({"repo": "o/many", "subset": "d"}, "has no data.subset=d; it has: a b c", 66),
        ({"repo": "o/many", "subset": "a"}, "has no data.split=train in a; it has: dev test$", 66),
        (
            {"repo": "o/many", "subset": "c"},
            "it has: partial-train .partial: the Hub converted its first",
            66,
        ),
        ({"ref": "main", "files": "data/*.txt"}, "data.files=data/..txt matches nothing .*it has: data/", 66),
        ({"ref": "main", "files": "no/x/*.txt"}, "data.files=no/x/..txt matches nothing", 66),
        ({"text_column": "body"}, "has no column data.text_column=body; of text it has: text$", 66),
        ({"text_column": "score"}, "data.text_column=score holds double, not text", 65),
    ],
)
def test_what_is_not_there_is_told_with_what_there_is(
    hub: Hub, settings: dict[str, Any], says: str, code: int, waits: list[float]
) -> None:
    many_subsets(hub)
    hub.refusals = {"o/gated": (403, "GatedRepo"), "o/teapot": (418, "")}
    with pytest.raises(RunError, match=says) as error:
        HuggingFace(**{"repo": REPO, **settings}).prepare()
    assert error.value.code == code
    assert not waits and "\n" not in str(error.value)
    assert not list(Path("data").glob("*")) if Path("data").exists() else True


def test_globs_stay_in_their_folder(hub: Hub) -> None:
    many_subsets(hub)
    for glob, names in {"data/*": ["data/2.parquet"], "data/*/*.parquet": ["data/a/1.parquet"]}.items():
        units = HuggingFace(repo=REPO, ref="main", files=glob).units()
        assert [unit.name for unit in units] == [f"{name}@0" for name in names]
    commit = hub.refs[REPO]["main"]
    assert HuggingFace(repo=REPO, ref=commit, files="data/2.parquet").revision() == commit
    assert len(HuggingFace(repo="o/many", subset="a", split="dev").units()) == 1


def test_null_rows_are_named(hub: Hub) -> None:
    hub.commit(REPO, "refs/convert/parquet", {FILES[0]: parquet_bytes(["x"] * 9 + [None])})
    with pytest.raises(DataError, match=r"0000.parquet: row 9 of data.text_column=text is null"):
        HuggingFace(repo=REPO).prepare()


def test_without_network_one_line_comes_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        data = build(compose(["data=fineweb", "data.tokenizer=bytes", "data.ref=main"]).data)
        with pytest.raises(
            UnavailableError, match=r"127.0.0.1:\d+: .* in 3 tries .*; .* go on with: python"
        ) as error:
            data.prepare()
        assert "\n" not in str(error.value)
        assert sum(waits) == 3
        with pytest.raises(UnavailableError, match="in 3 tries"):
            build(compose(["data=fineweb_edu", "data.tokenizer=bytes"]).data).prepare()
        assert sum(waits) == 6
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UnavailableError, match="HF_HUB_OFFLINE is set; unset it"):
            data.prepare()
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("choice", ["fineweb", "fineweb_edu", "openwebtext", "hf"])
def test_settings_compose_without_network(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    monkeypatch.setattr("requests.Session.request", None)
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    data = build(compose([f"data={choice}", *(["data.repo=o/n"] if choice == "hf" else [])]).data)
    assert "to be prepared in data/" in data.describe()
    if choice == "openwebtext":
        assert (data.validation_fraction, data.rows_seed, data.tokenizer) == (0.0005, 2357, "gpt2")


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    for repo in ("a/b/c", "", "a b", "https://huggingface.co/datasets/a/b"):
        with pytest.raises(ConfigError, match="is no dataset's name; it is OWNER/NAME"):
            HuggingFace(repo=repo)
    with pytest.raises(ConfigError, match="data.subset=a is for the Hub's conversion; leave out data.files"):
        HuggingFace(repo="a/b", subset="a", files="*")
    settings: list[dict[str, Any]] = [{}, {"ref": "main"}, {"subset": "a"}, {"split": "x"}, {"files": "*"}]
    settings += [{"text_column": "b"}, {"rows_seed": 1}, {"validation_fraction": 0.2}, {"tokenizer": "gpt2"}]
    assert len({HuggingFace(repo="a/b", **each).prepared_folder for each in settings}) == len(settings)


@pytest.mark.parametrize("window", [1, 10, 10_000])
def test_range_files_read_as_files_do(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(hub_files, "WINDOW_BYTES", window)
    content = random.Random(0).randbytes(1000)
    reads: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> bytearray:
        reads.append((start, stop))
        return bytearray(content[start:stop])

    file, model = RangeFile(read, 1000, [(0, 200), (210, 300), (900, 1100)]), io.BytesIO(content)
    generator = random.Random(1)
    for _ in range(300):
        if generator.random() < 0.3:
            place = generator.randrange(1100)
            assert file.seek(place) == model.seek(place) == file.tell()
        size = generator.choice([0, 1, 30, 2000])
        assert file.read(size) == model.read(size)
    file.seek(-3, io.SEEK_END)
    assert file.read() == content[-3:] and file.read(5) == b""
    assert all(start < stop <= 1000 for start, stop in reads)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_local_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["", "é" * 5000, "same", "same", "世界\0\n"] * 400
    path = tmp_path / "a.parquet"
    table = pa.table({"body": pa.array(texts, pa.string()).cast(kind), "empty": pa.nulls(len(texts))})
    pq.write_table(table, path, row_group_size=700, data_page_size=1000)
    found = list(parquet.documents("x/a.parquet", path, "body"))
    assert [text for document in found for text in document.pieces] == texts
    assert [document.key for document in found[:2]] == ["x/a.parquet:0", "x/a.parquet:1"]
    with pytest.raises(MissingInputError, match="has no column data.text_column=text; of text it has: body"):
        list(parquet.documents("a", path))
    with pytest.raises(MissingInputError, match="cannot be read"):
        list(parquet.documents("b", tmp_path / "b.parquet"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="a.parquet is damaged .its footer"):
        list(parquet.documents("a", path, "body"))


def test_empty_files(tmp_path: Path, hub: Hub) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert list(parquet.documents("a", tmp_path / "a.parquet")) == []
    hub.commit(REPO, "main", {"a.parquet": (tmp_path / "a.parquet").read_bytes(), "b.jsonl": b""})
    with pytest.raises(DataError, match="has no documents"):
        HuggingFace(repo=REPO, ref="main", files="*").prepare()


def test_a_huge_row_group_is_read_in_small_ranges(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_files, "WINDOW_BYTES", 150_000)
    monkeypatch.setattr(parquet, "READ_BYTES", 100_000)
    generator = random.Random(0)
    texts = [generator.randbytes(500).hex() for _ in range(4000)]
    options = {"compression": "none", "use_dictionary": False, "data_page_size": 50_000}
    content = parquet_bytes(texts, rows=4000, write_batch_size=20, **options)
    assert len(content) > 4_000_000
    hub.commit(REPO, "refs/convert/parquet", {FILES[0]: content})
    [unit] = HuggingFace(repo=REPO).units()
    assert [text for document in unit.documents() for text in document.pieces] == texts
    ranges = [headers["Range"].removeprefix("bytes=").split("-") for _, headers in hub.asked("/cdn/")]
    assert len(ranges) > 20
    assert max(int(last) - int(first) for first, last in ranges) < 150_000


def test_long_rows_are_not_held_together(tmp_path: Path) -> None:
    texts = [f"{number:08d}" * 25_000 for number in range(60)]
    options = {"use_dictionary": False, "compression": "none", "write_batch_size": 1}
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(texts, rows=60, **options))
    before, found, held = pa.total_allocated_bytes(), [], []
    for document in parquet.documents("a", tmp_path / "a.parquet"):
        found.append("".join(map(str, document.pieces)))
        held.append(pa.total_allocated_bytes() - before)
    assert found == texts
    assert max(held) < sum(map(len, texts)) / 2


def test_a_listing_that_goes_round_ends(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = {"next": {"url": f"{hub.url}/api/datasets/{REPO}/tree/x?recursive=true"}}
    monkeypatch.setattr("requests.Response.links", property(lambda _: listing))
    commit = hub.commit(REPO, "x", CONTENT)
    with pytest.raises(UnavailableError, match="lists files of owner/some-data twice"):
        HuggingFace(repo=REPO, ref=commit).units()
