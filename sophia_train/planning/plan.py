"""What a run on a cluster would come to, in figures, and what they rest on."""

from collections.abc import Sequence
from typing import Any

from sophia_train.planning.cluster import LINK_EFFICIENCY, Cluster
from sophia_train.planning.measured import (
    Point,
    calibrating,
    errors,
    load_points,
    mfu_of,
    short,
    used_points,
)
from sophia_train.planning.planned_run import PlannedRun, planned_run, what_fits
from sophia_train.planning.step_time import step_time
from sophia_train.run_config import RunConfig


def make_plan(config: RunConfig, cluster: Cluster, points: Sequence[Point] | None = None) -> dict[str, Any]:
    """Plan a run.

    Args:
        config: of the run.
        cluster: which has it for itself.
        points: measured speeds; None takes ours.

    Returns:
        The plan as JSON: `cluster`, `run`, `memory_bytes` of one GPU, `step_seconds` by part,
        `communication_seconds` (hidden ones included) and `communication_share` (of the exposed ones in the
        step), `tokens_per_second` over all GPUs, `mfu` (without the Hessian's FLOPs), `days` and `gpu_hours`
        of training (without evaluations and checkpoints), the measured `points`, and `notes` in words.

    Raises:
        ConfigError: the run does not go there, or is of a kind of which no speed is known.
    """
    points = load_points() if points is None else points
    run = planned_run(config, cluster)
    config, work, card = run.config, run.work, cluster.card
    basis = calibrating(points, card)
    time = step_time(run, mfu_of(basis, work.parameters))
    seconds = work.steps * time.total
    return {
        "cluster": {
            "gpu": card.name,
            "gpus": cluster.gpus,
            "gpus_per_node": cluster.gpus_per_node,
            "network_gbit": cluster.network * 8 / 1e9 if cluster.nodes > 1 else None,
        },
        "run": {
            "parameters": work.parameters,
            "parallel": config.parallel,
            "shards": run.shards,
            "batch_size": config.batch_size,
            "block_size": config.model.block_size,
            "micro_batch_size": work.micro_batch_size,
            "micro_batches": work.micro_batches,
            "steps": work.steps,
            "tokens": work.steps * work.tokens,
        },
        "memory_bytes": {
            "states": work.memory.states,
            "activations": work.memory.activations,
            "logits": work.memory.logits,
            "total": work.memory.total,
            "card": card.memory,
        },
        "fits": _verdict(run),
        "step_seconds": {
            "compute": time.compute,
            "communication": time.exposed_communication,
            "optimizer": time.optimizer,
            "hessian": time.hessian,
            "total": time.total,
        },
        "communication_seconds": time.communication,
        "communication_share": time.exposed_communication / time.total,
        "tokens_per_second": work.tokens / time.total,
        "mfu": work.flops / time.total / (card.peak_flops * cluster.gpus),
        "days": seconds / 86400,
        "gpu_hours": seconds * cluster.gpus / 3600,
        "points": _points(points, used_points(basis, work.parameters)),
        "notes": list(_notes(run, points)),
    }


def _verdict(run: PlannedRun) -> str:
    if run.fits:
        return "fits"
    verdict = "does not fit" if run.memory_share > 1 else "may not fit, the estimate is good to a quarter"
    overrides = what_fits(run)
    if overrides is None:
        return f"{verdict}; take larger cards, parallel=fsdp on more of them, or a smaller model"
    return f"{verdict}; {overrides} would"


def _points(points: Sequence[Point], used: Sequence[Point]) -> list[dict[str, Any]]:
    return [
        {
            "name": point.name,
            "used": point in used,
            "measured": point.tokens_per_second,
            "error": error,
            "left_out_error": left_out,
            "command": point.command,
            "torch": point.torch,
            "provenance": point.provenance,
        }
        for point, (error, left_out) in zip(points, errors(points), strict=True)
    ]


def _notes(run: PlannedRun, points: Sequence[Point]) -> list[str]:
    """In what the plan goes beyond what was measured."""
    card, work = run.cluster.card, run.work
    basis = calibrating(points, card)
    used = used_points(basis, work.parameters)
    notes = []
    if card.name not in (cards := {point.gpu for point in basis}):
        notes.append(
            f"no point is of the {card.name}: it is given the MFU of the {' and '.join(sorted(cards))}"
        )
    sizes = [point.planned.work.parameters for point in basis]
    if not min(sizes) <= work.parameters <= max(sizes):
        word, nearest = ("small", min(sizes)) if work.parameters < min(sizes) else ("large", max(sizes))
        notes.append(
            f"no point is of a model as {word} as {short(work.parameters)}: "
            f"it is given the MFU of {short(nearest)}"
        )
    smallest = min(point.planned.work.micro_batch_size for point in used)
    if work.micro_batch_size <= smallest / 2:
        notes.append(
            f"micro-batches of {work.micro_batch_size} are much smaller than those measured ({smallest}), "
            "and may be slower"
        )
    if run.config.activation_checkpointing == "blocks":
        notes.append("recomputed blocks are taken to make a third more FLOPs at the same speed")
    if run.cluster.gpus > 1:
        mode = run.config.parallel
        measured = any(point.gpus > 1 and point.planned.config.parallel == mode for point in points)
        notes.append(
            f"links are taken to give {LINK_EFFICIENCY:.0%} of their datasheet rate"
            + ("" if measured else f", and no point has several GPUs with parallel={mode}")
        )
    left_out = [abs(each) for _, each in errors(points) if each is not None]
    if left_out:
        notes.append(
            f"points left out of their own prediction are off by up to {max(left_out):.1%}; "
            "beyond the points it may be more"
        )
    return notes
