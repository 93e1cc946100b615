"""Sophia: Second-order Clipped Stochastic Optimization (Liu et al., ICLR 2024, arXiv 2305.14342).

Algorithm 3, with m the momentum, h the moving average of the Hessian's diagonal, and no bias correction:

    every k steps:  h <- b2 h + (1 - b2) h_hat            (line 9, `update_hessian`)
    every step:     m <- b1 m + (1 - b1) g                (line 6)
                    theta <- theta - lr wd theta          (line 12)
                    u = m / max(gamma h, eps)             (line 13; `eps_mode="add"`: gamma h + eps)
                    theta <- theta - lr clip(u, threshold)

Where h is small or negative, the coordinate moves by lr times the clip threshold, as in sign descent.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class Sophia(Optimizer):
    """Momentum divided by an estimate of the Hessian's diagonal, clipped coordinate by coordinate.

    The optimizer owns the moving average `hessian` and the update; whoever estimates the diagonal calls
    `update_hessian`. Without that call h stays 0 and every step is a signed step.

    Args:
        params: parameters or groups of them.
        lr: learning rate; with the clip, the most a coordinate moves in a step (before weight decay).
        betas: decay of the momentum and of the Hessian's average.
        gamma: scale of h in the denominator: the larger, the fewer coordinates are clipped.
        eps: floor of the denominator (`eps_mode="max"`, the paper) or added to it (`"add"`, the official
            code and Sophia-Lite).
        eps_mode: "max" or "add".
        clip_threshold: bound of the preconditioned momentum; None leaves it unbounded.
        weight_decay: decoupled, multiplied by lr.
        maximize: ascend instead of descend.
        foreach: use multi-tensor kernels; None uses them where all parameters are on CUDA. Both give the same
            bits on one device.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.05,
        eps: float = 1e-12,
        clip_threshold: float | None = 1.0,
        weight_decay: float = 0.2,
        *,
        eps_mode: str = "max",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("gamma", gamma), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name}={value} must be at least 0")
        if not eps > 0:
            raise ValueError(f"eps={eps} must be above 0")
        for index, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{index}]={beta} must be at least 0 and below 1")
        if clip_threshold is not None and not clip_threshold > 0:
            raise ValueError(f"clip_threshold={clip_threshold} must be above 0, or null for no clip")
        if eps_mode not in ("max", "add"):
            raise ValueError(f"eps_mode={eps_mode} must be max or add")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "gamma": gamma,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
            "eps_mode": eps_mode,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss, as in torch.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("Sophia does not support sparse gradients")
            grads = [p.grad for p in params]
            states = [self._state_of(p) for p in params]
            for state in states:
                state["step"] += 1
            exp_avgs = [state["exp_avg"] for state in states]
            hessians = [state["hessian"] for state in states]
            foreach = group["foreach"]
            if foreach is None:
                foreach = all(p.is_cuda for p in params)
            update = _multi_tensor_sophia if foreach else _single_tensor_sophia
            update(params, grads, exp_avgs, hessians, group)
        return loss

    @torch.no_grad()
    def update_hessian(self, estimates: Mapping[Tensor, Tensor]) -> Tensor:
        """Move the average h towards a new estimate: h <- b2 h + (1 - b2) h_hat (Alg. 3, line 9).

        An estimate with a NaN or an infinity anywhere is dropped as a whole: in the average it would freeze
        its coordinate for ever. Nothing is read back from the device.

        Args:
            estimates: the estimated diagonal for each parameter, of its shape; parameters that are not named
                keep their h.

        Returns:
            A boolean scalar on the device: whether the estimate was finite, that is, used.

        Raises:
            ValueError: no estimate is for a parameter of this optimizer.
        """
        used = [(p, g["betas"][1]) for g in self.param_groups for p in g["params"] if p in estimates]
        if not used:
            raise ValueError("none of the estimates is for a parameter of this optimizer")
        norms = torch._foreach_norm([estimates[p] for p, _ in used], float("inf"))
        finite = torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()
        for p, beta2 in used:
            hessian = self._state_of(p)["hessian"]
            estimate = torch.where(finite, estimates[p].to(hessian.dtype), hessian)
            hessian.lerp_(estimate, 1 - beta2)
        return finite

    @torch.no_grad()
    def unclipped_fraction(self) -> Tensor:
        """Share of coordinates that the last step did not clip (the official code's win rate), a scalar."""
        unclipped, total = [], 0
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if not state:
                    continue
                total += p.numel()
                if group["clip_threshold"] is None:
                    unclipped.append(torch.tensor(float(p.numel()), device=p.device))
                    continue
                bound = _single_denominator(state["hessian"], group) * group["clip_threshold"]
                unclipped.append((state["exp_avg"].abs() < bound).sum(dtype=torch.float32))
        return torch.stack(unclipped).sum() / total if total else torch.tensor(float("nan"))

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["hessian"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def _single_denominator(hessian: Tensor, group: Mapping[str, Any]) -> Tensor:
    denominator = hessian * group["gamma"]
    if group["eps_mode"] == "add":
        return denominator.add_(group["eps"])
    return denominator.clamp_min_(group["eps"])


def _single_tensor_sophia(
    params: Iterable[Tensor],
    grads: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    hessians: Iterable[Tensor],
    group: Mapping[str, Any],
) -> None:
    lr, clip = group["lr"], group["clip_threshold"]
    for param, grad, exp_avg, hessian in zip(params, grads, exp_avgs, hessians, strict=True):
        grad = -grad if group["maximize"] else grad
        exp_avg.lerp_(grad, 1 - group["betas"][0])
        param.mul_(1 - lr * group["weight_decay"])
        update = exp_avg / _single_denominator(hessian, group)
        if clip is not None:
            update.clamp_(-clip, clip)
        param.add_(update, alpha=-lr)


def _multi_tensor_sophia(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    group: Mapping[str, Any],
) -> None:
    lr, clip = group["lr"], group["clip_threshold"]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    torch._foreach_lerp_(exp_avgs, grads, 1 - group["betas"][0])
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    denominators = torch._foreach_mul(hessians, group["gamma"])
    if group["eps_mode"] == "add":
        torch._foreach_add_(denominators, group["eps"])
    else:
        torch._foreach_clamp_min_(denominators, group["eps"])
    updates = torch._foreach_div(exp_avgs, denominators)
    del denominators
    if clip is not None:
        torch._foreach_clamp_min_(updates, -clip)
        torch._foreach_clamp_max_(updates, clip)
    torch._foreach_add_(params, updates, alpha=-lr)
