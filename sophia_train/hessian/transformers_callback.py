"""Sophia in Hugging Face's `Trainer`: a callback that refreshes the Hessian."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from sophia_train.collectives import sum_over_processes
from sophia_train.gradients import count_targets
from sophia_train.hessian.base import Estimates, Estimator, NoHessian, TrainingGradientEstimator
from sophia_train.hessian.other_loops import estimate
from sophia_train.seeds import derive

_LOSS_ONLY = ("labels", "shift_labels", "num_items_in_batch")  # arguments that do not change the logits


class SophiaCallback(TrainerCallback):
    """Refreshes the Hessian of an optimizer like `Sophia` while `transformers.Trainer` trains a causal LM.

    Hand it to `Trainer(..., optimizers=(Sophia(model.parameters()), None), callbacks=[...])`. An estimator
    with a pass of its own sees the last micro-batch of the step, on every process its own; the estimates are
    averaged over processes. It runs the model as the Trainer does, mixed precision included. With fp16, whose
    gradients underflow if they are not scaled, prefer one that reads the training gradient: those take
    `.grad` as it is before the update, accumulated, unscaled, and after `max_grad_norm`, so that h is lowered
    by the square of the factor of a clipped step (its first power, for `GradientMagnitude`).

    Args:
        estimator: what to estimate, and every how many updates. `batch_size` takes the first so many
            sequences of each process's micro-batch, or as many as there are.
        seed: of labels and probes; each update has its own, so that a resumed run goes on in step.
    """

    def __init__(self, estimator: Estimator, seed: int = 0) -> None:
        self.estimator = estimator
        self.seed = seed
        self._hook: RemovableHandle | None = None
        self._seen: tuple[dict[str, Any], Tensor] | None = None
        self._tokens: int | Tensor = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the Trainer, and begin to look at the model's inputs.

        Raises:
            ValueError: the optimizer takes no Hessian, or the Trainer does what no estimate can follow.
        """
        name = type(self.estimator).__name__
        optimizer = _unwrapped(kwargs["optimizer"])
        if isinstance(self.estimator, NoHessian):
            return
        if not hasattr(optimizer, "update_hessian"):
            raise ValueError(f"{name} estimates a Hessian, but {type(optimizer).__name__} takes none")
        loss_type = getattr(kwargs["model"], "loss_type", None)
        if loss_type not in (None, "ForCausalLM"):  # None is that of causal language models, too
            raise ValueError(f"SophiaCallback is for causal language models; this one's loss is {loss_type}")
        if args.n_gpu > 1 or getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise ValueError(
                "SophiaCallback needs the whole model in each process: launch with torchrun, and without "
                "DataParallel, DeepSpeed and FSDP"
            )
        if args.fp16 and not args.max_grad_norm and self.estimator.reads_training_gradient:
            raise ValueError(
                f"{name} reads gradients, which with fp16 and without max_grad_norm are still scaled; "
                "set max_grad_norm (as high as you like), or use bf16"
            )
        self._forget()
        self._hook = kwargs["model"].register_forward_pre_hook(self._look, with_kwargs=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refresh h, if that is due, ahead of the update."""
        (seen, self._seen), (tokens, self._tokens) = (self._seen, None), (self._tokens, 0)
        if not self.estimator.due(state.global_step):
            return
        if seen is None:
            raise RuntimeError(
                "SophiaCallback has not seen the model's inputs: the model was not called itself"
            )
        if isinstance(self.estimator, TrainingGradientEstimator):
            estimates = self._of_gradients(self.estimator, kwargs["model"], torch.as_tensor(tokens))
        else:
            device = seen[1].device.type
            with torch.autocast(
                device, torch.float16 if args.fp16 else torch.bfloat16, args.fp16 or args.bf16
            ):
                estimates = self._of_micro_batch(kwargs["model"], *seen, step=state.global_step)
        _unwrapped(kwargs["optimizer"]).update_hessian(estimates)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self._forget()

    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of a training step's forward pass, and count its targets."""
        if not model.training:  # an evaluation, or a pass of the estimator
            return
        inputs = {"input_ids": args[0], **kwargs} if args else dict(kwargs)
        ids, labels = inputs.get("input_ids"), inputs.get("labels")
        shifted = inputs.get("shift_labels")
        if shifted is None and labels is not None:
            shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        if ids is None or shifted is None:
            raise ValueError(
                "SophiaCallback reads input_ids and labels, with which the Trainer did not call the model; "
                "have the collator make labels, and use neither label smoothing nor compute_loss_func"
            )
        if shifted.shape != ids.shape:
            raise ValueError(
                f"labels {tuple(shifted.shape)} are not one for each of the input_ids {tuple(ids.shape)}"
            )
        targets = shifted.masked_fill(shifted < 0, -1)
        self._seen = {key: value for key, value in inputs.items() if key not in _LOSS_ONLY}, targets
        self._tokens = self._tokens + count_targets(targets)

    def _of_gradients(
        self, estimator: TrainingGradientEstimator, model: nn.Module, tokens: Tensor
    ) -> Estimates:
        sum_over_processes([tokens])
        gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
        estimates = estimator.from_gradients(list(gradients.values()), tokens)
        return dict(zip(gradients, estimates, strict=True))

    def _of_micro_batch(
        self, model: nn.Module, inputs: dict[str, Any], targets: Tensor, step: int
    ) -> Estimates:
        targets = targets[: self.estimator.batch_size]
        rows = torch.arange(len(targets), device=targets.device)
        processes = torch.distributed.is_initialized()
        seed = derive(self.seed, "hessian", step, torch.distributed.get_rank() if processes else 0)
        estimates = estimate(self.estimator, LogitsOfRows(model, inputs), rows, targets, seed=seed)
        if processes:  # the mean over all tokens: each process weighs as much as it has of them
            tokens = count_targets(targets)
            all_tokens = tokens.clone()
            sum_over_processes([all_tokens])
            torch._foreach_mul_(list(estimates.values()), tokens / all_tokens)
            sum_over_processes(list(estimates.values()))
        return estimates

    def _forget(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._seen, self._tokens = None, None, 0


class LogitsOfRows(nn.Module):
    """A model of transformers as a module of one tensor: the numbers of rows of a remembered batch."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, rows: Tensor) -> Tensor:
        """Return the logits (rows, T, V)."""
        size = len(self.inputs["input_ids"])
        chosen = {
            name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == size else value
            for name, value in self.inputs.items()
        }
        logits: Tensor = self.model(**{**chosen, "use_cache": False, "return_dict": True}).logits
        return logits


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
