"""Two processes are one run: the same numbers, one folder, one voice; and either number can continue it."""

import fnmatch
import json
import os
import signal
import subprocess
import sys

import pytest
from launching import newest_step, run_together
from support import ENVIRONMENT, TINY, contents, records, result

LENGTH = ["max_steps=8", "save_interval=4", "batch_size=8", "eval_interval=4"]


@pytest.fixture
def arguments(token_files):
    return [*TINY, *LENGTH, f"data.path={token_files}"]


@pytest.fixture
def torchrun(arguments):
    """Runs the command line under torchrun on two processes."""

    def run(*overrides):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "sophia_train", *arguments, *overrides]
        options = {"env": {**os.environ, **ENVIRONMENT}, "capture_output": True, "text": True, "timeout": 200}
        return subprocess.run(command, **options)

    return run


@pytest.fixture
def pids(tmp_path_factory):
    """Where `pair` writes the ids of its processes."""
    return tmp_path_factory.mktemp("pids") / "pids"


@pytest.fixture
def pair(runs, arguments, pids):
    """Runs it on two processes as a launcher would, without one: their own exit codes can be seen."""

    def run(*overrides, hooks=((), ())):
        return run_together(runs, 2, *arguments, *overrides, hooks=hooks, pids=pids)

    return run


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The folder of the same run on one process, undisturbed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert tiny(folder, *LENGTH).code == 0
    return folder


def losses(folder):
    pairs = [
        (record["step"], key, record[key]) for record in records(folder) for key in record if "/loss" in key
    ]
    return {(step, key): value for step, key, value in pairs}


def codes(ended):
    return [each.code for each in ended]


def test_under_torchrun_it_is_the_same_run(torchrun, alone, tmp_path):
    done = torchrun(f"run_dir={tmp_path / 'run'}", "processes=2", "tracker=console")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("validation loss") == 1 and done.stderr.count("token files") == 1
    expected, found = losses(alone), losses(tmp_path / "run")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5 if key[0] <= 4 else 1e-4), key
    assert result(tmp_path / "run")["state"] == result(alone)["state"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["processes"] == 2


def test_torchrun_with_another_number_is_refused(torchrun, tmp_path):
    done = torchrun(f"run_dir={tmp_path / 'run'}", "processes=3", "batch_size=12")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "processes=3" in errors[0] and "2 process" in errors[0]
    assert list(tmp_path.iterdir()) == []


def run_as_one_of(processes, program):
    """Run Python's words as a launcher of so many processes would."""
    environment = {**os.environ, **ENVIRONMENT, "WORLD_SIZE": str(processes)}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("processes", "said"), [(1, ["before", "taken apart"]), (2, ["before"])])
def test_one_process_of_several_ends_without_taking_the_interpreter_apart(processes, said):
    """A thread that asks for the interpreter's lock meanwhile would abort it."""
    program = (
        "import atexit, sophia_train.distributed as it; atexit.register(print, 'taken apart');"
        "print('before'); it.end_process(75)"
    )
    done = run_as_one_of(processes, program)
    assert done.returncode == 75 and done.stdout.splitlines() == said


@pytest.mark.parametrize(
    "output",
    ["sys.stdout = open('/dev/full', 'w'); print('more')", "sys.stdout.close()", "sys.stdout = None"],
    ids=["full", "closed", "none"],
)
def test_output_that_cannot_be_written_does_not_change_the_code(output):
    program = f"import sys, sophia_train.distributed as it; {output}; it.end_process(75)"
    done = run_as_one_of(2, program)
    assert (done.returncode, done.stderr) == (75, "")


@pytest.mark.parametrize(("processes", "said"), [(1, ["taken apart"]), (2, [])])
def test_so_does_one_with_a_defect_which_is_shown_as_ever(processes, said):
    program = (
        "import atexit; from sophia_train.launch import launch; atexit.register(print, 'taken apart');"
        "launch(lambda config: 1 / 0)"
    )
    done = run_as_one_of(processes, program)
    assert done.returncode == 1 and done.stdout.splitlines() == said
    assert done.stderr.startswith("Traceback") and done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-2:] == ["ZeroDivisionError: division by zero", "in process 0"]


def test_without_a_launcher_ctrl_c_twice_ends_at_once(tiny, tmp_path):
    ended = tiny(tmp_path, hooks=[["send_signal", 3, "SIGINT"]] * 2)
    assert ended.code == 75 and len(ended.errors) == 1 and "at once" in ended.errors[0]
    assert newest_step(tmp_path) == 2  # of every second step, no save


class TestAnotherNumber:
    @pytest.mark.parametrize("step", [3, 4])
    def test_one_goes_on_with_what_two_began(self, step, pair, tiny, alone, tmp_path):
        assert codes(pair(f"run_dir={tmp_path}", f"stop_at_step={step}")) == [75, 75]
        assert tiny(tmp_path, *LENGTH).code == 0
        assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-4)
        assert result(tmp_path)["state"] == result(alone)["state"]

    def test_two_go_on_with_what_one_began(self, pair, tiny, alone, tmp_path):
        assert tiny(tmp_path, *LENGTH, "stop_at_step=3").code == 75
        assert codes(pair(f"run_dir={tmp_path}")) == [0, 0]
        assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-4)
        assert result(tmp_path)["state"] == result(alone)["state"]


