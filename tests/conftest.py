import sys

import numpy as np
import pytest
from support import TINY, Runs

# transformers uses torchvision for images only, does not import beside one that was built for another torch,
# and remembers whether it saw any. So no test gets to see one, whoever imports transformers first:
# pytorch_optimizer does, too.
sys.modules["torchvision"] = None


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Runs the command line: `runs("max_steps=3", ...)` returns how it ended."""
    started = Runs(tmp_path_factory.mktemp("runs"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def token_files(tmp_path_factory):
    """A folder of nanoGPT's two files, of bytes with some order in them."""
    folder = tmp_path_factory.mktemp("tokens")
    ids = np.cumsum(np.random.default_rng(0).integers(1, 9, 3000)) % 256
    ids[:2000].astype("<u2").tofile(folder / "train.bin")
    ids[2000:].astype("<u2").tofile(folder / "val.bin")
    return folder


@pytest.fixture(scope="session")
def tiny(runs, token_files):
    """Runs a tiny model of a few steps: `tiny(folder, *overrides)`."""

    def run(folder, *overrides, **options):
        arguments = [*TINY, f"data.path={token_files}", f"run_dir={folder}", *overrides]
        return runs(*arguments, **options)

    return run


@pytest.fixture(scope="session")
def transformers():
    """Hugging Face's library, the oracle."""
    return pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Let every test choose its precision: Accelerate keeps the first, transformers' Trainer's too."""
    yield
    if loaded := sys.modules.get("accelerate.state"):
        loaded.AcceleratorState._reset_state(reset_partial_state=True)
