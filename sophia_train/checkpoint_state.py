"""The state of an optimizer as JSON and tensors with names, and back: what a checkpoint keeps of it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from sophia_train.checkpoint_files import SavedTensors
from sophia_train.optim import shards

_TENSOR, _ORDER = "__tensor__", "__order__"


def state_of(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take the state of an optimizer of a model apart.

    Returns:
        JSON, with parameters under their names, and the tensors that it names.

    Raises:
        TypeError: the state holds what a checkpoint cannot.
    """
    tensors: dict[str, Tensor] = {}
    return _flatten(_state_by_name(model, optimizer), "", tensors), tensors


def load_state(
    model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any], tensors: SavedTensors
) -> None:
    """Take up what `state_of` returned; parameters that had no state, as without a gradient, have none then.

    Raises:
        KeyError, ValueError, TypeError: it is of other parameters or another optimizer.
    """
    current = _state_by_name(model, optimizer)["param_groups"]
    numbers = {name: n for n, name in enumerate(name for group in current for name in group["params"])}
    if [g["params"] for g in saved["param_groups"]] != [g["params"] for g in current]:
        raise ValueError("its parameter groups differ")
    parameters = dict(model.named_parameters())
    states = {name: _unflatten(state, tensors, parameters[name]) for name, state in saved["state"].items()}
    groups = [
        {**_unflatten(g, tensors), "params": [numbers[name] for name in g["params"]]}
        for g in saved["param_groups"]
    ]
    numbered = {numbers[name]: state for name, state in states.items()}
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})
    for name, state in states.items():  # torch has cast it all to the type of the parameter
        parameter = parameters[name]
        optimizer.state[parameter] = _as_saved(state, optimizer.state[parameter])


def _state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """State dict of an optimizer with parameters under their names instead of numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()
    groups = [{**g, "params": [order[number] for number in g["params"]]} for g in state["param_groups"]]
    states = {order[number]: s for number, s in state["state"].items() if s}  # reading one may make it, empty
    return {"state": states, "param_groups": groups}


def _as_saved(saved: Any, loaded: Any) -> Any:
    """What was saved, on the devices to which torch has loaded it."""
    if isinstance(saved, Tensor):
        return saved.to(loaded.device)
    if isinstance(saved, dict):
        return {key: _as_saved(value, loaded[key]) for key, value in saved.items()}
    if isinstance(saved, list):
        return [_as_saved(*pair) for pair in zip(saved, loaded, strict=True)]
    return saved


def _flatten(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Turn nested state into JSON, moving its tensors into `tensors` under their paths."""
    if isinstance(tree, Tensor):
        tensors[prefix] = tree
        return {_TENSOR: prefix} | ({} if tree.is_contiguous() else {_ORDER: _memory_order(tree)})
    if isinstance(tree, dict):
        return {
            key: _flatten(value, f"{prefix}/{key}" if prefix else str(key), tensors)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [_flatten(value, f"{prefix}/{index}", tensors) for index, value in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"optimizer state {prefix} is a {type(tree).__name__}, which a checkpoint cannot hold")


def _unflatten(tree: Any, tensors: SavedTensors, parameter: Tensor | None = None) -> Any:
    """Undo `_flatten`; what is shaped as a sharded parameter is sharded like it."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            saved = tensors[tree[_TENSOR]]
            if isinstance(parameter, DTensor) and saved.shape == parameter.shape:
                return shards.sharded_like(parameter, saved[shards.rows_of(parameter)])
            return _laid_out(saved[:], tree.get(_ORDER))
        return {key: _unflatten(value, tensors, parameter) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_unflatten(value, tensors, parameter) for value in tree]
    return tree


def _memory_order(tensor: Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest in memory, where a file has them in their own order."""
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda dimension: -strides[dimension])


def _laid_out(tensor: Tensor, order: list[int] | None) -> Tensor:
    """Lay a tensor out as it was: products of matrices round differently for another layout."""
    if order is None:
        return tensor
    return tensor.permute(order).contiguous().permute([order.index(each) for each in range(tensor.ndim)])
