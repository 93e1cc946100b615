"""The folder of a run: who owns it, which settings it belongs to, and how its last invocation ended.

runs/<name>/
    config.json       resolved settings
    environment.json  versions, commit, device
    status.json       exit code, reason and step of the last invocation; losses that the run was to beat
    metrics.jsonl     every metric, one record a line
    checkpoints/      see `checkpoint`
    card.md           what the run was, what came out and what it cost, on one page
    profile/          traces of a few steps, if `profile=true` asked for them
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import sophia_train
from sophia_train import checkpoint, durable
from sophia_train.errors import ConfigError, DataError, MissingInputError, OutputError
from sophia_train.state import may_change


class RunFolder:
    """One run's folder.

    Args:
        path: where it is, or is to be.
        config: the run's resolved settings, as JSON.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self.config = config

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Own the folder during the body; it is made if need be. Only one process of a run does this.

        Raises:
            OutputError: it cannot be written, or another process owns it.
        """
        lock_path = self.path / ".lock"
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        is_new = not lock_path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(lock_path)
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"run_dir={self.path} is in use by another process; choose another name="
            ) from None
        except OSError as error:
            raise OutputError(
                f"run_dir={self.path} cannot be written ({error.strerror}); choose another run_dir="
            ) from None
        try:
            yield
        finally:
            if is_new and not (self.path / "config.json").exists():  # nothing came of it: leave nothing
                with suppress(OSError):
                    lock_path.unlink()
                    for folder in made:
                        folder.rmdir()
            lock.release()

    def starting_point(self, resume: str) -> Path | None:
        """Find the checkpoint to start from, and check that this run is its continuation.

        Args:
            resume: "auto" continues what is there, "must" insists on it, "never" insists on nothing being
                there; anything else is the path of a checkpoint or of another run to go on from, and where
                that has been done, continues what is there: the path may be gone.

        Returns:
            A checkpoint's folder, or None for a new run.

        Raises:
            ConfigError: what is there belongs to other settings, or `resume` forbids it.
            MissingInputError: there is nothing to resume from.
        """
        newest = checkpoint.latest(self.path / "checkpoints")
        if resume == "never" and newest is not None:
            raise ConfigError(f"resume=never, but {self.path} holds a run already; choose another name=")
        if resume == "must" and newest is None:
            raise MissingInputError(f"resume=must, but {self.path} holds no checkpoint; use resume=auto")
        if resume not in ("auto", "never", "must") and not _was_started_with(resume, newest):
            asked = checkpoint.find(Path(resume))
            if newest is not None and asked.resolve() != newest.resolve():
                raise ConfigError(
                    f"resume={resume}, but {self.path} has checkpoints of its own, up to {newest.name}; "
                    "choose another name=, or use resume=auto to go on from there"
                )
            newest = asked
        saved = self._saved_config() if newest is None else checkpoint.read_manifest(newest)["config"]
        if saved is not None:
            self._check_same(saved, self.path if newest is None else newest)
        return newest

    def write_start(self, device: torch.device, processes: int) -> None:
        """Write the settings and the environment."""
        durable.write_json(self.path / "config.json", self.config)
        durable.write_json(self.path / "environment.json", environment(device, processes))

    def write_status(
        self, code: int, reason: str, step: int, baselines: Mapping[str, float] | None = None
    ) -> None:
        """Write how this invocation ended; launchers change exit codes, this file does not.

        Args:
            code: the exit code.
            reason: for it, in words.
            step: completed steps.
            baselines: losses in nats a token of what the model is to beat, such as the bigram model's.
        """
        status: dict[str, Any] = {"code": code, "reason": reason, "step": step}
        if baselines is not None:
            status["baselines"] = baselines
        durable.write_json(self.path / "status.json", status)

    def _saved_config(self) -> dict[str, Any] | None:
        path = self.path / "config.json"
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except ValueError:
            raise DataError(f"{path} is damaged; remove {self.path} or choose another name=") from None

    def _check_same(self, saved: Mapping[str, Any], where: Path) -> None:
        before, now = _leaves(saved), _leaves(self.config)
        for key in sorted(before.keys() | now.keys()):
            if may_change(key):
                continue
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"{key}={now.get(key)}, but {where} was made with {key}={before.get(key)}; "
                    "choose another name= for a new run, or set it back to go on"
                )


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Describe what a run runs on: versions, commit, device; nothing from environment variables."""
    return {
        "sophia_train": sophia_train.__version__,
        "commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cpus": os.cpu_count(),
        "processes": processes,
        "command": ["python", "-m", "sophia_train", *sys.argv[1:]],
    }


def _git_commit() -> str | None:
    """The commit of this program, if git tracks it; the repository that it is installed into is another's."""
    file = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=40")
    except (OSError, subprocess.CalledProcessError):
        return None


def _was_started_with(resume: str, newest: Path | None) -> bool:
    """Whether a run's newest checkpoint, if there is one, was made by a command with the same `resume`."""
    return newest is not None and checkpoint.read_manifest(newest)["config"].get("resume") == resume


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys; tuples and lists are alike, as JSON has them."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return leaves
