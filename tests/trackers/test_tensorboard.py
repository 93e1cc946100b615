"""TensorBoard reads back what was logged."""

import sys

import pytest

from sophia_train.errors import UnavailableError
from sophia_train.trackers.tensorboard import TensorBoardTracker

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(run_dir):
    events = event_accumulator.EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0, "tensors": 0})
    return events.Reload()


def test_scalars_and_texts_are_in_the_event_file(run_info, record, tmp_path):
    tracker = TensorBoardTracker()
    tracker.start(run_info())
    for step in (1, 2):
        tracker.log(record(step, **{"train/loss": 3.0 - step}))
    tracker.text("sample", "def f():\n    return 1", 2)
    tracker.close(0)
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]
    for axis in ("tokens", "seconds", "flops"):
        assert [e.value for e in events.Scalars(f"axis/{axis}")] == [record(s)[axis] for s in (1, 2)]
    (text,) = events.Tensors("sample/text_summary")
    assert text.step == 2 and b"    def f():\n        return 1" in text.tensor_proto.string_val[0]


def test_a_resumed_run_hides_the_steps_after_its_checkpoint(run_info, record, tmp_path):
    first = TensorBoardTracker()
    first.start(run_info())
    for step in range(1, 8):
        first.log(record(step, loss=1.0))
    first.close(75)
    second = TensorBoardTracker()
    second.start(run_info(resumed_from_step=4))
    for step in range(5, 10):
        second.log(record(step, loss=2.0))
    second.close(0)
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("loss")] == [
        *((step, 1.0) for step in range(1, 5)),
        *((step, 2.0) for step in range(5, 10)),
    ]


def test_the_missing_package_is_named_before_training(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UnavailableError, match=r"pip install 'sophia_train\[tensorboard\]'"):
        TensorBoardTracker()
