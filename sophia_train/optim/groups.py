"""Which parameters are decayed."""

from typing import Any

from torch import nn


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the parameters into one group with weight decay and one without.

    Decayed are the matrices of linear maps; embeddings (the tied head with them), norms and biases are not,
    as in the official Sophia repository (`model.py: configure_optimizers`).

    Returns:
        Two groups for an optimizer; the second sets `weight_decay` to 0.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    chosen = {id(p) for p in decayed}
    rest = [p for p in trained if id(p) not in chosen]
    return [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
