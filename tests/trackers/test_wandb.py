"""Weights & Biases for real, offline."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest
from trackers.offline_runs import config, history, of_kind, offline_folders, read, summary

from sophia_train.errors import ConfigError, DataError, UnavailableError
from sophia_train.trackers.base import AXES
from sophia_train.trackers.jsonl import FILE_NAME, JsonlTracker, read_metrics
from sophia_train.trackers.labels import TRIALS, group_name
from sophia_train.trackers.wandb import WandbTracker

wandb = pytest.importorskip("wandb")
SECRET = "f00dfeed" * 5


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No login, no settings and no home of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    wandb.teardown()


def run_offline(run, records, **options):
    tracker = WandbTracker(mode="offline", **options)
    tracker.start(run)
    for record in records:
        tracker.log(record)
    tracker.text("sample", "some <words>", records[-1]["step"])
    tracker.close(7)
    wandb.teardown()  # the file is whole when the service has ended


def test_an_offline_run_holds_every_record_with_its_axes(run_info, record, tmp_path):
    records = [record(s, **{"train/loss": 1.0 / s}) for s in (1, 2, 3)]
    run_offline(run_info(), records, group="trials", tags=("a", "b"))
    (folder,) = offline_folders(tmp_path)
    written = read(folder)

    logged = history(written)
    assert [{key: one[key] for key in records[0]} for one in logged[:-1]] == records
    assert logged[-1]["step"] == 3, "the text"
    assert any(path.read_text() == "<pre>some &lt;words&gt;</pre>" for path in folder.rglob("*.html"))

    metrics = {m.glob_name or m.name: m for m in (r.metric for r in written) if m.glob_name or m.name}
    assert metrics.keys() >= {"step", "tokens", "seconds", "flops", "*"}
    assert metrics["*"].step_metric == "step"

    run = of_kind(written, "run")[0]
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == (
        "sophia_train",
        "trial",
        "trials",
        ["setup:100 steps", "experiment:trial", "a", "b"],
    )
    assert config(written)["model"] == {"n_layer": 2}
    assert [each.exit_code for each in of_kind(written, "exit")] == [7]


def test_every_metric_can_be_drawn_against_every_axis(run_info, record, tmp_path):
    run_offline(run_info(), [record(1, **{"val/loss": 2.0})])
    (folder,) = offline_folders(tmp_path)
    written = read(folder)
    metrics = {m.glob_name or m.name: m for m in (r.metric for r in written)}
    assert {axis for axis in AXES if metrics[axis].options.hidden} == set(AXES), "no charts of their own"
    assert metrics["*"].step_metric in metrics
    for one in history(written)[:-1]:
        assert one.keys() >= {*AXES, "val/loss"}, "an axis can be chosen where every record has it"


def test_group_tags_and_labels_come_from_the_settings(run_of, record, tmp_path):
    run = run_of("experiment=demo", "seed=3", "name='demo-seed=3'")
    run_offline(run, [record(1)], tags=["mine"])
    (folder,) = offline_folders(tmp_path)
    written = read(folder)
    sent = of_kind(written, "run")[0]
    assert sent.run_group == group_name(run_of("experiment=demo", "seed=4"))
    labels = {
        "optimizer": "Sophia GNB",
        "model": "4x128",
        "setup": "Sophia GNB 4x128 600 steps",
        "data": "PythonStdlib",
        "experiment": "demo",
    }
    assert list(sent.tags) == [*(f"{kind}:{label}" for kind, label in labels.items()), "mine"]
    assert config(written)["labels"] == labels
    assert config(written) | run.config == config(written), "all settings are there as they are"


def test_a_trial_of_a_search_has_its_tag(run_info, record, tmp_path):
    run_offline(run_info(name="adamw_trial_000"), [record(1)])
    (folder,) = offline_folders(tmp_path)
    assert TRIALS in of_kind(read(folder), "run")[0].tags


def test_a_long_name_is_cut_to_a_tag_that_the_service_takes(run_info, record, tmp_path):
    run_offline(run_info(name="n" * 200), [record(1)])
    (folder,) = offline_folders(tmp_path)
    sent = of_kind(read(folder), "run")[0]
    assert sent.display_name == "n" * 200 and "experiment:" + "n" * 53 in sent.tags


def test_the_summary_is_of_all_invocations(run_info, record, tmp_path):
    losses = {0: 5.0, 2: 1.5, 4: 3.0, 6: 2.5}
    records = [record(s, **{"val/loss": v, "perf/tokens_per_second": 10.0 * s}) for s, v in losses.items()]
    run = run_info(resumed_from_step=4)
    keeper = JsonlTracker()
    keeper.start(run_info())
    for one in records:
        keeper.log(one)
    keeper.close(0)
    run_offline(run, records[-1:])  # wandb sees the end alone
    (folder,) = offline_folders(tmp_path)
    found = summary(read(folder))
    assert {key: found[key] for key in AXES} == record(6)
    assert found["final_val_loss"] == 2.5
    assert (found["best_val_loss"], found["best_step"]) == (1.5, 2)
    assert found["tokens_per_second"] == 30.0
    assert "mfu" not in found, "it was never measured"


def test_metrics_that_cannot_be_read_leave_a_run_that_ended(run_info, record, tmp_path):
    tracker = WandbTracker(mode="offline")
    tracker.start(run_info())
    tracker.log(record(1))
    (tmp_path / FILE_NAME).write_text("not JSON\n")
    with pytest.raises(DataError, match="line 1"):  # which `Guarded` catches
        tracker.close(7)
    wandb.teardown()
    (folder,) = offline_folders(tmp_path)
    assert [each.exit_code for each in of_kind(read(folder), "exit")] == [7]


def test_a_resumed_run_continues_under_its_id_and_a_new_one_gets_another(run_info, record, tmp_path):
    ids = []
    for resumed_from_step in (None, 4, None):
        run_offline(run_info(resumed_from_step), [record(5)])
        ids.append((tmp_path / "wandb_id").read_text().strip())
    assert ids[0] == ids[1] != ids[2]
    files = [path.name for folder in offline_folders(tmp_path) for path in folder.glob("*.wandb")]
    assert sorted(files) == sorted(f"run-{run_id}.wandb" for run_id in ids)


def test_nothing_of_the_environment_is_kept(run_info, record, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("OTHER_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_MODE", "disabled")  # the configuration says offline, and is what counts
    monkeypatch.setenv("WANDB_PROJECT", "another")
    before = dict(os.environ)
    run_offline(run_info(), [record(1)])
    (folder,) = offline_folders(tmp_path)
    assert of_kind(read(folder), "run")[0].project == "sophia_train"
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    assert dict(os.environ) == before


def test_disabled_writes_nothing(run_info, record, tmp_path):
    tracker = WandbTracker(mode="disabled")
    tracker.start(run_info())
    tracker.log(record(1))
    tracker.text("sample", "words", 1)
    tracker.close(0)
    assert not list(tmp_path.rglob("*.wandb"))


def test_wrong_settings_end_before_training(monkeypatch):
    with pytest.raises(ConfigError, match="mode=onlin is unknown; use online, offline, disabled"):
        WandbTracker(mode="onlin")
    with pytest.raises(UnavailableError, match="no valid login; run `wandb login`"):
        WandbTracker(mode="online")
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    with pytest.raises(UnavailableError, match="no valid login"):
        WandbTracker(mode="online")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UnavailableError, match=r"pip install 'sophia_train\[wandb\]'"):
        WandbTracker()


def test_a_server_that_never_answers_holds_neither_the_run_nor_its_end(tmp_path):
    program = """
        from pathlib import Path
        from sophia_train.trackers.base import RunInfo, Trackers
        from sophia_train.trackers.jsonl import JsonlTracker
        from sophia_train.trackers.wandb import WandbTracker

        guest = WandbTracker(init_timeout=0.5, finish_timeout=0.5)
        trackers = Trackers(JsonlTracker(), [guest], close_timeout=0.2)
        trackers.start(RunInfo(Path("."), "trial", {}, None, 5))
        for step in range(5):
            trackers.log({"step": step, "tokens": 0, "seconds": 0, "flops": 0})
        trackers.close(0)
        print("the run ended", flush=True)
    """
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and says nothing
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "WANDB_API_KEY": SECRET,
                "WANDB_BASE_URL": address,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ended.returncode == 0 and ended.stdout == "the run ended\n", ended.stderr
    assert "Traceback" not in ended.stderr
    assert [one["step"] for one in read_metrics(tmp_path / FILE_NAME)] == list(range(5))
