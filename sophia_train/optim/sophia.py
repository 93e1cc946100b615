"""Sophia: Second-order Clipped Stochastic Optimization (Liu et al., ICLR 2024, arXiv 2305.14342).

Algorithm 3, with m the momentum and h the moving average of the Hessian's diagonal:

    every k steps:  h <- b2 h + (1 - b2) h_hat            (line 9, `update_hessian`)
    every step:     m <- b1 m + (1 - b1) g                (line 6)
                    theta <- theta - lr wd theta          (line 12)
                    u = m / max(gamma h, eps)             (line 13; `eps_mode="add"`: gamma h + eps)
                    theta <- theta - lr clip(u, threshold)

Where h is small or negative, the coordinate moves by lr times the clip threshold, as in sign descent. The
paper corrects neither average for starting at 0; `bias_correction` does, as other published versions do.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from sophia_train.optim.hessian_average import all_finite, move_averages, owned
from sophia_train.optim.kernels import fusable, triton_kernels
from sophia_train.optim.shards import is_sharded, local, locals_of, sum_over_shards


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
        bias_correction: "none" (the paper and the official code); "momentum", m / (1 - b1^t), as levanter and
            optax; "both", with h / (1 - b2^n) after n estimates too.
        clip_threshold: bound of the preconditioned momentum; None leaves it unbounded.
        weight_decay: decoupled, multiplied by lr.
        maximize: ascend instead of descend.
        foreach: use torch's multi-tensor kernels, which give the bits of the loop over parameters; None uses
            them where all parameters are on CUDA, and `fused` cannot be.
        fused: use kernels of one pass over memory, equal to the loop up to rounding; None uses them where all
            tensors are on CUDA, float32 and contiguous, unless `foreach` is set.

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
        bias_correction: str = "none",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
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
        if bias_correction not in ("none", "momentum", "both"):
            raise ValueError(f"bias_correction={bias_correction} must be none, momentum or both")
        if foreach and fused:
            raise ValueError("foreach and fused cannot both be true")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "gamma": gamma,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
            "eps_mode": eps_mode,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
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
            RuntimeError: a gradient is sparse, or `fused` cannot be had.
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
            states = [self._state_of(p, group) for p in params]
            for state in states:
                state["step"] += 1
            grads = [p.grad for p in params]
            if is_sharded(params):  # the rule goes coordinate by coordinate: each part by itself
                params, grads = locals_of(params), locals_of(grads)
                states = [_local_state(state) for state in states]
            averages = [[state[key] for state in states] for key in ("exp_avg", "hessian")]
            if _fuses(group, params, grads, *averages):
                triton_kernels().step(params, grads, states, group)
            elif group["foreach"] or (group["foreach"] is None and all(p.is_cuda for p in params)):
                _multi_tensor_sophia(params, grads, states, group)
            else:
                _single_tensor_sophia(params, grads, states, group)
        return loss

    @torch.no_grad()
    def update_hessian(self, estimates: Mapping[Tensor, Tensor]) -> Tensor:
        """Move the average h towards a new estimate: h <- b2 h + (1 - b2) h_hat (Alg. 3, line 9).

        An estimate with a NaN or an infinity anywhere is dropped as a whole: in the average it would freeze
        its coordinate for ever. Nothing is read back from the device.

        Args:
            estimates: the estimated diagonal for each parameter, of its shape; parameters that are not named
                keep their h, and those of other parameters are only looked at for being finite.

        Returns:
            A boolean scalar on the device: whether the estimate was finite, that is, used.

        Raises:
            ValueError: no estimate is for a parameter of this optimizer.
        """
        used = owned(self, estimates)
        finite = all_finite(list(estimates.values()))
        for group, params in used:
            states = [self._state_of(p, group) for p in params]
            averages = locals_of(state["hessian"] for state in states)
            found = locals_of(estimates[p] for p in params)
            weight = 1 - group["betas"][1]
            if _fuses(group, averages, found):
                triton_kernels().move_averages(averages, found, weight, finite)
            else:
                cast = [new.to(average.dtype) for new, average in zip(found, averages, strict=True)]
                move_averages(averages, cast, weight, finite)
            if group["bias_correction"] == "both":
                weights = [state["hessian_weight"] for state in states]
                move_averages(weights, [finite.to(weights[0].dtype)] * len(weights), weight, finite)
        return finite

    @torch.no_grad()
    def unclipped_fraction(self, params: Iterable[Tensor] | None = None) -> Tensor:
        """Share of coordinates that the last step did not clip (the official code's win rate), a scalar.

        Args:
            params: those to look at; None takes all. Where there are none, or before the first step, NaN.
        """
        wanted = None if params is None else set(params)
        unclipped, seen = [], []
        for group in self.param_groups:
            for p in group["params"]:
                state = _local_state(self.state.get(p, {}))
                if not state or (wanted is not None and p not in wanted):
                    continue
                seen.append(p)
                clip = group["clip_threshold"]
                if clip is None:
                    unclipped.append(torch.tensor(float(local(p).numel()), device=p.device))
                    continue
                within = _momentum(state, group).abs() < _denominator(state, group) * clip
                unclipped.append(within.sum(dtype=torch.float32))
        if not seen:
            return torch.tensor(float("nan"))
        return sum_over_shards(torch.stack(unclipped).sum(), seen) / sum(p.numel() for p in seen)

    def _state_of(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["hessian"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if group["bias_correction"] == "both":  # the weight that estimates have in h: 1 - b2^n
                state["hessian_weight"] = torch.zeros((), dtype=p.dtype, device=p.device)
        return state


def _local_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter with the part of each tensor that this process keeps."""
    return {key: local(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def _fuses(group: Mapping[str, Any], *columns: list[Tensor]) -> bool:
    """Whether the group's tensors, listed by what they are, go through the fused kernels.

    Raises:
        RuntimeError: they were asked for, and cannot.
    """
    if group["fused"] is False or (group["fused"] is None and group["foreach"] is not None):
        return False
    able = fusable(*columns)
    if group["fused"] and not able:
        raise RuntimeError(
            "fused=True needs parameters, gradients and state on one CUDA device, float32 and contiguous; "
            "leave fused out"
        )
    return able


def _momentum(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    momentum: Tensor = state["exp_avg"]
    if group["bias_correction"] == "none":
        return momentum
    return momentum / _momentum_weight(state, group)


def _momentum_weight(state: Mapping[str, Any], group: Mapping[str, Any]) -> float:
    return float(1 - group["betas"][0] ** float(state["step"]))


def _denominator(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    denominator: Tensor = state["hessian"] * group["gamma"]
    if group["bias_correction"] == "both":
        denominator.div_(_hessian_weight(state))
    if group["eps_mode"] == "add":
        return denominator.add_(group["eps"])
    return denominator.clamp_min_(group["eps"])


def _hessian_weight(state: Mapping[str, Any]) -> Tensor:
    weight: Tensor = state["hessian_weight"]
    return torch.where(weight > 0, weight, 1.0)  # before the first estimate h is 0


def _single_tensor_sophia(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: Mapping[str, Any],
) -> None:
    lr, clip = group["lr"], group["clip_threshold"]
    for param, grad, state in zip(params, grads, states, strict=True):
        grad = -grad if group["maximize"] else grad
        state["exp_avg"].lerp_(grad, 1 - group["betas"][0])
        param.mul_(1 - lr * group["weight_decay"])
        update = _momentum(state, group) / _denominator(state, group)
        if clip is not None:
            update.clamp_(-clip, clip)
        param.add_(update, alpha=-lr)


def _multi_tensor_sophia(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: Mapping[str, Any],
) -> None:
    lr, clip = group["lr"], group["clip_threshold"]
    exp_avgs = [state["exp_avg"] for state in states]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    torch._foreach_lerp_(exp_avgs, grads, 1 - group["betas"][0])
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    denominators = torch._foreach_mul([state["hessian"] for state in states], group["gamma"])
    if group["bias_correction"] == "both":
        torch._foreach_div_(denominators, [_hessian_weight(state) for state in states])
    if group["eps_mode"] == "add":
        torch._foreach_add_(denominators, group["eps"])
    else:
        torch._foreach_clamp_min_(denominators, group["eps"])
    if group["bias_correction"] != "none":
        weights = [_momentum_weight(state, group) for state in states]
        exp_avgs = list(torch._foreach_div(exp_avgs, weights))
    updates = torch._foreach_div(exp_avgs, denominators)
    del denominators
    if clip is not None:
        torch._foreach_clamp_min_(updates, -clip)
        torch._foreach_clamp_max_(updates, clip)
    torch._foreach_add_(params, updates, alpha=-lr)
