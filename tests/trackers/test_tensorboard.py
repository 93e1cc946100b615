"""TensorBoard reads back what was logged."""

import json
import sys

import pytest

from sophia_train.errors import UnavailableError
from sophia_train.trackers.panels import SECTIONS
from sophia_train.trackers.tensorboard import TensorBoardTracker, tag_of, title_of

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(run_dir, folder=""):
    path = run_dir / "tensorboard" / folder
    return event_accumulator.EventAccumulator(str(path), {"scalars": 0, "tensors": 0}).Reload()


def points(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def logged(run, records):
    tracker = TensorBoardTracker()
    tracker.start(run)
    for record in records:
        tracker.log(record)
    tracker.close(0)


def test_scalars_and_texts_are_in_the_event_file(run_info, record, tmp_path):
    tracker = TensorBoardTracker()
    tracker.start(run_info())
    for step in (1, 2):
        tracker.log(record(step, **{"train/loss": 3.0 - step}))
    tracker.text("sample", "def f():\n    return 1", 2)
    tracker.close(0)
    events = read(tmp_path)
    assert points(events, "train/loss") == [(1, 2.0), (2, 1.0)]
    for axis in ("tokens", "seconds", "flops"):
        assert [value for _, value in points(events, f"axis/{axis}")] == [record(s)[axis] for s in (1, 2)]
    (text,) = events.Tensors("sample/text_summary")
    assert text.step == 2 and b"    def f():\n        return 1" in text.tensor_proto.string_val[0]


def test_losses_are_there_against_tokens_milliseconds_and_gigaflops(run_info, record, tmp_path):
    losses = {step: 4.0 / step for step in (1, 2, 4)}
    logged(run_info(), [{**record(s, **{"val/loss": v}), "flops": s * 2e19} for s, v in losses.items()])
    for unit, size in (("tokens", 64), ("milliseconds", 500), ("gigaflops", 2 * 10**10)):
        found = points(read(tmp_path, f"by_{unit}"), f"by_{unit}/val/loss")
        assert found == [(size * step, loss) for step, loss in losses.items()]


def test_a_resumed_run_hides_what_came_after_its_checkpoint_on_every_axis(run_info, record, tmp_path):
    first = [record(step, **{"val/loss": 1.0}) for step in range(1, 8)]
    second = [record(step, **{"val/loss": 2.0}) for step in range(5, 10)]
    logged(run_info(), first)
    for path in tmp_path.rglob("events.out.tfevents.*"):  # of an earlier second, which these names begin with
        path.rename(path.with_name(path.name.replace("tfevents.", "tfevents.0")))
    logged(run_info(resumed_from_step=4), second)
    expected = [*((step, 1.0) for step in range(1, 5)), *((step, 2.0) for step in range(5, 10))]
    assert points(read(tmp_path), "val/loss") == expected
    for unit, size in (("tokens", 64), ("milliseconds", 500)):
        found = points(read(tmp_path, f"by_{unit}"), f"by_{unit}/val/loss")
        assert found == [(size * step, loss) for step, loss in expected]


@pytest.mark.filterwarnings("ignore:html5lib:DeprecationWarning")  # while importing its plugin
def test_the_charts_of_tensorboard_are_the_panels_and_find_their_metrics(run_info, record, tmp_path):
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
    from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin

    metrics = {panel.metric for section in SECTIONS for panel in section.panels}
    neighbours = {f"{metric}_of_something_else": 0.0 for metric in metrics}
    logged(run_info(), [record(3, **dict.fromkeys(metrics, 1.5), **neighbours)])
    folder = str(tmp_path / "tensorboard")
    multiplexer = EventMultiplexer().AddRunsFromDirectory(folder)
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, folder)
    plugins = {}
    context = base_plugin.TBContext(
        logdir=folder, data_provider=provider, plugin_name_to_instance=plugins, sampling_hints={}
    )
    plugins["scalars"] = ScalarsPlugin(context)
    plugin = CustomScalarsPlugin(context)
    layout = json.loads(plugin.layout_impl(RequestContext(), ""))
    charts = {category["title"]: category["chart"] for category in layout["category"]}
    assert {name: [chart["title"] for chart in each] for name, each in charts.items()} == {
        section.name: [title_of(panel) for panel in section.panels] for section in SECTIONS
    }
    assert "Validation loss against seconds, in milliseconds" in str(layout)
    for section in SECTIONS:
        for panel, chart in zip(section.panels, charts[section.name], strict=True):
            (pattern,) = chart["multiline"]["tag"]
            run = "." if panel.axis == "step" else tag_of(panel).partition("/")[0]
            found = plugin.scalars_impl(RequestContext(), run, pattern, "")
            assert found["regex_valid"]
            assert {tag: len(series) for tag, series in found["tag_to_events"].items()} == {tag_of(panel): 1}


def test_the_missing_package_is_named_before_training(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UnavailableError, match=r"pip install 'sophia_train\[tensorboard\]'"):
        TensorBoardTracker()
