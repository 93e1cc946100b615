"""Sweeps: each job a process of its own, started by a launcher; and the files for W&B's agent."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import submitit
import yaml
from support import ROOT, TINY

from sophia_train import launch, sweep
from sophia_train.config import compose
from sophia_train.errors import ConfigError
from sophia_train.processes import quoted


def python(program, *arguments):
    return [sys.executable, "-c", program, *map(str, arguments)]


@pytest.fixture
def meeting(tmp_path):
    """Two commands of which neither ends before the other one has begun."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    return [python("import sys; open(sys.argv[1], sys.argv[2]).close()", fifo, mode) for mode in "rw"]


class TestJoblib:
    def test_jobs_run_side_by_side(self, meeting):
        assert sweep.sweep(meeting, "joblib:n_jobs=2") == 0

    def test_every_job_runs_and_the_first_failure_is_the_code(self, tmp_path):
        program = "import sys; open(sys.argv[1], 'w'); sys.exit(int(sys.argv[2]))"
        commands = [python(program, tmp_path / str(code), code) for code in (0, 65, 74)]
        assert sweep.sweep(commands, "joblib:n_jobs=2") == 65
        assert {path.name for path in tmp_path.iterdir()} == {"0", "65", "74"}

    def test_a_signal_reaches_all_jobs_and_none_begins_after_it(self, tmp_path):
        job = (
            "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));"
            "print('ready', flush=True); signal.pause()"
        )
        program = (
            "import sys; from sophia_train.sweep import sweep;"
            f"sys.exit(sweep([[sys.executable, '-c', {job!r}]] * 3, 'joblib:n_jobs=2'))"
        )
        command = python(program)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == ""
            assert process.wait() == 75


class TestSubmitit:
    @pytest.fixture(autouse=True)
    def importable(self, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def test_every_job_runs_and_the_first_failure_is_the_code(self, tmp_path):
        program = "import sys; open(sys.argv[1], 'w'); sys.exit(int(sys.argv[2]))"
        commands = [python(program, tmp_path / str(code), code) for code in (0, 65)]
        launcher = f"submitit:cluster=local,folder={tmp_path / 'jobs'},timeout_min=5"
        assert sweep.sweep(commands, launcher) == 65
        assert {path.name for path in tmp_path.iterdir()} == {"0", "65", "jobs"}

    def test_a_job_whose_node_is_taken_back_saves_and_goes_on(self, tmp_path):
        ready, saved = tmp_path / "ready", tmp_path / "saved"
        os.mkfifo(ready)
        program = (
            "import os, pathlib, signal, sys; ready, saved = map(pathlib.Path, sys.argv[1:]);\n"
            "if saved.exists(): sys.exit(0)\n"
            "signal.signal(signal.SIGTERM, lambda *_: (saved.touch(), sys.exit(75)))\n"
            "ready.write_text(str(os.getppid())); signal.pause()"
        )
        executor = submitit.AutoExecutor(tmp_path / "jobs", "local")
        executor.update_parameters(timeout_min=5)
        job = executor.submit(sweep.ClusterJob(python(program, ready, saved)))
        os.kill(int(ready.read_text()), signal.SIGUSR2)  # as Slurm does before it takes the node back
        assert job.result() == 0
        assert saved.exists()


class TestBadLauncher:
    @pytest.mark.parametrize(
        ("launcher", "fragments"),
        [
            ("jobli", ["--launcher=jobli", "basic, joblib, submitit"]),
            ("joblib:n_job=2", ["--launcher=joblib:n_job=2", "n_job"]),
            ("joblib:n_jobs", ["--launcher=joblib:n_jobs", "KEY=VALUE"]),
            ("joblib:n_jobs=0", ["n_jobs=0"]),
            ("joblib:n_jobs=two", ["n_jobs=two"]),
            ("basic:n_jobs=2", ["--launcher=basic:n_jobs=2", "n_jobs"]),
            ("submitit:cluster=cloud", ["submitit", "cloud"]),
            ("submitit:cluster=local,folder=FOLDER,timeout_mins=3", ["submitit", "timeout_mins"]),
        ],
    )
    def test_is_one_line_before_anything_starts(self, launcher, fragments, tmp_path):
        started = tmp_path / "started"
        launcher = launcher.replace("FOLDER", str(tmp_path / "jobs"))
        with pytest.raises(ConfigError) as caught:
            sweep.sweep([["touch", str(started)]], launcher)
        assert "\n" not in str(caught.value) and not started.exists()
        for fragment in fragments:
            assert fragment in str(caught.value)

    def test_it_needs_a_sweep(self, capfd):
        assert launch.run(["--launcher", "joblib", "seed=1"], never) == 64
        assert "-m" in capfd.readouterr().err

    def test_the_command_line_passes_it_on(self, capfd):
        assert launch.run(["-m", "--launcher", "jobli", "dry_run=true", "seed=1,2"], never) == 64
        assert "--launcher=jobli" in capfd.readouterr().err


def never(config):
    raise AssertionError("a run was started")


@pytest.mark.slow
def test_a_real_sweep_side_by_side(token_files, tmp_path):
    words = [*TINY, f"data.path={token_files}", "seed=1,2", quoted("run_dir", tmp_path / "run")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, "-m", "sophia_train", "-m", "--launcher", "joblib:n_jobs=2", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-seed=1", "run-seed=2"]


class TestWandbFiles:
    @pytest.fixture(params=sorted((ROOT / "sweeps").glob("wandb_*.yaml")), ids=lambda path: path.stem)
    def file(self, request):
        return yaml.safe_load(request.param.read_text())

    def test_every_run_of_the_agent_is_one_of_ours(self, file, monkeypatch):
        """The command is filled in by W&B's own code, once for each end and each value of a parameter."""
        monkeypatch.setenv("WANDB_RUN_ID", "abc123")
        monkeypatch.setenv("WANDB_MODE", "offline")
        for key, parameter in file["parameters"].items():
            for value in parameter.get("values") or [parameter["min"], parameter["max"]]:
                words = agent_command(file, key, value)
                assert words[:4] == ["/usr/bin/env", "python", "-m", "sophia_train"]
                config = compose([*words[4:], "tracker.wandb.mode=offline"])
                assert config.run_dir.endswith("abc123") and config.tracker.wandb
                assert f"{key}={value}" in words

    def test_it_minimizes_what_a_run_logs(self, file):
        assert file["metric"] == {"name": "val/loss", "goal": "minimize"}
        assert shutil.which("env") and file["command"][-1] == "${args_no_hyphens}"


def agent_command(file, key, value):
    """The command of one run as `wandb agent` makes it, all parameters but one at their first value."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    args = {
        name: {"value": parameter["values"][0] if "values" in parameter else parameter["min"]}
        for name, parameter in file["parameters"].items()
    }
    filled = create_sweep_command_args({"args": {**args, key: {"value": value}}})
    filled |= {"interpreter": ["python"], "env": ["/usr/bin/env"], "program": [file["program"]]}
    words = []
    for chunk in create_sweep_command(list(file["command"])):
        words += filled[chunk[2:-1]] if chunk.startswith("${") and chunk.endswith("}") else [chunk]
    return words
