import pytest
from synthetic_runs import write_run


@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder: `make_run("a1", seed=1)`; see `write_run`."""
    return lambda name, **settings: write_run(tmp_path / name, **settings)
