"""`scripts/prepare_data.py`: what it makes, what it prints, and its exit codes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from rich.cells import cell_len
from support import load_script

from sophia_train.data import sources, workers
from sophia_train.data.manifest import Manifest
from sophia_train.data.token_files import TokenFiles
from sophia_train.data.tokenizers import load_tokenizer, train_bpe

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
Main = Callable[[list[str]], int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("prepare_data")


@pytest.fixture
def main(script: ModuleType) -> Main:
    return script.main


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text("[bold]" * i)
    return folder


def test_it_prepares_and_verifies(main: Main, texts: Path, capsys: Capture) -> None:
    arguments = ["data=text", f"data.path={texts}", "data.folder=prepared", "data.validation_fraction=0.3"]
    for _ in range(2):  # the second time there is nothing to do
        assert main(arguments) == 0
        assert "tokens (bytes) in prepared" in capsys.readouterr().out
    data = TokenFiles(path="prepared", tokenizer="bytes")
    assert len(data.open("train")) + len(data.open("validation")) == 60 + 6 * sum(range(60))
    assert main(["data=token_files", "data.path=prepared", "data.tokenizer=bytes"]) == 0
    capsys.readouterr()

    assert main(["verify=prepared"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith("  ok") for line in lines)
    path = Path("prepared/validation_00000.bin")
    content = bytearray(path.read_bytes())
    content[-1] ^= 128
    path.write_bytes(content)
    assert main(["verify=prepared"]) == 65
    printed = capsys.readouterr()
    assert [line.split("  ")[2][:6] for line in printed.out.splitlines()] == ["ok", "failed"]
    assert printed.err.startswith("error: prepared: 1 shards are damaged")


ARGUMENTS = ["data=text", "data.path=texts", "data.folder=prepared"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["data=text", "data.path=texts", "data.pth=3"], 64, "data.pth"),
        (["data=text", "data.path=texts", "data.tokenizer=word"], 64, "data.tokenizer=word"),
        (["data=text", "data.path=nothing"], 66, "data.path=nothing does not exist"),
        (["verify=nothing"], 66, "nothing is not a prepared data folder"),
        (["verify=nothing", "data=text"], 64, "verify=nothing stands alone"),
        (["data=text", "data.path=texts", "data.folder=texts"], 73, "data.folder=texts"),
        (["data=text", "data.path=texts", "data.folder=."], 64, "data.folder=. does not end in a name"),
        (["data=text", "data.path=texts", "data.folder=texts/.."], 64, "data.folder=texts/.. does not end"),
        (["data=text", "data.path=texts", "data.folder=/"], 64, "data.folder=/ does not end in a name"),
        ([*ARGUMENTS, "workers=0"], 64, "workers=0 is not a whole number of at least 1; use workers="),
        ([*ARGUMENTS, "workers=x"], 64, "workers=x"),
        ([*ARGUMENTS, "workers="], 64, "workers= is not"),
        ([*ARGUMENTS, "worker=2"], 64, "worker=2: there is no such key; use workers="),
        ([*ARGUMENTS, "workers=2", "workers=3"], 64, "workers=3, but workers=2"),
        (
            [*ARGUMENTS, "shard=3/3"],
            64,
            "shard=3/3 is out of range, as shards are counted from 0; use shard=0/3",
        ),
        ([*ARGUMENTS, "shard=0/0"], 64, "shard=0/0 is out of range"),
        ([*ARGUMENTS, "shard=1"], 64, "shard=1 is not of the form i/n; use shard=0/4"),
        ([*ARGUMENTS, "shard=-1/3"], 64, "shard=-1/3 is not of the form"),
        ([*ARGUMENTS, "merge=yes"], 64, "merge=yes is neither true nor false; use merge=true"),
        ([*ARGUMENTS, "merge=true", "shard=0/3"], 64, "merge=true and shard=0/3 do not go together"),
        ([*ARGUMENTS, "merge=true"], 66, "prepared lacks units 0 of the 1 from 0 on"),
        (["verify=nothing", "workers=2"], 64, "leave workers=2 out"),
        (["inspect=nothing"], 66, "nothing does not exist"),
        (["inspect=nothing", "data=text"], 64, "inspect=nothing stands alone"),
        (["inspect=nothing", "merge=true"], 64, "leave merge=true out"),
        (["inspect=texts"], 66, "texts has no manifest.json"),
        (
            ["data=token_files", "data.path=texts", "shard=0/2"],
            64,
            "shard=0/2: token files need no preparation",
        ),
        (["prepare"], 64, "prepare"),
    ],
)
def test_errors_are_one_line_with_their_code(
    main: Main, texts: Path, capsys: Capture, arguments: list[str], code: int, says: str
) -> None:
    before = sorted(path.name for path in texts.parent.iterdir())
    assert main(arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and says in lines[0]
    assert sorted(path.name for path in texts.parent.iterdir()) == before


def test_help_says_how(main: Main, capsys: Capture) -> None:
    assert main(["--help"]) == 0
    assert "verify=FOLDER" in capsys.readouterr().out


def digests(folder: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 1500)


def test_shards_and_workers_make_the_same_bytes(
    main: Main, texts: Path, small_units: None, capsys: Capture
) -> None:
    base = ["data=text", "data.path=texts"]
    assert main([*base, "data.folder=one", "workers=1"]) == 0
    assert main([*base, "data.folder=two", "workers=2"]) == 0
    expected = digests("one")
    assert sum(name.startswith("train") for name in expected) > 3 and digests("two") == expected

    three = [*base, "data.folder=three"]
    capsys.readouterr()
    assert main([*three, "shard=1/3"]) == 0
    printed = capsys.readouterr()
    assert "shard 1/3 is done" in printed.out and "of shard 0, 2 of 3" in printed.out
    assert not Path("three").exists()
    assert main([*three, "merge=true"]) == 66
    error = capsys.readouterr().err
    assert "three lacks units 0, 2-3, 5" in error and "merge=true" in error and error.count("\n") == 1
    assert main([*three, "shard=0/3", "workers=1"]) == 0
    assert main([*three, "shard=2/3", "workers=1"]) == 0
    assert "merge=true" in capsys.readouterr().out.splitlines()[-1]
    assert main([*three, "merge=true"]) == 0
    assert digests("three") == expected
    assert main([*three, "merge=true"]) == 0  # again is no harm, and so is a late shard
    assert main([*three, "shard=0/3"]) == 0
    assert digests("three") == expected


def test_an_interruption_keeps_what_is_done(
    main: Main, texts: Path, small_units: None, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_unit, done = workers.prepare_unit, []

    def interrupted(*arguments: object) -> object:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(prepare_unit(*arguments))  # type: ignore[arg-type]
        return done[-1]

    monkeypatch.setattr(workers, "prepare_unit", interrupted)
    arguments = [*ARGUMENTS, "workers=1"]
    assert main(arguments) == 75
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: interrupted; units that are done are kept, and the same command goes on"
    monkeypatch.setattr(workers, "prepare_unit", prepare_unit)
    assert main([*arguments, "merge=true"]) == 66
    assert "lacks units 3-" in capsys.readouterr().err
    assert main(arguments) == 0
    assert main(["data=text", "data.path=texts", "data.folder=other", "workers=1"]) == 0
    assert digests("prepared") == digests("other")


def test_by_default_there_are_no_more_workers_than_units(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "_cores", lambda: 4)
    assert [script.read_workers(None, units) for units in (0, 1, 3, 9)] == [1, 1, 3, 4]
    assert script.read_workers("7", 1) == 7


def test_ranges_of_numbers(script: ModuleType) -> None:
    assert script.numbers([0, 2, 3, 4, 9]) == "0, 2-4, 9"
    assert script.numbers(range(0, 100, 2), most=2) == "0, 2, ..."


def test_inspect_shows_counts_lengths_tokens_and_samples(main: Main, texts: Path, capsys: Capture) -> None:
    (texts / "control.txt").write_text(
        "\x1b[31mred\x07\r\n\u65e5\u672c" + "\u8a9e" * 100 + "\n[bold]\n4\n5\n6"
    )
    assert main([*ARGUMENTS, "data.validation_fraction=0.3"]) == 0
    capsys.readouterr()
    assert main(["inspect=prepared"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    record = Manifest.read(Path("prepared"))
    for split in ("train", "validation"):
        row = next(line.split() for line in lines if line.startswith(f"{split} ") and "," in line)
        assert row[1:] == [
            f"{record.documents[split]:,}",
            f"{record.tokens(split):,}",
            "1",
            f"{2 * record.tokens(split):,}",
        ]
    bars = [line.split() for line in lines if "#" in line]
    assert sum(int(bar[-2]) for bar in bars) == sum(record.documents.values())
    total = sum(map(record.tokens, ("train", "validation")))
    assert f"{record.text_bytes:,} bytes of text: {total / record.text_bytes:.3f} tokens per byte" in out
    assert "'b'" in out and "train, from token 1\n" in out and "validation, from token 1\n" in out
    assert max(map(cell_len, lines)) < 80
    assert all(c.isprintable() or c == "\n" for c in out)


def test_inspect_takes_files_of_others(main: Main, texts: Path, token_files: Path, capsys: Capture) -> None:
    assert main([f"inspect={token_files}", "data.tokenizer=bytes"]) == 0
    out = capsys.readouterr().out
    assert "2,000" in out and "tokenizer bytes, as is supposed" in out
    assert main([f"inspect={token_files}/val.bin", "data.tokenizer=bytes"]) == 0
    assert "1,000" in capsys.readouterr().out


def test_inspect_does_without_a_tokenizer_that_it_does_not_know(
    main: Main, texts: Path, capsys: Capture
) -> None:
    Path("made.json").write_text(train_bpe(["bold " * 50], 262))
    assert main([*ARGUMENTS]) == 0
    record = json.loads(Path("prepared/manifest.json").read_bytes())
    tokenizer = load_tokenizer("made.json")
    record |= {"tokenizer": tokenizer.name, "end_of_text": tokenizer.end_of_text}
    Path("prepared/manifest.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["inspect=prepared"]) == 0
    printed = capsys.readouterr()
    assert "by their ids" in printed.err and "data.tokenizer=FILE" in printed.err
    assert main(["inspect=prepared", "data.tokenizer=made.json"]) == 0
    assert "by their ids" not in capsys.readouterr().err
    assert main(["inspect=prepared", "data.tokenizer=bytes"]) == 65
    assert tokenizer.name in capsys.readouterr().err
