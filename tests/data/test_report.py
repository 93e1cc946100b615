"""Token files written out for a person; the whole report is tested with the script that prints it."""

import numpy as np
from data.conftest import MakeTokens

from sophia_train.data.report import report
from sophia_train.data.tokenizers import Bytes


def test_samples_escape_what_moves_the_cursor(make_tokens: MakeTokens, tmp_path) -> None:
    tokens = make_tokens(np.array([256, *b"\x1b[2J\x07\xff\tx\n1\n2\n3\n4"]))
    lines = [line.rstrip() for line in report(tmp_path, None, {"train": tokens}, Bytes(), 256)]
    at = lines.index("train, from token 1")
    assert lines[at + 1 : at + 5] == ["  | \\x1b[2J\\x07\ufffd\\tx", "  | 1", "  | 2", "  | 3"]
