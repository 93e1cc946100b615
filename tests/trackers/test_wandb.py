"""Weights & Biases for real, offline."""

import json
import os
import socket
import struct
import subprocess
import sys
import textwrap

import pytest

from sophia_train.errors import ConfigError, UnavailableError
from sophia_train.trackers.jsonl import FILE_NAME, read_metrics
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


def read(folder):
    """Every record in the transaction log of an offline run: a 7-byte header, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    content, records, parts, at = path.read_bytes(), [], [], 7
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # no header fits into the rest of the block
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(b"".join(parts)))
            parts = []
    return records


def history(records):
    """The logged values, as wandb would show them."""
    return [
        {
            item.nested_key[0]: json.loads(item.value_json)
            for item in r.history.item
            if len(item.nested_key) == 1
        }
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]


def offline_folders(run_dir):
    return sorted((run_dir / "wandb").glob("offline-run-*"))


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

    run = next(r.run for r in written if r.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == (
        "sophia_train",
        "trial",
        "trials",
        ["a", "b"],
    )
    assert {u.key: json.loads(u.value_json) for u in run.config.update}["model"] == {"n_layer": 2}
    assert next(r.exit.exit_code for r in written if r.WhichOneof("record_type") == "exit") == 7


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
    assert next(r.run.project for r in read(folder) if r.WhichOneof("record_type") == "run") == "sophia_train"
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
