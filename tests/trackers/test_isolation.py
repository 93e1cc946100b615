"""No tracker but the record can stop, hold or change a run."""

import logging
import threading

import pytest

from sophia_train.trackers.base import Isolated, Tracker, Trackers
from sophia_train.trackers.jsonl import FILE_NAME, JsonlTracker, read_metrics


class Listener(Tracker):
    """Keeps the calls it gets, in order, and the thread they come on."""

    def __init__(self):
        self.calls = []
        self.threads = set()

    def _take(self, *call):
        self.threads.add(threading.current_thread())
        self.calls.append(call)

    def start(self, run):
        self._take("start", run.name)

    def log(self, record):
        self._take("log", record)

    def text(self, name, text, step):
        self._take("text", name, text, step)

    def close(self, code):
        self._take("close", code)


class QuickListener(Listener):
    slow = False


class Raising(Listener):
    """Raises from the calls named."""

    def __init__(self, *names, slow=True):
        super().__init__()
        self.names = names
        self.slow = slow

    def _take(self, name, *call):
        super()._take(name, *call)
        if name in self.names:
            raise RuntimeError(f"{name} is broken\nwith a second line")


class Stalled(Listener):
    """Blocks in one call until it is released."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.entered = threading.Event()
        self.released = threading.Event()

    def _take(self, name, *call):
        if name == self.name:
            self.entered.set()
            self.released.wait()
        super()._take(name, *call)


@pytest.fixture
def stalled():
    made = []

    def make(name):
        made.append(Stalled(name))
        return made[-1]

    yield make
    for tracker in made:
        tracker.released.set()


def test_every_call_arrives_in_order_on_another_thread(run_info, record):
    guest = Listener()
    isolated = Isolated(guest)
    isolated.start(run_info())
    for step in range(50):
        isolated.log(record(step))
    isolated.text("sample", "words", 50)
    isolated.close(75)
    expected = [("start", "trial"), *(("log", record(step)) for step in range(50))]
    assert guest.calls == [*expected, ("text", "sample", "words", 50), ("close", 75)]
    assert threading.current_thread() not in guest.threads and len(guest.threads) == 1
    assert isolated.dropped == isolated.failures == 0


def test_a_record_that_is_changed_after_log_arrives_as_it_was(run_info, record, stalled):
    guest = stalled("start")
    isolated = Isolated(guest)
    isolated.start(run_info())
    mine = record(1)
    isolated.log(mine)
    mine["step"] = 2
    guest.released.set()
    isolated.close(0)
    assert guest.calls[1] == ("log", record(1))


@pytest.mark.parametrize("name", ["start", "log", "text", "close"])
@pytest.mark.parametrize("slow", [True, False])
def test_what_a_guest_raises_is_counted_and_warned_of_once(name, slow, run_info, record, caplog):
    guest, other, record_keeper = Raising(name, slow=slow), Listener(), JsonlTracker()
    trackers = Trackers(record_keeper, [guest, other])
    trackers.start(run_info())
    for step in range(5):
        trackers.log(record(step))
        trackers.text("sample", "words", step)
    trackers.close(0)
    assert len(read_metrics(run_info().run_dir / FILE_NAME)) == 5
    assert len(other.calls) == 12
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "Raising" in warnings[0] and f"RuntimeError: {name} is broken" in warnings[0]
    assert "\n" not in warnings[0]
    if name == "start":
        assert guest.calls == [("start", "trial")], "a guest that did not start gets nothing more"


def test_failures_are_counted(run_info, record):
    isolated = Isolated(Raising("log"))
    isolated.start(run_info())
    for step in range(5):
        isolated.log(record(step))
    isolated.close(0)
    assert isolated.failures == 5


def test_a_full_queue_drops_and_counts_without_waiting(run_info, record, stalled, caplog):
    guest = stalled("start")
    isolated = Isolated(guest, capacity=3)
    isolated.start(run_info())
    guest.entered.wait()
    for step in range(10):
        isolated.log(record(step))
    assert isolated.dropped == 7
    assert sum("records are dropped" in r.getMessage() for r in caplog.records) == 1
    guest.released.set()
    isolated.close(0)
    assert [call for call in guest.calls if call[0] == "log"] == [("log", record(s)) for s in range(3)]
    assert guest.calls[-1] == ("close", 0), "a guest that recovers is closed properly"
    assert any("missed 7 calls" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(("name", "capacity"), [("start", 1), ("start", 99), ("log", 99), ("close", 99)])
def test_a_guest_that_never_returns_is_left_behind(name, capacity, run_info, record, stalled, caplog):
    guest = stalled(name)
    isolated = Isolated(guest, capacity=capacity, close_timeout=0.05)
    isolated.start(run_info())
    for step in range(20):
        isolated.log(record(step))
    isolated.close(0)
    assert not guest.released.is_set(), "close came back although the guest is still stuck"
    assert any("left behind" in r.getMessage() for r in caplog.records)
    thread = next(t for t in threading.enumerate() if t.name == "tracker-Stalled")
    assert thread.daemon, "the interpreter can end without it"


def test_the_record_comes_first_and_what_it_raises_is_not_swallowed(run_info, record, tmp_path):
    seen = []

    class Reader(QuickListener):
        def log(self, record):
            seen.append(read_metrics(tmp_path / FILE_NAME)[-1]["step"])

    class Full(QuickListener):
        def log(self, record):
            raise OSError(28, "disk full")

    trackers = Trackers(JsonlTracker(), [Reader()])
    trackers.start(run_info())
    for step in range(3):
        trackers.log(record(step))
    trackers.close(0)
    assert seen == [0, 1, 2]

    trackers = Trackers(Full(), [Listener()])
    trackers.start(run_info())
    with pytest.raises(OSError, match="disk full"):
        trackers.log(record(0))
    trackers.close(74)


def test_quick_trackers_are_called_directly(run_info, record):
    quick = QuickListener()
    trackers = Trackers(QuickListener(), [quick])
    trackers.start(run_info())
    trackers.log(record(1))
    assert quick.calls == [("start", "trial"), ("log", record(1))]
    assert quick.threads == {threading.current_thread()}
