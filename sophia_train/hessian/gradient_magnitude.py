"""The magnitude of the training gradient in the place of a Hessian (Sophia-Lite)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_train.hessian.base import TrainingGradientEstimator


@dataclass(frozen=True, kw_only=True)
class GradientMagnitude(TrainingGradientEstimator):
    """|g| of the training gradient, Sophia-Lite's proxy.

    It estimates no curvature: it has the gradient's unit and not the Hessian's, and depends on the size of
    the batch through the gradient's noise. With gamma = 1, m / h is a momentum over its own magnitude.
    """

    interval: int = 20

    def from_gradients(self, gradients: list[Tensor], tokens: int | Tensor) -> list[Tensor]:  # noqa: D102
        return list(torch._foreach_abs(gradients))
