"""Several runs from one command line, each a process of its own: in turn, side by side, or on a cluster."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from sophia_train.errors import ConfigError, UnavailableError
from sophia_train.processes import Processes, was_interrupted

Commands = Sequence[Sequence[str]]


def sweep(commands: Commands, launcher: str = "basic") -> int:
    """Run each command as the launcher says.

    A job that fails does not keep the others from running; one that is interrupted does.

    Args:
        commands: of the runs.
        launcher: "basic", one after the other; "joblib:n_jobs=4", so many side by side on this machine;
            "submitit:timeout_min=600,slurm_partition=gpu,...", all at once as jobs of Slurm, with the
            parameters of `submitit.AutoExecutor` and of its `update_parameters`.

    Returns:
        The exit code of the first job that failed, or 0.

    Raises:
        ConfigError: there is no such launcher, or it has no such parameter.
        UnavailableError: its package is not installed.
    """
    name, _, text = launcher.partition(":")
    if name not in LAUNCHERS:
        raise ConfigError(f"--launcher={launcher}: there is no such launcher; use {', '.join(LAUNCHERS)}")
    run = LAUNCHERS[name]
    try:
        pairs = (part.split("=", 1) for part in text.split(",") if part)
        parameters = {key: yaml.safe_load(value) for key, value in pairs}
        inspect.signature(run).bind(commands, **parameters)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--launcher={launcher}: {' '.join(str(error).split())}; use {name}:KEY=VALUE,..."
        ) from None
    try:
        return run(commands, **parameters)
    except ImportError as error:
        raise UnavailableError(
            f"--launcher={launcher}: {name} is not installed; run `pip install 'sophia_train[{name}]'`"
        ) from error


def run_in_turn(commands: Commands) -> int:
    """Run each command, one after the other; returns the exit code of the first that failed, or 0."""
    codes = []
    with Processes() as processes:
        for command in commands:
            codes.append(processes.run(command))
            if was_interrupted(codes[-1]):
                break
    return _first_failure(codes)


def run_side_by_side(commands: Commands, n_jobs: int = -1) -> int:
    """Run the commands with joblib, up to `n_jobs` at a time; -1 is as many as there are cores."""
    import joblib

    if type(n_jobs) is not int or n_jobs == 0:
        raise ConfigError(f"--launcher=joblib:n_jobs={n_jobs} is no number of jobs; use joblib:n_jobs=2")
    with Processes() as processes:
        workers = joblib.Parallel(n_jobs=n_jobs, backend="threading", batch_size=1)
        return _first_failure(workers(joblib.delayed(processes.run)(command) for command in commands))


def run_on_cluster(
    commands: Commands, folder: str = ".submitit", cluster: str | None = None, **parameters: Any
) -> int:
    """Run each command as a job of submitit, and wait for all of them.

    Ctrl-C ends the waiting, not the jobs.

    Args:
        commands: of the runs.
        folder: for submitit's files; shared with the machines that do the work.
        cluster: "slurm", "local" (processes of this machine), "debug" (this process); None: what there is.
        parameters: of `submitit.AutoExecutor.update_parameters`.
    """
    import submitit

    try:
        executor = submitit.AutoExecutor(folder, cluster)
        executor.update_parameters(**parameters)
    except (NameError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"--launcher=submitit: {' '.join(str(error).split())}") from error
    with executor.batch():
        jobs = [executor.submit(ClusterJob(command)) for command in commands]
    return _first_failure([job.result() for job in jobs])


class ClusterJob:
    """A command as submitit has it: where its node is taken back, it saves, is queued again, and goes on."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command

    def __call__(self) -> int:
        """Run it; returns its exit code."""
        return run_in_turn([self.command])

    def checkpoint(self) -> Any:
        """Say what is to be queued again: the same, since a run goes on from its folder by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


LAUNCHERS: dict[str, Callable[..., int]] = {
    "basic": run_in_turn,
    "joblib": run_side_by_side,
    "submitit": run_on_cluster,
}


def _first_failure(codes: Sequence[int]) -> int:
    return next((code for code in codes if code), 0)
