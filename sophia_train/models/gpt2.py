"""GPT-2 (Radford et al., 2019), with the parameter names of Hugging Face's `GPT2LMHeadModel`.

Shapes: B sequences, T positions, C width, H heads, V words.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sophia_train.models.losses import Head, cross_entropy
from sophia_train.seeds import derive

LossFunction = Callable[[Tensor, Head, Tensor], Tensor]

VOCABULARY_MULTIPLE = 64  # rows of the embedding are padded to this: matrix units want aligned shapes


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Sizes and variants of a GPT-2; the defaults are the 125M model without biases."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 50257
    bias: bool = False
    dropout: float = 0.0
    scale_attn_by_inverse_layer_idx: bool = False

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            multiple = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise ValueError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; use n_embd={multiple}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up; the rows above it are never read nor trained."""
        return math.ceil(self.vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class SelfAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.scale = (config.n_embd // config.n_head) ** -0.5
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, C / H)
            for part in self.c_attn(x).split(C, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=self.scale)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear maps with a tanh-approximated GELU between them."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = self.c_proj(gelu(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU: x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3).

    That is x sigmoid(2 u), for which a compiler writes fewer instructions than for a tanh.
    """
    if torch.compiler.is_compiling():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as `F.gelu` computes it inside
        return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Embeddings, blocks and the last norm: word ids to hidden states.

    Attributes:
        recompute_blocks: keep only the input of each block, and run the block again in the backward pass,
            with the same dropout: less memory for a third more FLOPs, and the same gradients.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.dropout = config.dropout
        self.recompute_blocks = False

    def forward(self, idx: Tensor) -> Tensor:
        """Map (B, T) word ids to (B, T, C)."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        if torch.is_autocast_enabled(x.device.type):  # half the memory and time of the residual stream
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.h:
            x = self._recomputed(block, x) if self.recompute_blocks and torch.is_grad_enabled() else block(x)
        return self.ln_f(x)

    def _recomputed(self, block: nn.Module, x: Tensor) -> Tensor:
        replay_dropout = self.training and self.dropout > 0
        y: Tensor = checkpoint(block, x, use_reentrant=False, preserve_rng_state=replay_dropout)
        return y


@contextlib.contextmanager
def keeping_activations(model: nn.Module) -> Iterator[None]:
    """Let no block of a model be recomputed during the body: what is, cannot carry a tangent."""
    recomputing = [
        each for each in model.modules() if isinstance(each, Transformer) and each.recompute_blocks
    ]
    for transformer in recomputing:
        transformer.recompute_blocks = False
    try:
        yield
    finally:
        for transformer in recomputing:
            transformer.recompute_blocks = True


class GPT2(nn.Module):
    """GPT-2 with tied input and output embeddings.

    Built with whatever memory the current device gives (`meta` included); `initialize` draws the weights.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw the weights: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 n_layer)), biases 0, norms 1.

        Each tensor is drawn on the CPU from a seed made of `seed` and its name, so that the weights do not
        depend on the device, the process, or the order of the parameters.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            generator = torch.Generator().manual_seed(derive(seed, "initial weights", name))
            std = residual_std if name.endswith("c_proj.weight") else 0.02
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, loss_fn: LossFunction | None = None
    ) -> Tensor:
        """Predict the next word at every position, or apply a loss to the prediction.

        Args:
            idx: (B, T) int64 word ids, T at most `block_size`.
            targets: (B, T) int64 ids of the next words, -1 where there is none; or whatever `loss_fn` takes.
            loss_fn: called as `loss_fn(hidden, head, targets)` with the last hidden states (B, T, C) and the
                map from hidden states to logits; GNB is this forward with another loss.

        Returns:
            Logits (B, T, V) without targets; the mean cross-entropy in nats with targets only; otherwise what
            `loss_fn` returns.
        """
        hidden = self.transformer(idx)
        if loss_fn is not None:
            assert targets is not None, "loss_fn needs targets"
            return loss_fn(hidden, self.head, targets)
        if targets is not None:
            return cross_entropy(hidden, self.head, targets) / (targets >= 0).sum()
        return self.head(hidden)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the map to logits: the word embedding itself, (padded V, C)."""
        return self.transformer.wte.weight

    @property
    def head(self) -> Head:
        """The map from hidden states (..., C) to logits (..., V)."""
        return Head(self.head_weight, self.config.vocab_size)

    def flops_per_token(self) -> int:
        """FLOPs of one forward and backward pass per token: 6 N + 12 L C T (PaLM, appendix B).

        N leaves out the position embedding, whose use is a look-up; the word embedding is counted once, for
        the head.
        """
        c = self.config
        n = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * n + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        words: int | None = None,
    ) -> Tensor:
        """Continue a text word by word.

        Args:
            idx: (B, T) int64 ids of the text so far, T at least 1.
            new_tokens: how many words to add.
            temperature: divides the logits; 0 takes the most likely word.
            top_k: sample among the k most likely words only.
            seed: the continuation is a pure function of the weights, the text and this number.
            words: choose among the first so many words only: a tokenizer may have fewer than the model.

        Returns:
            (B, T + new_tokens) int64 ids.
        """
        generator = torch.Generator(device=idx.device).manual_seed(seed)
        for _ in range(new_tokens):
            with torch.compiler.set_stance("force_eager"):  # or it would compile anew for every length
                logits = self(idx[:, -self.config.block_size :])[:, -1, :words].float()
            if temperature == 0:
                following = logits.argmax(dim=-1, keepdim=True)
            else:
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                weights = torch.softmax(logits / temperature, dim=-1)
                following = torch.multinomial(weights, 1, generator=generator)
            idx = torch.cat([idx, following], dim=1)
        return idx
