"""Several optimizers for the parameters of one model, as one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


class MixedOptimizer(Optimizer):
    """Steps several optimizers, each over parameters of its own, as one optimizer.

    Its groups are theirs, the same objects, so that a learning-rate schedule reaches all of them; its state
    is one dictionary that they share, so that one `state_dict`, and one checkpoint, has it all. What only
    some of them can do (`update_hessian`, `unclipped_fraction`, `eval` and `train`), it can do if one can.

    Args:
        optimizers: over disjoint parameters.

    Raises:
        ValueError: there is none, or a parameter has two.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        for optimizer in self.optimizers:
            self.state.update(optimizer.state)
        self.param_groups = groups
        self._share()
        if self._able("update_hessian"):
            self.update_hessian = self._update_hessian
        if self._able("unclipped_fraction"):
            self.unclipped_fraction = self._unclipped_fraction
        if self._able("eval") and self._able("train"):
            self.eval = lambda: self._each("eval")
            self.train = lambda: self._each("train")

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step each optimizer.

        Args:
            closure: evaluates the model again and returns the loss; called once, ahead of the first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state, and share it out again: torch has made new dictionaries of it."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state

    def _able(self, name: str) -> list[Optimizer]:
        return [optimizer for optimizer in self.optimizers if hasattr(optimizer, name)]

    def _each(self, name: str) -> None:
        for optimizer in self._able(name):
            getattr(optimizer, name)()

    def _update_hessian(self, estimates: Mapping[Tensor, Tensor]) -> Tensor:
        """Hand all estimates to each that takes them, so that they agree on dropping them."""
        takers: list[Any] = self._able("update_hessian")
        return torch.stack([taker.update_hessian(estimates) for taker in takers]).all()

    def _unclipped_fraction(self, params: Iterable[Tensor] | None = None) -> Tensor:
        wanted = None if params is None else set(params)
        fractions, sizes = [], []
        for taker in self._able("unclipped_fraction"):
            own = [
                p for group in taker.param_groups for p in group["params"] if wanted is None or p in wanted
            ]
            if own:
                sizes.append(sum(p.numel() for p in own))
                fractions.append(taker.unclipped_fraction(own) * sizes[-1])  # type: ignore[attr-defined]
        return torch.stack(fractions).sum() / sum(sizes) if sizes else torch.tensor(float("nan"))
