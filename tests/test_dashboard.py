"""The dashboard shows what runs log, and is the library's own."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support import ROOT, load_script
from trackers.offline_runs import config, of_kind, offline_folders, read, summary

from sophia_train.trackers.base import RunInfo
from sophia_train.trackers.jsonl import read_metrics
from sophia_train.trackers.labels import TRIALS, group_name

workspaces = pytest.importorskip("wandb_workspaces.workspaces")
internal = pytest.importorskip("wandb_workspaces.reports.v2.internal")

ON_GPUS_ONLY = {"perf/mfu", "perf/peak_memory_gb"}
SECRET = "f00dfeed" * 5


@pytest.fixture(scope="module")
def dashboard():
    return load_script("dashboard")


@pytest.fixture(scope="module")
def spec(dashboard, tmp_path_factory):
    path = tmp_path_factory.mktemp("dashboard") / "spec.json"
    assert dashboard.main(["--project", "trial", "--spec", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def tiny_run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard") / "run"
    overrides = ["tracker=wandb", "tracker.wandb.mode=offline", "tracker.wandb.project=trial"]
    assert tiny(folder, *overrides).code == 0
    return folder


def configs(tree):
    """The settings of every line plot anywhere in a specification."""
    if isinstance(tree, dict):
        if tree.get("viewType") == "Run History Line Plot":
            yield tree["config"]
        else:
            for value in tree.values():
                yield from configs(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from configs(value)


def run_sets(part):
    """The sets of runs of the workspace or the report."""
    if "section" in part["spec"]:
        return part["spec"]["section"]["runSets"]
    return [each for block in part["spec"]["blocks"] for each in block.get("metadata", {}).get("runSets", [])]


@pytest.mark.parametrize("kind", ["workspace", "report"])
def test_metrics_and_axes_are_those_that_a_run_logs(kind, spec, tiny_run):
    logged = {key for record in read_metrics(tiny_run / "metrics.jsonl") for key in record}
    found = list(configs(spec[kind]))
    assert {metric for config in found for metric in config["metrics"]} - ON_GPUS_ONLY <= logged
    assert {config["xAxis"] for config in found} <= logged


@pytest.mark.parametrize("kind", ["workspace", "report"])
def test_every_panel_is_there(kind, spec):
    found = list(configs(spec[kind]))
    drawn = {
        (metric, config["xAxis"], config.get("groupBy")) for config in found for metric in config["metrics"]
    }
    for axis in ("step", "tokens", "seconds", "flops"):
        assert {("val/loss", axis, None), ("train/loss", axis, None)} <= drawn
        assert ("val/loss", axis, "labels.value.setup") in drawn, "the mean of each optimizer"
    for metric in ("optim/unclipped_fraction", "optim/hessian_norm", "perf/hessian_share", "optim/lr"):
        assert (metric, "step", None) in drawn
    assert {config["groupAgg"] for config in found} == {"mean"}
    titles = [config["chartTitle"] for config in found]
    assert len(titles) == len(set(titles))


def test_runs_are_grouped_by_what_the_tracker_sends(spec, tiny_run):
    (folder,) = offline_folders(tiny_run)
    written = read(folder)
    sent = of_kind(written, "run")[0]
    assert sent.project == spec["workspace"]["project"] == spec["report"]["project"]["name"] == "trial"
    setup = config(written)["labels"]["setup"]
    assert setup.startswith("Sophia GNB ") and setup.endswith(" 6 steps")
    assert sent.run_group.startswith(f"{setup} "), "of one setup, like those of its mean"
    manifest = json.loads(next(tiny_run.rglob("manifest.json")).read_text())
    run = RunInfo(tiny_run, "run", manifest["config"], None, 6, manifest["data"])
    assert sent.run_group == group_name(run), "with the digests of its tokens"
    for kind in spec:
        for each in run_sets(spec[kind]):
            assert each["grouping"] == [{"section": "run", "name": "group"}]
    columns = run_sets(spec["workspace"])[0]["runFeed"]["columnOrder"]
    figures = {column.removeprefix("summary:") for column in columns if column.startswith("summary:")}
    assert figures and figures <= summary(written).keys()


def test_no_run_is_named_so_that_runs_may_come_later(spec, tiny_run):
    assert (tiny_run / "wandb_id").read_text().strip() not in json.dumps(spec)
    for kind in spec:
        for each in run_sets(spec[kind]):
            assert each["selections"] == {"root": 1, "bounds": [], "tree": []}, "all of them"
            assert each["search"] == {"query": ""}
            assert "project" not in each, "that of the dashboard"


def test_trials_of_a_search_are_left_out_and_nothing_else(spec):
    for kind in spec:
        for each in run_sets(spec[kind]):
            (only,) = each["filters"]["filters"]
            assert only["key"] == {"section": "run", "name": "tags"}
            assert (only["op"], only["value"], only["disabled"]) == ("NIN", [TRIALS], False)


def test_the_specification_is_one_that_the_library_reads_back(spec):
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces.internal import View

    view = workspaces.Workspace._from_model(View.model_validate(spec["workspace"]))
    assert [len(section.panels) for section in view.sections] == [4] * 6
    report = Report._from_model(internal.ReportViewspec.model_validate(spec["report"]))
    assert sum(len(getattr(block, "panels", ())) for block in report.blocks) == 24


class Service(BaseHTTPRequestHandler):
    """What of the service's GraphQL is needed to save a dashboard; keeps the variables of each call."""

    calls: list
    refuses = False

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        query, variables = request.get("query", ""), request.get("variables") or {}
        if "viewer" in query:
            data = {"viewer": {"id": "1", "entity": "team", "username": "someone", "flags": "{}"}}
        elif "models(" in query:
            data = {"models": {"pageInfo": {"endCursor": None, "hasNextPage": False}, "edges": []}}
        elif "upsertModel" in query:
            self.calls.append(variables["input"])
            data = {"upsertModel": {"inserted": True, "model": None, "project": None}}
        else:
            assert "upsertView" in query, query
            self.calls.append(variables)
            project = {"id": "2", "name": variables["projectName"], "entityName": variables["entityName"]}
            data = {"upsertView": {"inserted": True, "view": {**variables, "id": "abc", "project": project}}}
        answer = {"errors": [{"message": "permission denied"}]} if self._is_refused(query) else {"data": data}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _is_refused(self, query):
        return self.refuses and "upsertView" in query

    def log_message(self, *_):
        pass


