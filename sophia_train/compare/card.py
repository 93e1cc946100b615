"""The card of a run: what it was, what came out, what it cost and how to run it again, on one page."""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sophia_train import checkpoint, durable
from sophia_train.compare.document import Block, Heading, Paragraph, Table, markdown
from sophia_train.compare.groups import optimizer_name, size_name
from sophia_train.compare.runs import is_number, leaves, read_json
from sophia_train.errors import DataError, MissingInputError
from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.trackers.jsonl import FILE_NAME, read_metrics
from sophia_train.trackers.summary import Summary, summarize

CARD, CURVE = "card.md", "loss.png"

SAID_ELSEWHERE = ("name", "run_dir", "seed", "processes", "tracker")
"""Settings that the card names in other places, or that say where its figures went."""

Settings = Mapping[str, Any]


def write_card(run_dir: Path, defaults: Settings | None = None) -> Path:
    """Write the card of a run to `card.md` in its folder, whether it has ended or not.

    Args and errors are those of `card`.

    Returns:
        The card's path.
    """
    path = run_dir / CARD
    durable.write_text(path, card(run_dir, defaults))
    return path


def card(run_dir: Path, defaults: Settings | None = None) -> str:
    """Write the card of a run, as Markdown, from what its folder holds; what is not known is left out.

    Args:
        run_dir: a run folder; `config.json` must be there.
        defaults: settings of a run that sets nothing; only what differs from them is listed. None lists all.

    Raises:
        MissingInputError: there is no such folder, or no `config.json` in it.
        DataError: one of the files was altered; names it.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise MissingInputError(f"{run_dir} is not a folder; give the folder of a run")
    config = read_json(run_dir / "config.json", needed=True)
    environment = read_json(run_dir / "environment.json", needed=False)
    status = read_json(run_dir / "status.json", needed=False)
    newest = checkpoint.latest(run_dir / "checkpoints")
    manifest = {} if newest is None else checkpoint.read_manifest(newest)
    metrics = run_dir / FILE_NAME
    figures = _latest(summarize(read_metrics(metrics) if metrics.exists() else []), manifest)
    try:
        subject = list(_subject(config, manifest))
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{run_dir / 'config.json'} is not of a run ({error}); give a run folder") from None
    blocks: list[Block] = [
        Heading(1, str(config.get("name", run_dir.name))),
        Paragraph(_standing(status)),
        *([Paragraph(f"![Loss against steps]({CURVE})")] if (run_dir / CURVE).exists() else []),
        *_table("Result", _result(figures, read_baselines(run_dir))),
        *_table("Cost", _cost(figures, environment)),
        *_table("What", subject),
        *_table("Where", _place(environment)),
        *_settings(config, defaults),
        *_again(str(config.get("run_dir", run_dir)), environment),
    ]
    return markdown(blocks)


def read_baselines(run_dir: Path) -> dict[str, float]:
    """Read the losses of what a finished run was to beat, in nats a token, such as the bigram model's.

    Raises:
        DataError: `status.json`, which has them, was altered.
    """
    path = run_dir / "status.json"
    baselines = read_json(path, needed=False).get("baselines", {})
    if not (isinstance(baselines, dict) and all(map(is_number, baselines.values()))):
        raise DataError(f"{path}: baselines={json.dumps(baselines)} are no losses by name; restore the file")
    return baselines


Rows = Iterator[tuple[str, str]]


def _result(figures: Summary, baselines: Mapping[str, float]) -> Rows:
    if figures.final_val_loss is not None:
        yield "validation loss", f"{figures.final_val_loss:.4f} nats a token"
    if figures.best_val_loss is not None:
        yield "lowest", f"{figures.best_val_loss:.4f} at step {figures.best_step:,}"
    for name, value in baselines.items():
        yield f"{name} model", f"{value:.4f}"
    if figures.step is not None:
        yield "steps", f"{figures.step:,}"
    if figures.tokens is not None:
        yield "tokens", f"{figures.tokens:,}"
    if figures.skipped_steps is not None:
        yield "skipped steps", f"{figures.skipped_steps:,}"
    if figures.win_rate is not None:
        yield "win rate", f"{figures.win_rate:.3f} of coordinates not clipped, mean"


def _cost(figures: Summary, environment: Settings) -> Rows:
    if figures.flops is not None:
        yield "FLOPs", f"{figures.flops:.4g}, the Hessian's passes included"
    if figures.seconds is not None:
        yield "time", f"{figures.seconds:,.1f} s"
        if "processes" in environment and figures.peak_memory_gb is not None:  # which GPUs alone have
            yield "GPU hours", f"{environment['processes'] * figures.seconds / 3600:.4g}"
    if figures.tokens_per_second is not None:
        yield "tokens a second", f"{figures.tokens_per_second:,.0f}"
    if figures.mfu is not None:
        yield "model FLOPs utilisation", f"{figures.mfu:.1%}"
    if figures.hessian_share is not None:
        yield "Hessian's share of the time", f"{figures.hessian_share:.1%}"
    if figures.peak_memory_gb is not None:
        yield "peak memory of a GPU", f"{figures.peak_memory_gb:.2f} GB"


def _subject(config: Settings, manifest: Settings) -> Rows:
    settings = leaves(config)
    if "model" in config:
        shape = GPT2Config(**config["model"])
        with torch.device("meta"):
            parameters = sum(p.numel() for p in GPT2(shape).parameters())
        yield "model", f"GPT-2, {size_name(parameters)} parameters"
        yield (
            "its shape",
            f"{shape.n_layer} layer{'s' * (shape.n_layer > 1)}, {shape.n_head} heads, width {shape.n_embd}, "
            f"context {shape.block_size}, {shape.vocab_size:,} words",
        )
    if name := optimizer_name(settings):
        yield "optimizer", name
    if target := settings.get("data._target_"):
        place = settings.get("data.repo") or settings.get("data.path")
        yield "data", " ".join([str(target).rpartition(".")[2], *([f"`{place}`"] if place else [])])
    for split, digest in manifest.get("data", {}).items():
        yield f"digest of the {split} tokens", f"`{digest}`"
    if "tokenizer" in manifest:
        yield "tokenizer", f"`{manifest['tokenizer']}`"
    if "seed" in settings:
        yield "seed", str(settings["seed"])


def _place(environment: Settings) -> Rows:
    if "device" in environment:
        yield "device", f"{environment.get('processes', 1)} x {environment['device']}"
    for key in ("sophia_train", "commit", "torch", "cuda", "python", "platform"):
        if environment.get(key) is not None:
            yield key, f"`{environment[key]}`"


def _settings(config: Settings, defaults: Settings | None) -> Iterator[Block]:
    """List settings, beside the defaults that they are in the place of."""
    mine, usual = leaves(config), leaves(defaults or {})
    keys = [
        key
        for key in sorted(mine)
        if key.split(".")[0] not in SAID_ELSEWHERE and (key not in usual or mine[key] != usual[key])
    ]
    if defaults is None:
        yield Table(["Setting", ""], [[f"`{key}`", _value(mine[key])] for key in keys], words=True)
    elif keys:
        rows = [[f"`{key}`", _value(mine[key]), _value(usual[key]) if key in usual else ""] for key in keys]
        yield Table(["Setting that is not the default", "", "default"], rows, words=True)


def _again(run_dir: str, environment: Settings) -> Iterator[Block]:
    command = environment.get("command")
    if not command:
        return
    another = f"{run_dir}-again"
    if not re.fullmatch(r"[\w./-]+", another):
        another = "'" + another.replace("'", "\\'") + "'"  # for Hydra, as the name of a sweep's run has an =
    commit = environment.get("commit")
    yield Paragraph(f"To run it again{f', at commit `{commit}`' if commit else ''}:")
    words = [word for word in command if not word.startswith(("name=", "run_dir="))]
    names = [word for word in command if word.startswith("name=")]  # a sweep puts its own behind the other
    yield Paragraph(f"```sh\n{shlex.join([*words, *names[-1:], f'run_dir={another}'])}\n```")


def _standing(status: Settings) -> str:
    """Say how the last invocation that ended has ended."""
    if not status:
        return "No invocation has ended in order yet; this is as far as it has got."
    reason = " ".join(str(status.get("reason", "ended")).split())
    if status.get("code") == 0:
        return f"{reason.capitalize()} at step {status.get('step', 0):,}."
    return f"Not finished: {reason} (exit code {status.get('code')})."


def _latest(figures: Summary, manifest: Settings) -> Summary:
    """Go on to the newest checkpoint: a run saves after it has logged, and also where it does not log."""
    state = manifest.get("state", {})
    if state.get("step", 0) < (figures.step or 0):
        return figures
    names = ("step", "tokens", "seconds", "flops", "skipped_steps")
    return dataclasses.replace(figures, **{name: state[name] for name in names if name in state})


def _table(title: str, rows: Rows | list[tuple[str, str]]) -> Iterator[Block]:
    if cells := [list(row) for row in rows]:
        yield Table([title, ""], cells, words=True)


def _value(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"
