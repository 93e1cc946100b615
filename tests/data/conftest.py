from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sophia_train.data.token_files import Tokens, TokenShard

MakeTokens = Callable[..., Tokens]


@pytest.fixture
def make_tokens(tmp_path: Path) -> MakeTokens:
    """Write ids to `.bin` files cut at `cuts`, and open them as one `Tokens`."""
    made = 0

    def make(ids: np.ndarray, cuts: tuple[int, ...] = ()) -> Tokens:
        nonlocal made
        shards = []
        for part in np.split(np.asarray(ids), cuts):
            path = tmp_path / f"made_{made}.bin"
            made += 1
            part.astype("<u4").tofile(path)
            shards.append(TokenShard(path, "<u4", 0, len(part)))
        return Tokens(shards)

    return make
