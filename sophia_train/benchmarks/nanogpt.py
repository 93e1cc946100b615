"""nanoGPT (github.com/karpathy/nanoGPT), trained from a checkout of it as its `train.py` does."""

import contextlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sophia_train.benchmarks import checkouts
from sophia_train.config import RunConfig
from sophia_train.trainer import Trainer

NAME = "nanoGPT, AdamW"
# Its vocabulary is a multiple of 64 already, and all its words are predicted. It decays embeddings, which we
# do not: with no decay, losses can agree, and the work is the same.
OVERRIDES = ["model.vocab_size=50304"]
ADAMW_OVERRIDES = ["optimizer.weight_decay=0"]


def load(checkout: Path) -> ModuleType:
    """Import its `model.py`.

    Raises:
        MissingInputError: there is none.
        ConfigError: it is another project's.
    """
    return checkouts.load("--nanogpt", checkout, "model.py", "karpathy/nanoGPT", "GPT", "GPTConfig")


def model_of(nanogpt: ModuleType, config: RunConfig, trainer: Trainer) -> nn.Module:
    """Build its model with the sizes and the weights of ours; the names of the weights are the same."""
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
    settings = nanogpt.GPTConfig(**{size: getattr(config.model, size) for size in sizes})
    with trainer.device, contextlib.redirect_stdout(sys.stderr):  # it prints its size
        model: nn.Module = nanogpt.GPT(settings)
    weights = dict(trainer.unwrapped.named_parameters())
    model.load_state_dict({**weights, "lm_head.weight": trainer.unwrapped.head_weight})
    return model


def optimizer_of(model: Any, settings: dict[str, Any], device_type: str) -> Optimizer:
    """Build its optimizer for its model, with the settings of our AdamW; on CUDA it takes the fused one."""
    with contextlib.redirect_stdout(sys.stderr):
        optimizer: Optimizer = model.configure_optimizers(
            settings["weight_decay"], settings["lr"], tuple(settings["betas"]), device_type
        )
    return optimizer


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a micro-batch, (b, T) int64 words and the next ones, both contiguous."""
    loss: Tensor = model(inputs, targets)[1]
    return loss
