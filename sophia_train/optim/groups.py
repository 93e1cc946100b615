"""Which parameters are whose: which optimizer steps them, and whether they are decayed."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

Named = dict[str, nn.Parameter]

KINDS = ("embeddings", "head", "matrices", "norms", "biases", "vectors")
"""Kinds of parameters that `choose` knows, beside patterns of names."""


def decay_groups(model: nn.Module, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Split parameters into one group with weight decay and one without.

    Decayed are the matrices of linear maps; embeddings (the tied head with them), norms and biases are not,
    as in the official Sophia repository (`model.py: configure_optimizers`).

    Args:
        model: whose parameters.
        names: of those to split; None takes all that are trained.

    Returns:
        Groups for an optimizer, none of them empty; the second sets `weight_decay` to 0.
    """
    trained = _trained(model)
    matrices = _by_kind(model)["matrices"]
    chosen = list(trained if names is None else names)
    decayed = [trained[name] for name in chosen if name in matrices]
    rest = [trained[name] for name in chosen if name not in matrices]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def choose(model: nn.Module, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Share the trained parameters out.

    Args:
        model: whose parameters.
        wanted: for each taker, what it takes: kinds, or patterns of names such as `transformer.h.0.*`.
            Kinds are `embeddings` (a tied head with them), `head` (the map to logits: for a tied model the
            word embedding), `matrices` (with two or more dimensions and not an embedding or head), `norms`,
            `biases`, `vectors` (norms and biases).

    Returns:
        Names for each taker, in the model's order; what nobody wants is under "".

    Raises:
        ValueError: a word fits no parameter, or two takers want the same one.
    """
    trained, kinds = _trained(model), _by_kind(model)
    owner: dict[str, str] = {}
    for taker, words in wanted.items():
        for word in words:
            found = kinds[word] if word in kinds else set(fnmatch.filter(trained, word))
            if not found:
                raise ValueError(f"{word} is no parameter of the model; kinds are {', '.join(KINDS)}")
            for name in found:
                if owner.setdefault(name, taker) != taker:
                    raise ValueError(f"{word} takes {name}, which {owner[name]} has already")
    takers = ["", *wanted]
    return {taker: [name for name in trained if owner.get(name, "") == taker] for taker in takers}


def _trained(model: nn.Module) -> Named:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _by_kind(model: nn.Module) -> dict[str, set[str]]:
    embedding_ids = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head_id = id(getattr(model, "head_weight", None))
    trained = _trained(model)
    kinds: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for name, parameter in trained.items():
        if id(parameter) == head_id:
            kinds["head"].add(name)
        if id(parameter) in embedding_ids:
            kinds["embeddings"].add(name)
        elif parameter.ndim >= 2 and id(parameter) != head_id:
            kinds["matrices"].add(name)
        elif parameter.ndim < 2:
            kinds["vectors"].add(name)
            kinds["biases" if name.endswith("bias") else "norms"].add(name)
    return kinds
