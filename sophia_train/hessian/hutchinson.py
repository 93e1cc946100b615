"""Hutchinson's estimator (Sophia, Alg. 1)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia_train.data.batches import Batch
from sophia_train.gradients import count_targets, evaluation_mode, micro_batches
from sophia_train.hessian.base import Estimates, Estimator, Replica
from sophia_train.models.gpt2 import keeping_activations
from sophia_train.models.losses import cross_entropy
from sophia_train.seeds import derive

Named = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Hutchinson(Estimator):
    """Diagonal of the Hessian from a random probe u: u * (H u) (Alg. 1, line 3).

    E[u u'] = 1, so the mean over probes is the diagonal. Entries can be negative, for the Hessian of a
    network is not positive; Sophia gives such coordinates a signed step.

    H u is the derivative of the gradient along u (forward over reverse, Pearlmutter 1994): one pass that
    carries a tangent with every tensor, instead of a backward pass through a backward pass. No fast attention
    kernel can do either, so that attention is the plain formula here, and memory grows with the square of the
    context. On a GPU that pass is compiled, by itself: a compiled model cannot be differentiated twice. It
    keeps all activations, whatever `activation_checkpointing` says: a tangent cannot pass what is recomputed.

    Attributes:
        probe: "gaussian", the paper's, or "rademacher" (+1 and -1), whose variance is lower: it has no error
            where the Hessian is diagonal.
        micro_batch_size: sequences of one pass on one process; the estimate does not depend on it.
    """

    probe: Literal["gaussian", "rademacher"] = "gaussian"
    micro_batch_size: int = 8

    passes: ClassVar[float] = 2.0  # every product of a forward and backward pass, and its tangent's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} must be at least 1")
        if self.probe not in ("gaussian", "rademacher"):
            raise ValueError(f"probe={self.probe} must be gaussian or rademacher")

    @property
    def reduces_itself(self) -> bool:
        """True: products with the Hessian are reduced; see `Estimator.reduces_itself`."""
        return True

    def estimate(self, replica: Replica, batch: Batch, seed: int) -> Estimates:
        """Estimate the Hessian's diagonal of the mean loss; see `Estimator.estimate`."""
        model = replica.unwrapped
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        probes = {
            name: self._probe(p, derive(seed, "probe", index))
            for index, (name, p) in enumerate(parameters.items())
        }
        weights = {name: p.detach() for name, p in parameters.items()}
        product = compiled_product() if batch.inputs.is_cuda else hessian_product
        module = _Uncompiled(model)  # not made by what is compiled: its graph would break
        total: list[Tensor] = []
        with (
            evaluation_mode(model),
            keeping_activations(model),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            for part in micro_batches(batch.inputs, batch.targets, self.micro_batch_size):
                with replica.autocast():
                    terms = list(product(module, weights, probes, part.inputs, part.targets).values())
                if total:
                    torch._foreach_add_(total, terms)
                else:
                    total = terms
        tokens = count_targets(batch.targets)
        replica.sum_over_processes([*total, tokens])
        torch._foreach_mul_(total, list(probes.values()))
        torch._foreach_div_(total, tokens.to(total[0].dtype))
        return dict(zip(parameters.values(), total, strict=True))

    def _probe(self, parameter: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(parameter.device).manual_seed(seed)
        probe = torch.empty_like(parameter)
        if self.probe == "gaussian":
            return probe.normal_(generator=generator)
        return probe.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


class _Uncompiled(nn.Module):
    """Calls a model's `forward` itself, and not what `compile` has put in its place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
        loss: Tensor = self.model.forward(inputs, targets, loss_fn=loss_fn)
        return loss


def hessian_product(
    module: nn.Module, weights: Named, probes: Named, inputs: Tensor, targets: Tensor
) -> Named:
    """H u for the Hessian H of the loss summed over targets; by parameter names."""
    # in one chunk: a chunk whose logits are recomputed cannot carry a tangent
    whole = functools.partial(cross_entropy, chunk_tokens=targets.numel())

    def loss(weights: Named) -> Tensor:
        named = {f"model.{name}": weight for name, weight in weights.items()}
        value: Tensor = functional_call(module, named, (inputs, targets, whole))
        return value

    products: Named = jvp(grad(loss), (weights,), (probes,))[1]
    return products


@functools.cache
def compiled_product(**options: Any) -> Callable[..., Named]:
    """Return `hessian_product`, compiled once for all models."""
    return torch.compile(hessian_product, dynamic=False, **options)
