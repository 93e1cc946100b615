"""Where a run stands: everything a resume needs beside weights and optimizer state."""

from dataclasses import dataclass

MAY_CHANGE = frozenset(
    {
        "activation_checkpointing",
        "compile",
        "compile_cache",
        "dry_run",
        "eval_interval",
        "init_from",
        "keep_checkpoints",
        "log_interval",
        "max_seconds",
        "max_skipped_steps",
        "micro_batch_size",
        "name",
        "parallel",
        "processes",
        "profile",
        "resume",
        "run_dir",
        "sample_interval",
        "sample_prompt",
        "sample_tokens",
        "save_in_background",
        "save_interval",
        "shard_processes",
        "stop_at_step",
        "tracker",
        "data.folder",
        "data.path",
        "hessian.micro_batch_size",
    }
)
"""Settings that a run may be continued with other values of: they do not change what it computes, up to
rounding and to dropout, which is seeded by process and micro-batch."""


def may_change(key: str) -> bool:
    """Whether a setting, by its dotted key, or what it is in, is one of `MAY_CHANGE`."""
    return key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        step: completed steps, skipped ones included; with the seed it determines all data and noise to come.
        tokens: target tokens seen by the training loss.
        flops: floating-point operations spent, the Hessian's passes included.
        seconds: time spent training, evaluation and saving included, over all invocations.
        skipped_steps: steps whose update was left out because loss or gradient was not finite.
        consecutive_skipped_steps: how many of those stand at the end of the run so far.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    skipped_steps: int = 0
    consecutive_skipped_steps: int = 0