@pytest.fixture
def service():
    """Serves as Weights & Biases: `service.url`, and what was sent in `service.calls`."""
    handler = type("OwnService", (Service,), {"calls": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.handler = handler
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run_script(tmp_path):
    """Runs the script in a process of its own, as a person without a login has it."""

    def run(*arguments, **environment):
        kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        home = str(tmp_path / "home")
        own = {
            "HOME": home,
            "WANDB_CONFIG_DIR": home,
            "NETRC": f"{home}/netrc",
            "WANDB_ERROR_REPORTING": "false",
        }
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "dashboard.py"), *arguments],
            cwd=tmp_path,
            env={**kept, **own, "PYTHONPATH": str(ROOT), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def same_but_ids(one, other):
    """Whether two specifications differ only in the ids that the library draws."""
    drop = ("__id__", "id", "ref")
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            key in drop or same_but_ids(one[key], other[key]) for key in one
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_but_ids, one, other))
    return one == other


def test_what_is_sent_is_what_the_specification_says(service, run_script, spec):
    ended = run_script("--project", "trial", WANDB_API_KEY=SECRET, WANDB_BASE_URL=service.url)
    assert ended.returncode == 0, ended.stderr
    project, report, workspace = service.handler.calls
    assert (project["name"], project["entityName"]) == ("trial", "team"), "made, as there was none"
    for sent, kind, name in ((report, "runs", "report"), (workspace, "project-view", "workspace")):
        assert (sent["type"], sent["projectName"], sent["entityName"]) == (kind, "trial", "team")
        assert same_but_ids(json.loads(sent["spec"]), spec[name]["spec"])
    first, second = ended.stdout.splitlines()
    assert "/team/trial/reports/" in first and "/team/trial?nw=" in second


def test_a_refusal_is_one_line(service, run_script):
    service.handler.refuses = True
    ended = run_script("--entity", "others", WANDB_API_KEY=SECRET, WANDB_BASE_URL=service.url)
    assert ended.returncode == 69 and ended.stdout == ""
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--entity others" in errors[0] and "permission denied" in errors[0]
    assert "--spec FILE" in errors[0] and "Traceback" not in ended.stderr and SECRET not in ended.stderr


@pytest.mark.parametrize("arguments", [[], ["--entity", "team"]])
def test_without_an_account_the_way_out_is_named(arguments, run_script):
    ended = run_script(*arguments)
    assert (ended.returncode, ended.stdout) == (69, "")
    assert ended.stderr.startswith("error: no valid login") and ended.stderr.count("\n") == 1
    assert "wandb login" in ended.stderr and "--spec FILE" in ended.stderr


def test_a_specification_needs_neither_account_nor_net(run_script, tmp_path):
    ended = run_script("--spec", "folder/spec.json", WANDB_BASE_URL="http://127.0.0.1:9")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "folder/spec.json\n", "")
    written = json.loads((tmp_path / "folder" / "spec.json").read_text())
    assert written["workspace"]["project"] == "sophia_train"


def test_the_missing_package_is_named(dashboard, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert dashboard.main(["--spec", "spec.json"]) == 69
    assert "pip install 'sophia_train[dashboard]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--projekt", "x"], 64, "--projekt"),
        (["runs/demo"], 64, "runs/demo"),
        (["--spec", "file/spec.json"], 73, "--spec file/spec.json: Not a directory; choose another file"),
        (["--spec", "."], 73, "--spec . is a folder; choose a file"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, code, reason, dashboard, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert dashboard.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and reason in err
