"""`scripts/prepare_data.py`: what it makes, what it prints, and its exit codes."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from sophia_train.data.token_files import TokenFiles

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def main() -> Main:
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text("[bold]" * i)
    return folder


def test_it_prepares_and_verifies(main: Main, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data=text", f"data.path={texts}", "data.folder=prepared", "data.validation_fraction=0.3"]
    for _ in range(2):  # the second time there is nothing to do
        assert main(arguments) == 0
        assert "bytes tokens in prepared" in capsys.readouterr().out
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


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["data=text", "data.path=texts", "data.pth=3"], 64, "data.pth"),
        (["data=text", "data.path=texts", "data.tokenizer=word"], 64, "data.tokenizer=word"),
        (["data=text", "data.path=nothing"], 66, "data.path=nothing does not exist"),
        (["verify=nothing"], 66, "nothing is not a prepared data folder"),
        (["verify=nothing", "data=text"], 64, "verify=nothing stands alone"),
        (["data=text", "data.path=texts", "data.folder=texts"], 73, "data.folder=texts"),
    ],
)
def test_errors_are_one_line_with_their_code(
    main: Main, texts: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str
) -> None:
    before = sorted(path.name for path in texts.parent.iterdir())
    assert main(arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and says in lines[0]
    assert sorted(path.name for path in texts.parent.iterdir()) == before


def test_help_says_how(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "verify=FOLDER" in capsys.readouterr().out
