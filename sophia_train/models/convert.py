"""To and from Hugging Face's `GPT2LMHeadModel`: parameters, configuration, and folders of both.

The parameter names are the same. Hugging Face's linear maps (`Conv1D`) are stored [in, out] and ours
[out, in]; ours has padding rows below the word embedding, theirs has none; theirs always has biases, zero
where ours has none. All conversions are exact.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sophia_train import durable
from sophia_train.errors import ConfigError, DataError, MissingInputError
from sophia_train.models.gpt2 import GPT2, GPT2Config

WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"
CONFIG = "config.json"
NO_BIAS = "sophia_train_bias"
"""Key of an exported `config.json`: false where all biases are zero because the model has none."""

GPT2_VOCABULARY, GPT2_END_OF_TEXT = 50257, 50256

EMBEDDING = "transformer.wte.weight"
_TRANSPOSED = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
_MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")  # constants that old folders hold beside the parameters

_DEFAULTS = {  # what Hugging Face assumes where config.json is silent
    "model_type": None,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_positions": 1024,
    "vocab_size": GPT2_VOCABULARY,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    NO_BIAS: True,
}


def to_hf_state(state: GPT2 | Mapping[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    """Return a model's parameters as `GPT2LMHeadModel` names and shapes them, on the CPU.

    Args:
        state: a `GPT2` or its state dict.
        config: its configuration.

    Raises:
        DataError: a tensor is missing, too many, or of another shape.
    """
    ours = state.state_dict() if isinstance(state, GPT2) else state
    _check_shapes(ours, _shapes(config), "the model")
    theirs = {}
    for name, shape in _shapes(replace(config, bias=True)).items():
        tensor = (
            ours[name].detach().cpu() if name in ours else torch.zeros(shape, dtype=ours[EMBEDDING].dtype)
        )
        if name == EMBEDDING:
            tensor = tensor[: config.vocab_size]
        elif _TRANSPOSED.search(name):
            tensor = tensor.T
        theirs[name] = tensor.contiguous()
    return theirs


def from_hf_state(state: Mapping[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    """Return the parameters of a `GPT2LMHeadModel`, or of the `GPT2Model` in it, as ours.

    Args:
        state: its state dict.
        config: the configuration that `config_from_hf` gives.

    Raises:
        ConfigError: the output weights are not the embedding, or biases are not zero where `config` has none.
        DataError: a tensor is missing, too many, or of another shape.
    """
    theirs = {_full_name(name): tensor for name, tensor in state.items() if not _MASKS.search(name)}
    head = theirs.pop("lm_head.weight", None)
    if EMBEDDING not in theirs and head is not None:
        theirs[EMBEDDING] = head  # tied, and stored under the other name
    elif head is not None and not torch.equal(head, theirs[EMBEDDING]):
        raise ConfigError(
            "lm_head.weight differs from transformer.wte.weight: only tied embeddings are supported"
        )
    _check_shapes(theirs, _hf_shapes(config), "the Hugging Face model")
    ours = {}
    for name in _shapes(config):
        tensor = theirs.pop(name)
        if name == EMBEDDING:
            padding = tensor.new_zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)
            tensor = torch.cat([tensor, padding])
        elif _TRANSPOSED.search(name):
            tensor = tensor.T
        ours[name] = tensor.contiguous()
    for name, tensor in theirs.items():  # what is left are the biases of a model without
        if tensor.any():
            raise ConfigError(
                f'{name} is not zero, but {CONFIG} says "{NO_BIAS}": false; remove that key to keep biases'
            )
    return ours


def hf_config(config: GPT2Config) -> dict[str, Any]:
    """Return the `config.json` of the same model in Hugging Face's words."""
    end = GPT2_END_OF_TEXT if config.vocab_size == GPT2_VOCABULARY else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        NO_BIAS: config.bias,
    }


