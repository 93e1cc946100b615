"""What an optimizer's state says about a run, for any optimizer: read only when it is logged."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sophia_train.optim.gamma import gamma_groups
from sophia_train.optim.shards import gather_shards, locals_of, sum_over_shards, total_norm


@torch.no_grad()
def optimizer_statistics(optimizer: Optimizer) -> dict[str, Tensor]:
    """Norms over all parameters, and what else the optimizer's state allows.

    Returns:
        Scalars on the device: `optim/param_norm`; `optim/momentum_norm` where the state has `exp_avg`;
        `optim/hessian_norm` and `optim/hessian_negative_fraction` where it has `hessian`;
        `optim/unclipped_fraction` and `optim/gamma` where the optimizer has them.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in params if p in optimizer.state]
    momenta = [state["exp_avg"] for state in states if "exp_avg" in state]
    hessians = [state["hessian"] for state in states if "hessian" in state]
    statistics = {"optim/param_norm": total_norm(params)}
    if momenta:
        statistics["optim/momentum_norm"] = total_norm(momenta)
    if hessians:
        parts, total = locals_of(hessians), sum(h.numel() for h in hessians)
        negative = torch.stack([(h < 0).sum(dtype=torch.float32) for h in parts]).sum()
        zero = torch.stack([(h == 0).sum(dtype=torch.float32) for h in parts]).sum()
        statistics["optim/hessian_norm"] = total_norm(hessians)
        statistics["optim/hessian_zero_fraction"] = sum_over_shards(zero, hessians) / total
        statistics["optim/hessian_negative_fraction"] = sum_over_shards(negative, hessians) / total
    if states and hasattr(optimizer, "unclipped_fraction"):
        statistics["optim/unclipped_fraction"] = optimizer.unclipped_fraction()
    groups = gamma_groups(optimizer)
    if groups:
        statistics["optim/gamma"] = torch.tensor(groups[0]["gamma"])
    return statistics


QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
QUANTILE_SAMPLES = 2**20  # of a run's coordinates, evenly spaced


@torch.no_grad()
def hessian_statistics(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """What h looks like inside: where it is clipped, and how it is spread.

    Args:
        optimizer: nothing is returned for one that has no `hessian` in its state.
        names: of the parameters.

    Returns:
        Scalars: `hessian/quantile_01` ... `hessian/quantile_99` over an even sample of all coordinates, and
        `hessian/unclipped_fraction/LAYER` for each layer (`h.0`, `wte`) whose optimizer clips.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    owned = [p for p in params if "hessian" in optimizer.state.get(p, {})]
    if not owned:
        return {}
    stride = max(1, sum(p.numel() for p in owned) // QUANTILE_SAMPLES)
    hessians = [optimizer.state[p]["hessian"] for p in owned]
    sample = torch.cat([part.flatten()[::stride].float() for part in locals_of(hessians)])
    sample = gather_shards(sample, hessians)
    levels = torch.tensor(QUANTILES, device=sample.device)
    statistics = {
        f"hessian/quantile_{level * 100:02.0f}": value
        for level, value in zip(QUANTILES, sample.quantile(levels), strict=True)
    }
    if hasattr(optimizer, "unclipped_fraction"):
        layers: dict[str, list[Tensor]] = {}
        for p in owned:
            layers.setdefault(layer_of(names[p]), []).append(p)
        for layer, members in layers.items():
            statistics[f"hessian/unclipped_fraction/{layer}"] = optimizer.unclipped_fraction(members)
    return statistics


def layer_of(name: str) -> str:
    """The layer of a parameter: up to the first number in its name, or its module (`h.0`, `wte`)."""
    numbered = re.search(r"([^.]+\.\d+)\.", name)
    return numbered.group(1) if numbered else name.split(".")[-2 if "." in name else 0]
