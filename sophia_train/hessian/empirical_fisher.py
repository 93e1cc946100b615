"""The diagonal of the empirical Fisher matrix, from the training gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_train.hessian.base import TrainingGradientEstimator


@dataclass(frozen=True, kw_only=True)
class EmpiricalFisher(TrainingGradientEstimator):
    """B g*g of the training gradient g, the mean over B target tokens, with the data's labels.

    It looks like GNB's estimate but the labels are not the model's own: with gradients g_t of single tokens,
    E[B g*g] = E[g_t * g_t] + (B - 1) E[g_t]^2 for independent tokens. The first term is the diagonal of the
    empirical Fisher matrix; the second, which vanishes only where the expected gradient does, grows with the
    batch. A row of the paper's ablation ("empirical Fisher + clip").

    Attributes:
        scale_by_tokens: False leaves out the factor B, as the "floor" variant does, m / max(g*g, rho).
    """

    scale_by_tokens: bool = True

    def from_gradients(self, gradients: list[Tensor], tokens: int | Tensor) -> list[Tensor]:  # noqa: D102
        squares = list(torch._foreach_mul(gradients, gradients))
        if self.scale_by_tokens:
            torch._foreach_mul_(squares, tokens)
        return squares
