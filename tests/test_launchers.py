"""A signal to a launcher, or the death of a process, leaves a checkpoint to go on from, and nobody behind."""

import json
import os
import random
import signal
import time

import pytest
from launching import ACCELERATE, PYTHON, TORCHRUN, Launched, count_records, newest_step, run_together
from support import TINY, result

LENGTH = "max_steps=200 batch_size=8 micro_batch_size=2 save_interval=20 eval_interval=100".split()
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def arguments(token_files):
    return [*TINY, *LENGTH, f"data.path={token_files}"]


@pytest.fixture(scope="module")
def undisturbed(runs, arguments, tmp_path_factory):
    """The result of the same run on so many processes that nothing happened to."""
    results = {}

    def undisturbed(processes):
        if processes not in results:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            assert finish(runs, processes, arguments, folder) == [0] * processes
            results[processes] = result(folder)
        return results[processes]

    return undisturbed


@pytest.fixture
def launch(arguments, tmp_path):
    """Starts the run in `tmp_path / "run"` under a launcher; what is left of it does not survive the test."""
    started = []

    def launch(launcher):
        command = [*launcher, "sophia_train", *arguments, f"run_dir={tmp_path / 'run'}"]
        started.append(Launched(command, tmp_path / f"output_{len(started)}"))
        return started[-1]

    yield launch
    for each in started:
        each.kill()


def finish(runs, processes, arguments, folder):
    if processes == 1:
        return [runs(*arguments, f"run_dir={folder}").code]
    return [each.code for each in run_together(runs, processes, *arguments, f"run_dir={folder}")]


@pytest.mark.parametrize(
    ("launcher", "processes", "name"),
    [
        pytest.param(PYTHON, 1, "SIGTERM", marks=SLOW, id="python, SIGTERM"),
        pytest.param(TORCHRUN, 2, "SIGTERM", id="torchrun, SIGTERM"),
        pytest.param(TORCHRUN, 2, "Ctrl-C", marks=SLOW, id="torchrun, Ctrl-C"),
        pytest.param([*ACCELERATE, "1", "--cpu", "-m"], 1, "SIGTERM", marks=SLOW, id="accelerate, SIGTERM"),
        pytest.param([*ACCELERATE, "1", "--cpu", "-m"], 1, "SIGKILL", marks=SLOW, id="accelerate, SIGKILL"),
        pytest.param(
            [*ACCELERATE, "2", "--multi_gpu", "-m"], 2, "SIGKILL", marks=SLOW, id="accelerate of 2, SIGKILL"
        ),
    ],
)
def test_a_signal_to_the_launcher_ends_and_saves_the_run(
    launcher, processes, name, launch, runs, arguments, undisturbed, tmp_path
):
    folder = tmp_path / "run"
    launched = launch(launcher)
    launched.wait_until(lambda: count_records(folder) > 10)
    if name == "Ctrl-C":  # a terminal sends it to all
        for pid in launched.alive():
            os.kill(pid, signal.SIGINT)
    else:
        launched.process.send_signal(signal.Signals[name])
    code = launched.wait_for_nobody()
    assert code == 75 if launcher == PYTHON else code != 0
    status = json.loads((folder / "status.json").read_text())
    assert status["code"] == 75 and 10 <= status["step"] < 200
    assert newest_step(folder) == status["step"] == count_records(folder) - 1  # no step was made in vain
    assert len(launched.errors) == 1 and "saved; run it again" in launched.errors[0]
    assert finish(runs, processes, arguments, folder) == [0] * processes
    assert result(folder) == undisturbed(processes)


@pytest.mark.parametrize("moments", [1, pytest.param(10, marks=SLOW)])
def test_one_process_is_killed(moments, launch, runs, arguments, undisturbed, tmp_path):
    generator = random.Random(0)
    folder = tmp_path / "run"
    steps = []
    for number in range(moments):
        kill_at_random(launch(TORCHRUN), folder, generator, starting=number % 4 == 3)
        steps.append(newest_step(folder))
    assert steps == sorted(steps) and steps[-1] < 200
    assert finish(runs, 2, arguments, folder) == [0, 0]
    assert result(folder) == undisturbed(2)


def kill_at_random(launched, folder, generator, starting):
    """Kill one process, as the run starts or at some later step; the others end, and say it once."""
    if starting:
        launched.wait_until(lambda: {"0", "1"} <= set(launched.alive().values()))
        time.sleep(generator.uniform(0, 3))
    else:
        records = count_records(folder) + generator.randrange(1, 20)
        launched.wait_until(lambda: count_records(folder) >= records)
        time.sleep(generator.uniform(0, 0.05))
    rank = generator.choice("01")
    os.kill(next(pid for pid, of in launched.alive().items() if of == rank), signal.SIGKILL)
    assert launched.wait_for_nobody() != 0
    assert len(launched.errors) == 1 or (starting and launched.errors == [])
