"""A tiny model, and the exact diagonals of its loss's Hessian and Gauss-Newton matrix, by curvlinops."""

import dataclasses

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia_train.data.batches import Batch
from sophia_train.models.gpt2 import GPT2, GPT2Config

CONFIG = GPT2Config(n_layer=1, n_head=2, n_embd=4, block_size=4, vocab_size=6)


def tiny(**changes):
    model = GPT2(dataclasses.replace(CONFIG, **changes)).double()
    model.initialize(3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20 if p.ndim > 1 else 1)  # away from the flat start
        model.transformer.wte.weight[CONFIG.vocab_size :] = 0
    return model


def batch(n=4, masked=False):
    """Random sequences; `masked` takes some targets out, among them all of the second sequence."""
    generator = torch.Generator().manual_seed(8)
    rows = torch.randint(0, CONFIG.vocab_size, (n, CONFIG.block_size + 1), generator=generator)
    inputs, targets = rows[:, :-1], rows[:, 1:].clone()
    if masked:
        targets[0, 2:] = -1
        targets[1] = -1
        targets[2, 1] = -1
    return Batch(inputs, targets, list(range(n)))


class FlatLogits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model(inputs).flatten(0, 1)


def exact_diagonal(model, data, operator=GGNLinearOperator):
    """Diagonal of a matrix of the mean loss over counted tokens; tied weights are one parameter."""
    params = dict(model.named_parameters())
    made = operator(
        FlatLogits(model),
        torch.nn.CrossEntropyLoss(ignore_index=-1),
        list(params.values()),
        [(data.inputs, data.targets.flatten())],
        batch_size_fn=torch.numel,
        check_deterministic=False,
    )
    with sdpa_kernel(SDPBackend.MATH):  # the oracle differentiates forwards, which no other kernel can
        matrix = made @ torch.eye(made.shape[1], dtype=torch.float64)
    return dict(zip(params, matrix.diagonal().split([p.numel() for p in params.values()]), strict=True))


def hessian_diagonal(model, data):
    return exact_diagonal(model, data, HessianLinearOperator)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])
