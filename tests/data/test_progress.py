"""What is seen of a preparation on its way."""

import pytest

from sophia_train.data import progress
from sophia_train.data.progress import ProgressDisplay


def test_it_says_how_fast_and_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressDisplay(total=100e6) as display:
        display.show(1000, 10_000_000, 40_000_000)  # of an earlier call
        now[0] += 20
        display.show(1500, 15_000_000, 60_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "1,500 documents  15,000,000 tokens  1.0 MB/s  eta 0:00:40"


def test_there_is_no_end_in_sight_before_anything_has_moved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", -1.0)
    with ProgressDisplay(total=0.0) as display:
        display.show(0, 0, 0)
        display.show(0, 0, 0)
    assert capsys.readouterr().err.splitlines() == ["0 documents  0 tokens"] * 2
