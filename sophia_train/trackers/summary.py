"""The records of a run as the few figures that it is known by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sophia_train.trackers.base import AXES


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of a run so far; None for what was never logged.

    Attributes:
        step: completed steps.
        tokens: target tokens seen.
        seconds: spent training, evaluation and saving included, over all invocations.
        flops: spent, the Hessian's passes included.
        final_val_loss: of the last evaluation, in nats a token; may be NaN.
        best_val_loss: the lowest finite one.
        best_step: where that was.
        tokens_per_second: mean over the logged steps, evaluation and saving left out.
        mfu: mean of the model FLOPs utilisation, as a fraction.
        hessian_share: mean share of the time that went into Hessian passes.
        win_rate: mean fraction of coordinates that were not clipped.
        peak_memory_gb: highest of the first GPU.
        skipped_steps: whose update was left out because loss or gradient was not finite.
    """

    step: int | None
    tokens: int | None
    seconds: float | None
    flops: float | None
    final_val_loss: float | None
    best_val_loss: float | None
    best_step: int | None
    tokens_per_second: float | None
    mfu: float | None
    hessian_share: float | None
    win_rate: float | None
    peak_memory_gb: float | None
    skipped_steps: int | None


def summarize(records: Sequence[Mapping[str, Any]]) -> Summary:
    """Sum up the records of `metrics.jsonl`; anything but a number counts as not logged."""
    losses = [(r["val/loss"], r["step"]) for r in records if _is_number(r.get("val/loss"))]
    best = min(((loss, step) for loss, step in losses if math.isfinite(loss)), default=(None, None))
    return Summary(
        **{axis: _last(records, axis) for axis in AXES},
        final_val_loss=losses[-1][0] if losses else None,
        best_val_loss=best[0],
        best_step=best[1],
        tokens_per_second=_mean(records, "perf/tokens_per_second"),
        mfu=_mean(records, "perf/mfu"),
        hessian_share=_mean(records, "perf/hessian_share"),
        win_rate=_mean(records, "optim/unclipped_fraction"),
        peak_memory_gb=max(_finite(records, "perf/peak_memory_gb"), default=None),
        skipped_steps=_last(records, "optim/skipped_steps"),
    )


def _last(records: Sequence[Mapping[str, Any]], key: str) -> Any:
    values = _finite(records, key)
    return values[-1] if values else None


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = _finite(records, key)
    return fmean(values) if values else None


def _finite(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [r[key] for r in records if _is_number(r.get(key)) and math.isfinite(r[key])]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
