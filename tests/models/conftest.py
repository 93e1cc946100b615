import sys

import pytest


@pytest.fixture(scope="session")
def transformers():
    """Hugging Face's library, the oracle.

    It uses torchvision for images only, yet does not import beside one that was built for another torch; so
    it gets to see none.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)
        module = pytest.importorskip("transformers")
        assert module.GPT2LMHeadModel and module.GPT2Config  # imported lazily: while torchvision is hidden
    return module
