"""What `--help` of the scripts looks like."""

import pytest
from support import ROOT, load_script

from sophia_train.command_line import Parser

SCRIPTS = sorted({path.stem for path in (ROOT / "scripts").glob("*.py")} - {"prepare_data"})  # Hydra's words


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_the_terminal_and_loses_no_word(script, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    module = load_script(script)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= columns
    assert " ".join(module.__doc__.split()) in " ".join(out.split())


def test_a_description_keeps_its_shape(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "50")
    description = """A paragraph of
    two lines.

        a command that is much longer than the terminal is wide --flag

      name    what it is, in words that go on and on
              and on
      two words  of another
    """
    Parser("\n".join(line.removeprefix("    ") for line in description.splitlines())).print_help()
    assert capsys.readouterr().out.split("\n\n")[1:4] == [
        "A paragraph of two lines.",
        "    a command that is much longer than the\n        terminal is wide --flag",
        "  name    what it is, in words that go on and on\n          and on\n  two words  of another",
    ]
