"""metrics.jsonl holds every step once, whatever happened in between."""

import json
import math

import pytest

from sophia_train import durable
from sophia_train.errors import DataError
from sophia_train.trackers.jsonl import FILE_NAME, JsonlTracker, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / FILE_NAME


def written(run, records):
    tracker = JsonlTracker()
    tracker.start(run)
    for one in records:
        tracker.log(one)
    tracker.close(0)


def test_records_come_back_equal(run_info, record, path):
    records = [record(s, **{"train/loss": 1 / (s + 1), "optim/lr": 6e-4 / 7}) for s in range(5)]
    written(run_info(), records)
    assert read_metrics(path) == records


def test_each_line_is_strict_json_also_for_numbers_that_are_not_finite(run_info, record, path):
    odd = {"a": math.nan, "b": math.inf, "c": -math.inf}
    written(run_info(), [record(1, **odd)])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (back,) = read_metrics(path)
    assert math.isnan(back["a"]) and back["b"] == math.inf and back["c"] == -math.inf


def test_a_line_can_be_read_as_soon_as_it_is_logged(run_info, record, path):
    tracker = JsonlTracker()
    tracker.start(run_info())
    for step in range(3):
        tracker.log(record(step))
        assert len(read_metrics(path)) == step + 1
    tracker.close(0)


@pytest.mark.parametrize("step", [0, 4, 9, 100])
def test_a_resumed_run_equals_one_that_was_not_interrupted(step, run_info, record, path):
    records = [record(s) for s in range(1, 11) for _ in range(2)]
    written(run_info(), records)
    uninterrupted = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step": 11, "tok')
    written(run_info(resumed_from_step=step), [r for r in records if r["step"] > step])
    assert path.read_bytes() == uninterrupted


def test_a_new_run_starts_empty_and_so_does_a_resumed_one_without_a_file(run_info, record, path):
    written(run_info(), [record(1)])
    written(run_info(), [])
    assert path.read_bytes() == b""
    path.unlink()
    written(run_info(resumed_from_step=5), [record(6)])
    assert read_metrics(path) == [record(6)]


@pytest.mark.parametrize(
    "line", [b'{"step": 2, "tok', b"[]", b"7", b"{}", b'{"step": "2"}', b'{"step": NaN}', b"\xff", b""]
)
def test_a_damaged_line_is_named(line, run_info, record, path):
    written(run_info(), [record(1), record(3)])
    first, second, _ = path.read_bytes().split(b"\n")
    damaged = b"\n".join([first, line, second, b""])
    path.write_bytes(damaged)
    for read in (lambda: read_metrics(path), lambda: written(run_info(resumed_from_step=3), [])):
        with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not a metrics record"):
            read()
    assert path.read_bytes() == damaged, "nothing was changed"


def test_cutting_back_is_all_or_nothing(run_info, record, path, monkeypatch):
    written(run_info(), [record(s) for s in range(10)])
    before = path.read_bytes()
    seen = []

    def fail_at(index):
        def hook(operation, where):
            seen.append(operation)
            if len(seen) == index + 1:
                raise OSError(5, "I/O error")

        return hook

    monkeypatch.setattr(durable, "before", fail_at(1000))
    written(run_info(resumed_from_step=9), [])  # nothing to cut: the file stays untouched
    monkeypatch.setattr(durable, "before", fail_at(1000))
    seen.clear()
    durable.write_bytes(path.with_name("other"), b"")
    operations = len(seen)
    after = b"".join(before.splitlines(keepends=True)[:5])
    for index in range(operations):
        path.write_bytes(before)
        seen.clear()
        monkeypatch.setattr(durable, "before", fail_at(index))
        with pytest.raises(OSError, match="I/O error"):
            JsonlTracker().start(run_info(resumed_from_step=4))
        assert path.read_bytes() in (before, after)
    assert operations >= 4


def test_a_line_that_cannot_be_written_leaves_no_part_of_it(run_info, record, path):
    tracker = JsonlTracker()
    tracker.start(run_info())
    tracker.log(record(1))

    class FullDisk:
        """The open file, on a disk with room for 10 more bytes."""

        def __init__(self, file):
            self.file = file
            self.room = 10

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            if not self.room:
                raise OSError(28, "No space left on device")
            written = self.file.write(content[: self.room])
            self.room -= written
            return written

    tracker._file = FullDisk(tracker._file)
    with pytest.raises(OSError, match="No space left"):
        tracker.log(record(2))
    assert path.read_bytes().endswith(b"\n") and read_metrics(path) == [record(1)]
    tracker.close(74)


def test_sync_and_close_reach_the_disk(run_info, record, path, monkeypatch):
    tracker = JsonlTracker()
    tracker.start(run_info())
    tracker.log(record(1))
    operations = []
    monkeypatch.setattr(durable, "before", lambda operation, where: operations.append((operation, where)))
    tracker.sync()
    assert operations == [("fsync", path)]
    tracker.close(0)
    tracker.close(0)
    assert operations == [("fsync", path)] * 2


def test_texts_are_files_and_a_resumed_run_drops_the_later_ones(run_info, tmp_path):
    tracker = JsonlTracker()
    tracker.start(run_info())
    for step in (5, 10):
        tracker.text("sample/0", f"text é at {step}", step)
    tracker.close(0)
    folder = tmp_path / "samples"
    assert (folder / "sample-0-0000010.txt").read_text(encoding="utf-8") == "text é at 10\n"
    written(run_info(resumed_from_step=7), [])
    assert [file.name for file in folder.iterdir()] == ["sample-0-0000005.txt"]
    written(run_info(), [])
    assert list(folder.iterdir()) == []
