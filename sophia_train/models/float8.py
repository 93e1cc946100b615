"""Matrix products of the blocks in float8, by torchao."""

import torch

from sophia_train.errors import ConfigError, UnavailableError
from sophia_train.models.gpt2 import GPT2

MULTIPLE = 16  # float8 products want shapes that are multiples of it


def use_float8(model: GPT2, device: torch.device) -> None:
    """Replace the linear maps of the blocks by ones whose three products, backward too, are in float8.

    Inputs, weights and gradients are scaled tensor by tensor, anew each time. Weights stay float32 parameters
    of the same names; embeddings, head and norms are left alone.

    Args:
        model: changed in place, before it is compiled.
        device: where it will run. Without a GPU the rounding is emulated, at no gain.

    Raises:
        ConfigError: the card has no float8, or the model's width does not fit it.
        UnavailableError: torchao is not installed.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        card = torch.cuda.get_device_name(device)
        raise ConfigError(f"precision=fp8, but {card} has no float8; use precision=bf16")
    if model.config.n_embd % MULTIPLE:
        raise ConfigError(
            f"precision=fp8 needs a width that is a multiple of {MULTIPLE}, not model.n_embd="
            f"{model.config.n_embd}; use precision=bf16"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UnavailableError("precision=fp8 needs torchao; pip install 'sophia_train[fp8]'") from None
    config = Float8LinearConfig(emulate=device.type != "cuda")
    convert_to_float8_training(model.transformer.h, config=config)