class TestOfTwo:
    def test_interrupted_and_resumed_is_the_same_bitwise(self, pair, tmp_path):
        assert codes(pair(f"run_dir={tmp_path / 'whole'}", "model.dropout=0.1")) == [0, 0]
        for step in (3, 5):
            arguments = [f"run_dir={tmp_path / 'parts'}", "model.dropout=0.1", f"stop_at_step={step}"]
            assert codes(pair(*arguments)) == [75, 75]
        assert codes(pair(*arguments[:2])) == [0, 0]
        assert result(tmp_path / "parts") == result(tmp_path / "whole")

    @pytest.mark.parametrize(("rank", "name"), [(0, "SIGTERM"), (1, "SIGTERM"), (1, "SIGUSR1")])
    def test_a_signal_to_one_stops_both(self, rank, name, pair, tmp_path):
        hooks = [[], []]
        hooks[rank] = [["send_signal", 2, name]]
        ended = pair(f"run_dir={tmp_path}", hooks=hooks)
        assert codes(ended) == [75, 75] and [len(each.errors) for each in ended] == [1, 0]
        assert json.loads((tmp_path / "status.json").read_text())["step"] == 3

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
    def test_under_a_launcher_a_signal_may_come_twice(self, name, pair, tmp_path):
        """From the launcher and from the terminal, or Slurm."""
        ended = pair(f"run_dir={tmp_path}", hooks=[[], [["send_signal", 2, name]] * 2])
        assert codes(ended) == [75, 75] and "saved" in ended[0].err
        assert json.loads((tmp_path / "status.json").read_text())["step"] == 3

    def test_a_gradient_that_is_not_finite_on_one_is_skipped_by_both(self, pair, tmp_path):
        ended = pair(f"run_dir={tmp_path}", hooks=[[], [["spoil_gradient", [2], "nan"]]])
        assert codes(ended) == [0, 0] and ended[0].err.count("skipped") == 1 and ended[1].err == ""
        assert result(tmp_path)["state"]["skipped_steps"] == 1

    @pytest.mark.parametrize("end", ["end", "stop_at_step", "not finite"])
    def test_the_second_does_not_leave_before_the_first(self, end, pair, pids, tmp_path):
        """Else a launcher would take it for a failure, or the end, and end the first before it is done."""
        state = tmp_path / "state"
        hooks = [[["look_at", str(pids), str(state)]], []]
        if end == "not finite":
            hooks = [[*each, ["spoil_gradient", [2, 3], "nan"]] for each in hooks]
        overrides = ["stop_at_step=3"] if end == "stop_at_step" else ["max_skipped_steps=1"]
        ended = pair(f"run_dir={tmp_path / 'run'}", *overrides, hooks=hooks)
        assert codes(ended) == [{"end": 0, "stop_at_step": 75, "not finite": 65}[end]] * 2
        assert state.read_text() in "RSD", "the second process has left"

    def test_the_second_waits_for_the_trace_of_the_first_which_speaks(self, pair, pids, tmp_path):
        run, state = tmp_path / "run", tmp_path / "state"
        hooks = [[["ask_nobody"], ["look_at", str(pids), str(state)]], [["ask_nobody"]]]
        overrides = ["max_steps=20", "stop_at_step=11", "profile=true"]
        ended = pair(f"run_dir={run}", *overrides, hooks=hooks)
        assert codes(ended) == [75, 75] and [len(each.errors) for each in ended] == [1, 0]
        assert state.read_text() in "RSD", "the second process has left"
        assert [path.name for path in (run / "profile").glob("*.gz")] == ["steps_00000010-00000011.json.gz"]
        assert json.loads((run / "status.json").read_text())["step"] == 11

    def test_the_second_is_silent(self, pair, tmp_path):
        first, second = pair(f"run_dir={tmp_path}", "tracker=console", "sample_interval=3", "sample_tokens=9")
        assert "validation loss" in first.out and (second.out, second.err) == ("", "")

    def test_finished_is_finished(self, pair, tmp_path):
        assert codes(pair(f"run_dir={tmp_path}")) == [0, 0]
        before = contents(tmp_path / "checkpoints")
        again = pair(f"run_dir={tmp_path}")
        assert codes(again) == [0, 0] and "finished" in again[0].err and again[1].err == ""
        assert contents(tmp_path / "checkpoints") == before

    @pytest.mark.parametrize(
        ("rank", "hook", "code", "last_line"),
        [
            (1, ["run_out_of_memory", 5], 64, "error: process 1: micro_batch_size=2 is too much *; use *"),
            (1, ["fail", 5, "disk"], 74, "error: process 1: Input/output error (train.bin); *"),
            (0, ["fail", 5, "disk"], 74, "error: Input/output error (train.bin); *"),
            (1, ["fail", 5, "defect"], 70, "in process 1"),
        ],
        ids=["memory", "disk", "disk of the first", "defect"],
    )
    def test_what_fails_on_one_alone_is_said_there(self, rank, hook, code, last_line, pair, tmp_path):
        hooks = [[], []]
        hooks[rank] = [hook]
        ended = pair(f"run_dir={tmp_path}", hooks=hooks)
        failed, other = ended[rank], ended[1 - rank]
        assert other.code > 0 and other.err.count("\n") == (rank == 1), "more than the first one's greeting"
        assert fnmatch.fnmatch(failed.err.splitlines()[-1], last_line)
        assert failed.code == (1 if code == 70 else code)  # python's own code, after a traceback
        assert failed.err.count("Traceback (most") == (code == 70)
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["code"], status["step"]) == (code, 5)
        assert newest_step(tmp_path) == 4

    @pytest.mark.parametrize("delay", [0.0, 0.5])
    def test_a_defect_of_both_is_shown_once(self, delay, pair, tmp_path):
        ended = pair(f"run_dir={tmp_path}", hooks=[[["fail", 5, "defect", delay]], [["fail", 5, "defect"]]])
        assert [each.err.count("Traceback (most") for each in ended] == [1, 0]
        assert all(each.code != 0 for each in ended) and ended[1].err == ""
        assert json.loads((tmp_path / "status.json").read_text())["reason"] == "ZeroDivisionError: by zero"

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_full_disk_of_one_ends_both(self, rank, pair, tmp_path):
        hooks = [[], []]
        hooks[rank] = [["fill_disk", "optimizer"]]
        ended = pair(f"run_dir={tmp_path}", hooks=hooks)
        assert codes(ended) == [74, 74] and [len(each.errors) for each in ended] == [1, 0]
        assert "No space left on device" in ended[0].err and ended[1].err == ""
        assert json.loads((tmp_path / "status.json").read_text())["code"] == 74

    @pytest.mark.parametrize("rank", [0, 1])
    def test_one_that_is_killed_is_missed_by_the_other(self, rank, pair, tmp_path):
        hooks = [[], []]
        hooks[rank] = [["send_signal", 5, "SIGKILL"]]
        ended = pair(f"run_dir={tmp_path / 'run'}", hooks=hooks)
        killed, other = ended[rank], ended[1 - rank]
        assert killed.code == -signal.SIGKILL and other.code == 69
        assert len(other.errors) == 1 and "another process of the run is gone" in other.errors[0]
        assert "Traceback" not in other.err
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert (status["code"], status["step"]) == (69, 5)
        assert codes(pair(f"run_dir={tmp_path / 'run'}")) == [0, 0]
        assert codes(pair(f"run_dir={tmp_path / 'whole'}")) == [0, 0]
        assert result(tmp_path / "run") == result(tmp_path / "whole")

    @pytest.mark.parametrize(
        ("overrides", "code", "fragments"),
        [
            (["processes=3", "batch_size=12"], 64, ["processes=3", "2 process"]),
            (["batch_size=9", "micro_batch_size=1"], 64, ["batch_size=9", "processes", "8 or 10"]),
            (["batch_size=10"], 64, ["batch_size=10", "processes x micro_batch_size", "8 or 12"]),
            (["hessian.batch_size=3"], 64, ["hessian.batch_size=3", "2 processes"]),
            (["hessian.groups=3"], 64, ["hessian.groups=3", "2 processes"]),
            (["data.path=/no/such/folder"], 66, ["data.path=/no/such/folder"]),
            (["batch_size=1000"], 65, ["batch_size=1000"]),
            (["resume=must"], 66, ["resume=must"]),
            (["init_from=/no/such/folder"], 66, ["/no/such/folder"]),
        ],
        ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
    )
    def test_bad_input_is_said_once_and_nobody_is_left_waiting(
        self, overrides, code, fragments, pair, tmp_path
    ):
        ended = pair(f"run_dir={tmp_path / 'run'}", *overrides)
        assert ended[0].code == code and ended[1].code not in (0, -signal.SIGALRM), ended
        assert [len(each.errors) for each in ended] == [1, 0] and ended[1].err == "", ended
        for fragment in fragments:
            assert fragment in ended[0].errors[0]
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("hook", "code"),
    [(["fail", 5, "disk"], 74), (["send_signal", 5, "SIGKILL"], 69)],
    ids=["fails", "is killed"],
)
def test_if_one_of_four_ends_so_do_all_and_one_says_why(hook, code, runs, arguments, tmp_path):
    hooks = [[], [], [hook], []]
    ended = run_together(runs, 4, *arguments, "micro_batch_size=1", f"run_dir={tmp_path}", hooks=hooks)
    assert all(each.code not in (0, -signal.SIGALRM) for each in ended)
    errors = [line for each in ended for line in each.errors]
    assert len(errors) == 1 and not any("Traceback" in each.err for each in ended)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["code"] == code and status["reason"] in errors[0]