def config_from_hf(content: Mapping[str, Any]) -> GPT2Config:
    """Return our configuration of the model that a Hugging Face `config.json` describes.

    Raises:
        ConfigError: it is not a GPT-2, or a variant that the model cannot express; names the key.
    """
    read = {key: content.get(key, default) for key, default in _DEFAULTS.items()}
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if type(read[key]) is not int:
            raise ConfigError(f"{CONFIG}: {key}={json.dumps(read[key])} is not an integer")
    supported: dict[str, tuple[Any, ...]] = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "n_inner": (None, 4 * read["n_embd"]),
        "attn_pdrop": (read["resid_pdrop"],),
        "embd_pdrop": (read["resid_pdrop"],),
        "scale_attn_by_inverse_layer_idx": (False, True),
        NO_BIAS: (False, True),
    }
    for key, values in supported.items():
        if read[key] not in values:
            wanted = " or ".join(json.dumps(value) for value in values)
            raise ConfigError(
                f"{CONFIG}: {key}={json.dumps(read[key])} is not supported; it must be {wanted}"
            )
    try:
        return GPT2Config(
            n_layer=read["n_layer"],
            n_head=read["n_head"],
            n_embd=read["n_embd"],
            block_size=read["n_positions"],
            vocab_size=read["vocab_size"],
            bias=read[NO_BIAS],
            dropout=float(read["resid_pdrop"]),
            scale_attn_by_inverse_layer_idx=read["scale_attn_by_inverse_layer_idx"],
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{CONFIG}: {error}") from error


def export_folder(state: GPT2 | Mapping[str, Tensor], path: Path, config: GPT2Config | None = None) -> None:
    """Write a folder that `GPT2LMHeadModel.from_pretrained` and `load_folder` read, all or nothing.

    Args:
        state: a `GPT2`, or a state dict with `config`.
        path: a folder that does not exist yet.
        config: the configuration of a state dict.

    Raises:
        DataError: the state does not fit the configuration.
        OSError: writing failed, FileExistsError where `path` exists; nothing is left of it.
    """
    if config is None:
        if not isinstance(state, GPT2):
            raise TypeError("a state dict needs its config")
        config = state.config
    tensors = to_hf_state(state, config)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with durable.commit_folder(path, reserve=size) as folder:
        durable.write_json(folder / CONFIG, hf_config(config))
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path / WEIGHTS}: {error}") from error


def load_folder(path: Path) -> tuple[GPT2Config, dict[str, Tensor]]:
    """Read a Hugging Face GPT-2 folder, in one file or in shards; only safetensors, so that no code runs.

    Returns:
        The configuration, and the state dict for `GPT2(configuration)` in the stored precision.

    Raises:
        MissingInputError: the folder, its config.json or its safetensors are not there.
        ConfigError: the model is not one that ours can express.
        DataError: a file is damaged, or the tensors do not fit the configuration.
    """
    content = _read_json(path / CONFIG)
    config = config_from_hf(content)
    state: dict[str, Tensor] = {}
    for file_path in _weight_files(path):
        try:
            with safe_open(file_path, framework="pt") as file:
                state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise MissingInputError(f"{file_path} is missing; copy the folder again") from error
        except SafetensorError as error:
            raise DataError(f"{file_path} is damaged ({error}); copy the folder again") from error
    return config, from_hf_state(state, config)


def describe(config: GPT2Config) -> str:
    """Return the size of a model in a few words."""
    shapes = _shapes(config)
    shapes[EMBEDDING] = (config.vocab_size, config.n_embd)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    biases = "with" if config.bias else "without"
    return (
        f"GPT-2 {biases} biases, {parameters:,} parameters, {config.n_layer} layers, {config.n_head} heads, "
        f"width {config.n_embd}, {config.block_size} positions, {config.vocab_size:,} words"
    )


def _shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in GPT2(config).named_parameters()}


def _hf_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    shapes = _shapes(replace(config, bias=True))
    shapes[EMBEDDING] = (config.vocab_size, config.n_embd)
    return {name: shape[::-1] if _TRANSPOSED.search(name) else shape for name, shape in shapes.items()}


def _full_name(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _check_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    for name, shape in shapes.items():
        if name not in state:
            raise DataError(f"{what} has no {name}: it does not belong to its configuration")
        if tuple(state[name].shape) != shape:
            raise DataError(
                f"{what}: {name} has shape {list(state[name].shape)}, its configuration {list(shape)}"
            )
    if unknown := sorted(state.keys() - shapes.keys()):
        raise DataError(f"{what} has {unknown[0]}, which a GPT-2 has not; {len(unknown)} such tensors")


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    if (path / SHARDS).exists():
        names = sorted(set(_read_json(path / SHARDS).get("weight_map", {}).values()))
        if not names or any(Path(name).name != name for name in names):
            raise DataError(f"{path / SHARDS} names no files of this folder; copy the folder again")
        return [path / name for name in names]
    if pickled := sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]):
        raise MissingInputError(
            f"{pickled[0]} is a pickle, which can run code when read; save it again with transformers' "
            "save_pretrained(FOLDER), which writes model.safetensors"
        )
    raise MissingInputError(f"{path} has no {WEIGHTS}; give a folder that save_pretrained wrote")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingInputError(f"{path} is missing; give a Hugging Face GPT-2 folder") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); copy the folder again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object; copy the folder again")
    return content
