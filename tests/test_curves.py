"""The picture of a run's loss."""

import json
import math

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from sophia_train import durable
from sophia_train.compare.curves import plot_run
from sophia_train.errors import DataError


def write(run_dir, losses, validation_interval=10):
    records = []
    for step, loss in enumerate(losses):
        record = {"step": step, "tokens": 512 * step, "seconds": 0.1 * step, "flops": 1e6, "train/loss": loss}
        if validation_interval and step % validation_interval == 0:
            record["val/loss"] = loss + 0.1
        records.append(json.dumps(record).replace("NaN", '"NaN"'))
    (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in records))


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn."""
    drawn = []
    original = Figure.__init__

    def remember(self, *args, **kwargs):
        original(self, *args, **kwargs)
        drawn.append(self)

    monkeypatch.setattr(Figure, "__init__", remember)
    return drawn


def decay(steps):
    return [2.0 + 3.0 * math.exp(-step / 30) for step in range(steps)]


def test_every_recorded_loss_is_drawn(tmp_path, figures):
    write(tmp_path, decay(100))
    path = plot_run(tmp_path, {"unigram": 3.4, "bigram": 3.2})
    assert path == tmp_path / "loss.png"
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 400 and image.shape[1] > 800
    axes = figures[0].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["training"].get_xdata(), range(100))
    np.testing.assert_array_equal(lines["training"].get_ydata(), decay(100))
    np.testing.assert_array_equal(lines["validation"].get_xdata(), range(0, 100, 10))
    texts = [text.get_text() for text in axes.texts]
    assert texts == [f"{decay(91)[-1] + 0.1:.3f}", "bigram 3.200", "unigram 3.400"]


def test_tokens_stand_above_their_steps(tmp_path, figures):
    write(tmp_path, decay(101))
    plot_run(tmp_path)
    (above,) = figures[0].axes[0].child_axes
    assert above.get_xlim() == pytest.approx((0, 512 * 100))


def test_a_spike_does_not_flatten_the_curve(tmp_path, figures):
    losses = decay(200)
    losses[150] = 1000.0
    losses[151] = math.nan
    write(tmp_path, losses, validation_interval=None)
    plot_run(tmp_path)
    assert np.isfinite(figures[0].axes[0].lines[0].get_ydata()).all()
    low, high = figures[0].axes[0].get_ylim()
    assert low < min(decay(200)) and 5.0 < high < 6.0


def test_labels_of_near_baselines_do_not_overlap(tmp_path, figures):
    write(tmp_path, decay(100))
    plot_run(tmp_path, {"a": 3.0, "b": 3.001, "c": 3.002})
    figures[0].canvas.draw()
    boxes = sorted((text.get_window_extent() for text in figures[0].axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 4
    assert all(lower.y1 <= upper.y0 for lower, upper in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize("losses", [[3.0], [3.0, 3.0, 3.0]])
def test_very_short_runs_have_a_picture_too(tmp_path, losses):
    write(tmp_path, losses)
    assert plot_run(tmp_path).stat().st_size > 0


def test_a_run_without_losses_is_an_error_in_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "optim/lr": 0.1}\n')
    with pytest.raises(DataError, match="has no train/loss"):
        plot_run(tmp_path)
    assert not (tmp_path / "loss.png").exists()


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    write(tmp_path, decay(30))
    path = plot_run(tmp_path)
    old = path.read_bytes()
    write(tmp_path, decay(60))

    def fail(operation, where):
        raise OSError(28, "disk full")

    monkeypatch.setattr(durable, "before", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_run(tmp_path)
    assert path.read_bytes() == old


def test_the_global_backend_is_left_alone(tmp_path):
    write(tmp_path, decay(30))
    before = matplotlib.rcParams._get("backend")
    plot_run(tmp_path)
    assert matplotlib.rcParams._get("backend") is before
