"""A queue of runs, worked off in as many invocations as it takes.

A file in YAML says which runs there are, in the words of `python -m sophia_train -m`:

    common: data=token_files data.path=books model=gpt2_30m max_steps=4000
    runs:
      adamw: optimizer=adamw optimizer.lr=3e-3 seed=1,2,3
      sophia: optimizer=sophia_g seed=1,2,3 hessian=gnb,gnb_paper

Values that are separated by commas make a run of each combination. The folder `DIR/NAME` of a run says how it
stands; `DIR/results.jsonl` has a row for each that has ended.
"""

import json
import math
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sophia_train import durable
from sophia_train.config import RunConfig, combinations, compose, run_config, to_json
from sophia_train.errors import ConfigError, DataError, Interrupted, MissingInputError
from sophia_train.models.gpt2 import GPT2Config
from sophia_train.processes import Process, Processes, exit_code, failure, quoted, start_run, was_interrupted
from sophia_train.run_folder import RunFolder
from sophia_train.run_results import (
    RunResult,
    discard_weights,
    planned_tokens,
    read_result,
    settings_digest,
)

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class QueuedRun:
    """One run of a queue.

    Attributes:
        folder: its `run_dir`, named as the run.
        overrides: all of its settings, name and folder included.
        config: what they come to.
        digest: of the settings, as a row of the results has it.
    """

    folder: Path
    overrides: Sequence[str]
    config: RunConfig
    digest: str

    @property
    def length(self) -> tuple[GPT2Config, int]:
        """Model and target tokens: runs alike in these take about as long."""
        return self.config.model, planned_tokens(self.config)

    @property
    def sample(self) -> tuple[Any, ...]:
        """Settings and seed, as a comparison has them: runs alike in these are one sample and not two."""
        config = self.config
        return self.digest, config.seed, config.data.get("path"), config.init_from, config.eval_interval


def read_queue(path: Path, out: Path, extra: Sequence[str] = ()) -> list[QueuedRun]:
    """Read a queue, and check every run of it.

    Args:
        path: the file.
        out: the folder of the runs' folders.
        extra: overrides for all runs, which count more than those in the file.

    Raises:
        MissingInputError: there is no such file.
        ConfigError: it is not a queue, a run's settings are wrong or those of another one, or its folder
            belongs to other ones.
    """
    runs: list[QueuedRun] = []
    common, entries = _read_file(path)
    for name, words in entries.items():
        first = len(runs)
        try:
            for run in _runs(name, [*common, *words, *extra], out):
                if twin := next((other for other in runs if other.sample == run.sample), None):
                    raise ConfigError(
                        f"{twin.folder.name} and {run.folder.name} have the same settings and "
                        f"seed={run.config.seed}; leave one of them out"
                    )
                runs.append(run)
        except ConfigError as error:
            raise ConfigError(f"{path}: {name}: {error}") from error
        if doubles := {run.folder.name for run in runs[first:]} & {run.folder.name for run in runs[:first]}:
            raise ConfigError(f"{path}: {name}: {min(doubles)} is there already; choose another name")
    return runs


