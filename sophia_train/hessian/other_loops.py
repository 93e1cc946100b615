"""Estimators in anybody's training loop: around any module that returns logits, on any torch optimizer."""

from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from sophia_train.data.batches import Batch
from sophia_train.gradients import LossFunction
from sophia_train.hessian.base import Estimates, Estimator, Replica, TrainingGradientEstimator


def estimate(
    estimator: Estimator,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    seed: int,
    micro_batch_size: int | None = None,
) -> Estimates:
    """Estimate the diagonal for a module of any kind, for `Sophia.update_hessian`.

    The gradients that are in `.grad` and the modules' modes stay as they are, so that it does not matter
    where in the loop this is called. Under mixed precision call it inside `autocast`, as the model. In a loop
    with several processes give it the module without its DDP wrapper, and average the estimates over the
    processes.

    Args:
        estimator: its `interval` and `batch_size` are the caller's business here.
        model: called as `model(inputs)`; returns logits (B, T, V) or (B, V), or something with `.logits`.
        inputs: (B, ...) of any type.
        targets: (B, T) or (B,) int64; -1 marks what does not count. GNB looks at nothing else of them.
        seed: of the labels or probes: another one for each refresh, such as the step.
        micro_batch_size: sequences of one pass; None sends all at once.

    Returns:
        The estimate for each parameter that is trained.
    """
    rows = targets if targets.ndim > 1 else targets[:, None]
    replica = Replica(LossOnLogits(model), micro_batch_size or len(inputs))
    batch = Batch(inputs, rows, list(range(len(inputs))))
    if estimator.reads_training_gradient:
        return estimator.estimate(replica, batch, seed)
    gradients = [(p, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.zero_grad(set_to_none=True)
    try:
        return estimator.estimate(replica, batch, seed)
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:  # each its own: a caller may have frozen some in evaluation mode
            module.training = training


def attach(optimizer: Optimizer, estimator: Estimator, *, tokens: int) -> RemovableHandle:
    """Refresh the Hessian inside `optimizer.step()`, from the gradient that the step is about to use.

    Afterwards the loop is that of any optimizer. The gradient is taken as it then is: after
    `clip_grad_norm_` the clipped one, after `GradScaler.unscale_` (or in `GradScaler.step`) the unscaled one.
    When h is due is read off the optimizer's state, so that a loaded `state_dict` goes on in step.

    Args:
        optimizer: a `Sophia`, or another that has `update_hessian`.
        estimator: one that reads the training gradient: `EmpiricalFisher`, `GradientMagnitude`.
        tokens: target tokens that a gradient is the mean over: the B of B g*g, all accumulated micro-batches
            and processes together.

    Returns:
        A handle whose `remove()` undoes this.

    Raises:
        ValueError: the estimator needs a pass of its own, or the optimizer takes no Hessian.
    """
    if not isinstance(estimator, TrainingGradientEstimator):
        raise ValueError(
            f"{type(estimator).__name__} needs a pass of its own; "
            "call optimizer.update_hessian(estimate(...)) every few steps instead"
        )
    if not hasattr(optimizer, "update_hessian"):
        raise ValueError(
            f"{type(estimator).__name__} estimates a Hessian, but {type(optimizer).__name__} takes none"
        )

    def before_step(optimizer: Any, *_: Any) -> None:
        steps = (int(state["step"]) for state in optimizer.state.values() if "step" in state)
        if estimator.due(max(steps, default=0)):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            gradients = {p: p.grad for p in parameters if p.grad is not None}
            estimates = estimator.from_gradients(list(gradients.values()), tokens)
            optimizer.update_hessian(dict(zip(gradients, estimates, strict=True)))

    return optimizer.register_step_pre_hook(before_step)


class LossOnLogits(nn.Module):
    """A module that returns logits, called as our models are: `model(inputs, targets, loss_fn=...)`."""

    def __init__(self, logits_of: nn.Module) -> None:
        super().__init__()
        self.logits_of = logits_of

    def forward(self, inputs: Tensor, targets: Tensor, loss_fn: LossFunction) -> Tensor:
        """Apply a loss, summed over targets, to the logits."""
        output = self.logits_of(inputs)
        logits = getattr(output, "logits", output)
        if logits.ndim == 2:  # (B, V): one prediction a row
            logits = logits[:, None]
        return loss_fn(logits, _leave, targets)


def _leave(logits: Tensor) -> Tensor:
    """The head of a module whose last hidden states are its logits."""
    return logits
