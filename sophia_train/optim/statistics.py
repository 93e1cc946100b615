"""What an optimizer's state says about a run, for any optimizer: read only when it is logged."""

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


@torch.no_grad()
def optimizer_statistics(optimizer: Optimizer) -> dict[str, Tensor]:
    """Norms over all parameters, and what else the optimizer's state allows.

    Returns:
        Scalars on the device: `optim/param_norm`; `optim/momentum_norm` where the state has `exp_avg`;
        `optim/hessian_norm` and `optim/hessian_negative_fraction` where it has `hessian`;
        `optim/unclipped_fraction` where the optimizer can tell.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in params if p in optimizer.state]
    momenta = [state["exp_avg"] for state in states if "exp_avg" in state]
    hessians = [state["hessian"] for state in states if "hessian" in state]
    statistics = {"optim/param_norm": torch.nn.utils.get_total_norm(params)}
    if momenta:
        statistics["optim/momentum_norm"] = torch.nn.utils.get_total_norm(momenta)
    if hessians:
        negative = torch.stack([(h < 0).sum(dtype=torch.float32) for h in hessians]).sum()
        statistics["optim/hessian_norm"] = torch.nn.utils.get_total_norm(hessians)
        statistics["optim/hessian_negative_fraction"] = negative / sum(h.numel() for h in hessians)
    if states and hasattr(optimizer, "unclipped_fraction"):
        statistics["optim/unclipped_fraction"] = optimizer.unclipped_fraction()
    return statistics
