"""What a person reads, on a terminal and in a log file."""

import io

import pytest
from rich.console import Console

from sophia_train.trackers.console import ConsoleTracker, Pace, count, duration

METRICS = {
    "train/loss": 2.6129,
    "optim/lr": 5.1e-4,
    "perf/tokens_per_second": 12_345.0,
    "optim/grad_norm": 1.0,
}


@pytest.fixture
def screen():
    return io.StringIO()


def console(screen, terminal, width=80):
    return Console(file=screen, force_terminal=terminal, width=width, highlight=False, _environ={})


def test_elsewhere_than_on_a_terminal_one_plain_line_a_record(screen, run_info, record):
    tracker = ConsoleTracker(console(screen, terminal=False, width=40))
    tracker.start(run_info(total_steps=600))
    tracker.log(record(118, **METRICS))
    tracker.log(record(120, **METRICS, **{"val/loss": 2.701}))
    tracker.close(0)
    assert screen.getvalue() == (
        "step 118/600  loss 2.613  lr 5.1e-04  12.3k tok/s\n"
        "step 120/600  loss 2.613  val 2.701  lr 5.1e-04  12.3k tok/s  eta 4m00s\n"
    )


def test_a_terminal_of_80_columns_shows_the_whole_state_on_one_line(screen, run_info, record):
    shown = console(screen, terminal=True)
    tracker = ConsoleTracker(shown)
    tracker.start(run_info(total_steps=400_000))
    tracker.log(record(99_998, **METRICS))
    tracker.log(record(100_000, **METRICS, **{"val/loss": 2.701}))
    line = io.StringIO()
    Console(file=line, width=80).print(tracker._progress.get_renderable())
    tracker.close(0)
    assert line.getvalue().count("\n") == 1
    for part in ("step 100000/400000", "loss 2.613", "val 2.701", "12.3k tok/s", "eta 1d17h"):
        assert part in line.getvalue()
    assert "step 100000/400000  loss 2.613  val 2.701" in screen.getvalue(), (
        "the evaluation stays on the screen"
    )


def test_texts_are_shown_briefly_and_cannot_command_the_terminal(screen, run_info):
    tracker = ConsoleTracker(console(screen, terminal=False))
    tracker.start(run_info())
    tracker.text("sample", "\x1b[2Jdef f(x):\n\treturn [bold]x[/bold]\n" + "more\n" * 30, 40)
    tracker.close(0)
    output = screen.getvalue()
    assert "\x1b" not in output
    assert "sample at step 40" in output and "return [bold]x[/bold]" in output
    assert len(output.splitlines()) < 12 and "24 more lines" in output


def test_the_remaining_time_comes_from_recent_records(record):
    pace = Pace()
    assert pace.remaining(record(1), 100) is None
    assert Pace().remaining(record(10, **{"perf/step_seconds": 2.0}), 100) == 180
    assert pace.remaining(record(11), 100) == pytest.approx(89 * 0.5)
    slower = [{"step": 11 + s, "seconds": 5.5 + 3.0 * s} for s in range(1, 60)]
    remaining = [pace.remaining(one, 100) for one in slower]
    assert remaining[-1] == pytest.approx(30 * 3.0), "the first, quick steps are forgotten"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (102, "1m42s"),
        (3600, "1h00m"),
        (90_000, "1d01h"),
        (-3, "0s"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (12_345, "12.3k"), (529_000, "529k"), (1.5e6, "1.5M"), (2e9, "2.0G")],
)
def test_counts(value, text):
    assert count(value) == text
