"""AdaHessian (Yao et al., AAAI 2021, arXiv 2006.00719): Adam with the Hessian's diagonal for the gradient.

With m the average of the gradients and v that of the squared estimates of the Hessian's diagonal:

    every k steps:  v <- b2 v + (1 - b2) h_hat^2             (`update_hessian`)
    every step:     m <- b1 m + (1 - b1) g
                    theta <- theta - lr wd theta
                    theta <- theta - lr m' / (v'^(power / 2) + eps)

Both averages are corrected for starting at 0: m' = m / (1 - b1^t) after t steps, v' = v / (1 - b2^n) after n
estimates. Estimates are not averaged over neighbouring coordinates, as the paper may for convolutions and
blocks. Nothing bounds a step where v is small: that is what Sophia's clip is for.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from sophia_train.optim.hessian_average import all_finite, move_averages, owned


class AdaHessian(Optimizer):
    """Momentum divided by the root mean square of estimates of the Hessian's diagonal.

    As with `Sophia`, whoever estimates the diagonal calls `update_hessian`. Until its first estimate there is
    no scale for a parameter's step: it stays where it is, is not decayed, and its momentum gathers.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the averages of gradients and of squared estimates.
        eps: added to the denominator.
        weight_decay: decoupled, multiplied by lr.
        hessian_power: of the diagonal in the denominator: 1 is Newton's, 0 leaves momentum.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        hessian_power: float = 1.0,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name}={value} must be at least 0")
        if not eps > 0:
            raise ValueError(f"eps={eps} must be above 0")
        for index, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{index}]={beta} must be at least 0 and below 1")
        if not 0 <= hessian_power <= 1:
            raise ValueError(f"hessian_power={hessian_power} must be between 0 and 1")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` and the result are as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta, lr = group["betas"][0], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state_of(p)
                state["step"] += 1
                momentum = state["exp_avg"].lerp_(p.grad, 1 - beta) / (1 - beta ** state["step"].item())
                weight = state["hessian_sq_weight"]
                curvature = state["hessian_sq"] / torch.where(weight > 0, weight, 1.0)
                update = momentum / curvature.pow_(group["hessian_power"] / 2).add_(group["eps"])
                update.add_(p, alpha=group["weight_decay"])
                p.sub_(torch.where(weight > 0, update, 0.0), alpha=lr)
        return loss

    @torch.no_grad()
    def update_hessian(self, estimates: Mapping[Tensor, Tensor]) -> Tensor:
        """Take a new estimate into v, or drop it as a whole if it, or its square, is not finite anywhere.

        Nothing is read back from the device. Arguments, result and errors are those of `Sophia`.
        """
        used = owned(self, estimates)
        squares = {p: estimate.square() for p, estimate in estimates.items()}
        finite = all_finite(list(squares.values()))
        for group, params in used:
            states, weight = [self._state_of(p) for p in params], 1 - group["betas"][1]
            averages = [state["hessian_sq"] for state in states]
            new = [squares[p].to(average.dtype) for p, average in zip(params, averages, strict=True)]
            move_averages(averages, new, weight, finite)
            weights = [state["hessian_sq_weight"] for state in states]
            move_averages(weights, [finite.to(weights[0].dtype)] * len(weights), weight, finite)
        return finite

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["hessian_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["hessian_sq_weight"] = torch.zeros((), dtype=p.dtype, device=p.device)  # 1 - b2^n
        return state
