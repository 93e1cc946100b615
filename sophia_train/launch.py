"""From a command line to runs: checked settings, one run or a sweep, one line for an error, an exit code."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from omegaconf import OmegaConf

from sophia_train import command_line
from sophia_train.config import CONFIGS, RunConfig, compose, expand, run_config
from sophia_train.distributed import end_process, failure, is_one_of_several
from sophia_train.errors import ConfigError, exit_code_of
from sophia_train.processes import train_command
from sophia_train.sweep import sweep

Task = Callable[[RunConfig], int | None]


def launch(task: Task) -> NoReturn:
    """Do what the command line asks for, and exit with its code (sysexits, as in `errors`).

    Args:
        task: trains one run; returns its exit code, None being 0.
    """
    try:
        code = run(sys.argv[1:], task)
    except Exception:  # a defect
        if not is_one_of_several():
            raise
        sys.excepthook(*sys.exc_info())  # what Python would do, and its code
        code = 1
    end_process(code)


def run(arguments: Sequence[str], task: Task) -> int:
    """Do what the arguments ask for and return the exit code; an error is one line on stderr."""
    return exit_code_of(lambda: _run(arguments, task), speaks=lambda error: failure(error).told_here)


def _run(arguments: Sequence[str], task: Task) -> int:
    options = command_line.parse(arguments)
    if options.help:
        sys.stdout.write(command_line.help_text(CONFIGS))
        return 0
    if options.multirun:
        if is_one_of_several():
            raise ConfigError(
                f"-m with WORLD_SIZE={os.environ['WORLD_SIZE']}: a sweep starts its runs one by one; "
                "leave -m out, or start it without a launcher"
            )
        jobs = expand(options.overrides, options.config_dir)
        return sweep([train_command(job, options.config_dir) for job in jobs], options.launcher)
    # Hydra composes and does not start the run: what was checked is what runs, and only the run writes.
    config = compose(options.overrides, options.config_dir)
    if options.cfg:
        sys.stdout.write(OmegaConf.to_yaml(config, resolve=options.resolve))
        return 0
    return task(run_config(config)) or 0
