"""Weights & Biases."""

import dataclasses
import html
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from sophia_train import durable
from sophia_train.errors import ConfigError, UnavailableError
from sophia_train.trackers.base import AXES, Record, RunInfo, Tracker
from sophia_train.trackers.jsonl import FILE_NAME, read_metrics
from sophia_train.trackers.labels import group_name, labels
from sophia_train.trackers.summary import summarize

Mode = Literal["online", "offline", "disabled"]

LONGEST_TAG = 64
"""Characters that the service allows in a tag."""


class WandbTracker(Tracker):
    """Logs to Weights & Biases; a resumed run continues its own curve there.

    Every metric can be plotted against step, tokens, seconds and flops. Settings come as the run's config,
    with `labels` added, which are tags, too, such as `optimizer:Sophia GNB` and `data:openwebtext`. At the
    end its summary gets the figures of `Summary`. Files go to `wandb/` in the run folder; the code, the
    environment, git remotes (which may hold tokens) and the console are not sent.

    Args:
        project: the project's name.
        entity: user or team; None for the default of the login.
        mode: "online", "offline" (send later with `wandb sync`), or "disabled".
        group: name that gathers several runs; None for one of those that differ in the seed alone.
        tags: more of them.
        init_timeout: seconds to wait for the service at the start; training does not wait.
        finish_timeout: seconds to wait for uploads at the end; `wandb sync` can send the rest.

    Raises:
        ConfigError: `mode` is none of the three.
        UnavailableError: the wandb package is not installed, or online and nobody is logged in.
    """

    def __init__(
        self,
        project: str = "sophia_train",
        entity: str | None = None,
        mode: Mode = "online",
        group: str | None = None,
        tags: Sequence[str] = (),
        init_timeout: float = 30.0,
        finish_timeout: float = 8.0,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UnavailableError(
                "tracker=wandb: the wandb package is not installed; "
                "run `pip install 'sophia_train[wandb]'` or use tracker=console"
            ) from error
        if mode not in get_args(Mode):
            raise ConfigError(f"tracker=wandb: mode={mode} is unknown; use {', '.join(get_args(Mode))}")
        if mode == "online" and not _logged_in(wandb):
            raise UnavailableError(
                "tracker=wandb: no valid login; run `wandb login`, set WANDB_API_KEY, or use mode=offline"
            )
        self._wandb = wandb
        self._project = project
        self._entity = entity
        self._mode = mode
        self._group = group
        self._tags = tuple(tags)
        self._init_timeout = init_timeout
        self._finish_timeout = finish_timeout

    def start(self, run: RunInfo) -> None:
        """Open the run under the id in `wandb_id` of the run folder, which a new run draws."""
        self._metrics = run.run_dir / FILE_NAME
        named = labels(run)
        tags = [*(f"{kind}:{label}"[:LONGEST_TAG] for kind, label in named.items()), *self._tags]
        self._run = self._wandb.init(
            project=self._project,
            entity=self._entity,
            mode=self._mode,
            group=self._group or group_name(run),
            tags=tags,
            id=_run_id(run),
            resume="allow",
            name=run.name,
            dir=str(run.run_dir),
            config={**run.config, "labels": named},
            settings=self._wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                init_timeout=self._init_timeout,
                finish_timeout=self._finish_timeout,
            ),
        )
        for axis in AXES:
            self._run.define_metric(axis, hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        """Log a record with its axes; a step that is sent again, after a resume, stands there twice."""
        self._run.log(dict(record))

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text as it is, in a fixed-width font."""
        page = self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({name: page, "step": step})

    def close(self, code: int) -> None:
        """Sum the run up, from its metrics of all invocations, and end it with its exit code."""
        try:
            self._run.summary.update(_summary(self._metrics))
        finally:
            self._run.finish(exit_code=code)


def default_entity() -> str:
    """Ask the service for the user or team that the login stands for.

    Raises:
        UnavailableError: the wandb package is not installed, nobody is logged in, or there is no answer; the
            message ends with what to do.
    """
    try:
        import wandb
    except ImportError as error:
        raise UnavailableError(
            "the wandb package is not installed; run `pip install 'sophia_train[wandb]'`"
        ) from error
    wandb.setup(wandb.Settings(silent=True))  # what it would print, the error says
    if not _logged_in(wandb):
        raise UnavailableError("no valid login to Weights & Biases; run `wandb login`, set WANDB_API_KEY")
    try:
        return str(wandb.Api().default_entity)
    except Exception as error:  # its own are not all of one family
        reason = " ".join(str(error).split())
        raise UnavailableError(f"Weights & Biases does not answer ({reason}); try later") from error


def _logged_in(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False, verify=False))  # never a question in the midst of training
    except wandb.Error:
        return False


def _summary(metrics: Path) -> dict[str, Any]:
    figures = dataclasses.asdict(summarize(read_metrics(metrics) if metrics.exists() else []))
    return {name: value for name, value in figures.items() if value is not None}


def _run_id(run: RunInfo) -> str:
    path = run.run_dir / "wandb_id"
    if run.resumed_from_step is not None and path.exists():
        return path.read_text().strip()
    run_id = secrets.token_hex(4)
    durable.write_text(path, run_id + "\n")
    return run_id
