"""The panels of a dashboard: which metrics are looked at together, and against what."""

from dataclasses import dataclass

from sophia_train.trackers.base import AXES

AXIS_WORDS = dict(zip(AXES, ("steps", "tokens", "seconds", "FLOPs"), strict=True))


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: what stands above it.
        metric: its name in the records of a run.
        axis: what it is drawn against, one of `AXES`.
    """

    title: str
    metric: str
    axis: str = "step"


@dataclass(frozen=True)
class Section:
    """Charts that answer one question."""

    name: str
    panels: tuple[Panel, ...]


def against_all_axes(title: str, metric: str) -> tuple[Panel, ...]:
    """Draw one metric against steps, tokens, seconds and FLOPs."""
    return tuple(Panel(f"{title} against {word}", metric, axis) for axis, word in AXIS_WORDS.items())


VALIDATION_LOSS = Section("Validation loss", against_all_axes("Validation loss", "val/loss"))

SECTIONS = (
    VALIDATION_LOSS,
    Section("Training loss", against_all_axes("Training loss", "train/loss")),
    Section(
        "Hessian",
        (
            Panel("Win rate: fraction of coordinates not clipped", "optim/unclipped_fraction"),
            Panel("Norm of the Hessian's diagonal", "optim/hessian_norm"),
            Panel("Fraction of its coordinates below 0", "optim/hessian_negative_fraction"),
            Panel("Overhead: share of the time in its passes", "perf/hessian_share"),
        ),
    ),
    Section(
        "Update",
        (
            Panel("Learning rate", "optim/lr"),
            Panel("Norm of the gradient, before clipping", "optim/grad_norm"),
            Panel("Norm of the momentum", "optim/momentum_norm"),
            Panel("Norm of the parameters", "optim/param_norm"),
        ),
    ),
    Section(
        "Speed",
        (
            Panel("Tokens a second", "perf/tokens_per_second"),
            Panel("Seconds a step", "perf/step_seconds"),
            Panel("Model FLOPs utilisation", "perf/mfu"),
            Panel("Peak memory, GB", "perf/peak_memory_gb"),
        ),
    ),
)
