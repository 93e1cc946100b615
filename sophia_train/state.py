"""Where a run stands: everything a resume needs beside weights and optimizer state."""

from dataclasses import dataclass


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