class RunQueue:
    """The runs of a queue, and which of them are done.

    Args:
        runs: in the order in which they are to run.
        out: the folder that has their folders and `results.jsonl`.
        parallel: how many run beside each other.
        deadline: by the monotonic clock, in seconds; then the runs in progress are asked to save and stop. A
            run is begun only if those of its length so far would have ended before.
        keep_weights: whether the weights of a finished run stay; its metrics always do.

    Raises:
        DataError: `results.jsonl` is damaged.
    """

    def __init__(
        self,
        runs: Sequence[QueuedRun],
        out: Path,
        *,
        parallel: int = 1,
        deadline: float = math.inf,
        keep_weights: bool = True,
    ) -> None:
        self.runs = runs
        self.parallel = parallel
        self.deadline = deadline
        self.keep_weights = keep_weights
        self._path = out / RESULTS
        self._rows = _read_rows(self._path)

    def run(self) -> None:
        """Run what is left of the queue.

        Raises:
            Interrupted: something is left, as there was no time or a signal came.
            RunError: a run failed, other than by diverging; with its error and exit code.
        """
        waiting = [run for run in self.runs if not self._ended(run)]
        active: dict[Process, tuple[QueuedRun, float]] = {}
        with Processes() as processes:
            while True:
                while len(active) < self.parallel and not processes.told_to_stop:
                    left = self.deadline - time.monotonic()
                    run = next((run for run in waiting if self._estimate(run) < left), None)
                    if run is None:
                        break
                    waiting.remove(run)
                    active[start_run(processes, run.overrides, run.folder)] = run, time.monotonic()
                if not active:
                    break
                if time.monotonic() > self.deadline:
                    for process in active:
                        processes.stop(process)
                for process in processes.ended():
                    run, began = active.pop(process)
                    code = exit_code(process)
                    if not self._ended(run, time.monotonic() - began) and not was_interrupted(code):
                        raise failure(run.folder, code)
        if undone := [run for run in self.runs if not self._row(run)]:
            raise Interrupted(
                f"{len(undone)} of {len(self.runs)} runs are left, the next is {undone[0].folder}; "
                "run it again to go on"
            )

    def standings(self) -> Iterator[dict[str, Any]]:
        """How each run stands, in the order of the queue: its row, or what it has come to so far."""
        for run in self.runs:
            state, result = "waiting", read_result(run.folder)
            if result.tokens:
                state = "interrupted"
            yield self._row(run) or _new_row(run, state, result)

    def _ended(self, run: QueuedRun, wall_seconds: float = 0.0) -> bool:
        """Whether a run has come to its end, be it that it diverged; then it has a row."""
        if not self._row(run):
            result = read_result(run.folder)
            if not (result.finished or result.diverged):
                return False
            row = _new_row(run, "finished" if result.finished else "diverged", result)
            environment = json.loads((run.folder / "environment.json").read_text())
            row["wall_seconds"] = max(result.seconds, wall_seconds)
            row["parallel"] = self.parallel
            row |= {key: environment[key] for key in ("commit", "device")}
            self._rows.append(row)
            durable.write_text(self._path, "".join(json.dumps(row) + "\n" for row in self._rows))
        if not self.keep_weights:
            discard_weights(run.folder)
        return True

    def _row(self, run: QueuedRun) -> dict[str, Any] | None:
        mine = {"name": run.folder.name, "config": run.digest, "seed": run.config.seed}
        return next((row for row in self._rows if mine.items() <= row.items()), None)

    def _estimate(self, run: QueuedRun) -> float:
        """Seconds that a run will take, as the slowest of its length did; 0 if there was none."""
        alike = (row for other in self.runs if other.length == run.length and (row := self._row(other)))
        slowest = max((row["wall_seconds"] for row in alike if row["state"] == "finished"), default=0.0)
        return float(slowest * (1 - read_result(run.folder).tokens / planned_tokens(run.config)))


def _runs(name: str, sweep: Sequence[str], out: Path) -> Iterator[QueuedRun]:
    """Compose the runs of one entry, each once."""
    for suffix, overrides in combinations(sweep):
        own_name = f"{name}-{suffix}" if suffix else name
        overrides += [quoted("name", own_name), quoted("run_dir", out / "${name}")]
        config = run_config(compose(overrides))
        folder = Path(config.run_dir)
        RunFolder(folder, to_json(config)).starting_point("auto")
        yield QueuedRun(folder, overrides, config, settings_digest(config))


def _new_row(run: QueuedRun, state: str, result: RunResult) -> dict[str, Any]:
    return {
        "name": run.folder.name,
        "state": state,
        "val_loss": result.validation_loss if math.isfinite(result.validation_loss) else None,
        "seed": run.config.seed,
        "config": run.digest,
        "tokens": result.tokens,
        "flops": result.flops,
        "seconds": result.seconds,
    }


def _read_file(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Read the overrides of all runs, and those of each, by name."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise MissingInputError(f"{path} is not there; give the file of a queue") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}; mend the YAML") from None
    if not isinstance(content, dict) or not isinstance(content.get("runs"), dict) or not content["runs"]:
        raise ConfigError(f"{path} has no runs; write runs: and below it NAME: OVERRIDES, one a line")
    if unknown := sorted(map(str, content.keys() - {"common", "runs"})):
        raise ConfigError(f"{path}: {unknown[0]}: there is no such key; use common and runs")
    entries = {}
    for name, text in content["runs"].items():
        if not re.fullmatch(r"\w[\w.=-]*", str(name)):
            raise ConfigError(f"{path}: {name} is no name for a folder; use letters, digits, _ . = -")
        entries[str(name)] = _words(path, str(name), text)
    return _words(path, "common", content.get("common")), entries


def _words(path: Path, name: str, text: Any) -> list[str]:
    if not isinstance(text, str | None):
        raise ConfigError(f"{path}: {name}: {text} is not text; write KEY=VALUE KEY=VALUE")
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise ConfigError(f"{path}: {name}: {error}; mend the quotes") from None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise DataError(f"{path}, line {number}: not a row of results; remove that line") from None
    return rows
