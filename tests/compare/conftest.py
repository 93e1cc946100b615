import runpy
from pathlib import Path

import pytest
from synthetic_runs import LOSSES, SOPHIA, write_run


@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder: `make_run("a1", seed=1)`; see `write_run`."""
    return lambda name, **settings: write_run(tmp_path / name, **settings)


@pytest.fixture
def compare(capsys):
    """Run the script: returns its exit code, what it printed, and its error line."""
    main = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "compare.py"))["main"]

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def shifted(by):
    return tuple(loss + by for loss in LOSSES)


@pytest.fixture
def two_groups(make_run):
    """AdamW at 3.0, 3.1, 3.2 and Sophia 0.1, 0.2, 0.3 below it, by seed."""
    adamw = [make_run(f"a{s}", seed=s, losses=shifted(0.1 * (s - 1))) for s in (1, 2, 3)]
    sophia = [make_run(f"s{s}", seed=s, losses=shifted(-0.1), **SOPHIA) for s in (1, 2, 3)]
    return adamw, sophia
