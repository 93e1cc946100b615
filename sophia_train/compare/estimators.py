"""How good estimators of the Hessian's diagonal are: bias, variance, ranks and time, against the truth.

A diagonal is one vector here, in the order of the model's parameters. Estimates are streamed: memory is for
some vectors in float64, however many estimates there are.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia_train.data.batches import Batch
from sophia_train.gradients import accumulate_gradients, count_targets, evaluation_mode, micro_batches
from sophia_train.hessian import GNB, Estimator, Hutchinson, Replica
from sophia_train.models.gpt2 import GPT2
from sophia_train.models.losses import cross_entropy, fused_cross_entropy
from sophia_train.optim.statistics import layer_of
from sophia_train.seeds import derive

MICRO_BATCH = 8  # sequences of one pass
RANKED = 2**20  # coordinates, evenly spaced
EXACT_WORK = {"cpu": 4e10, "cuda": 4e12}  # products in passes forward: an exact diagonal below a minute
CHUNK_NUMBERS = {"cpu": 2**22, "cuda": 2**26}  # of gradients that are in memory at a time

Stream = Iterator[tuple[Tensor, float]]  # estimates, and the seconds that each took


class Layers:
    """The layers of a model's coordinates, of which the first is all of them, and the coordinates to rank."""

    def __init__(self, model: GPT2) -> None:
        owners = [layer_of(name) for name, _ in model.named_parameters()]
        device = model.head_weight.device
        self.names = ["overall", *dict.fromkeys(owners)]
        self.sizes = [p.numel() for p in model.parameters()]
        members = [[name in ("overall", owner) for owner in owners] for name in self.names]
        self._members = torch.tensor(members, device=device)  # (layers, parameters)
        self.ranked = torch.arange(0, sum(self.sizes), math.ceil(sum(self.sizes) / RANKED), device=device)
        ends = torch.tensor(self.sizes, device=device).cumsum(0)
        self._ranked = self._members[:, torch.searchsorted(ends, self.ranked, right=True)]

    def sums(self, diagonal: Tensor) -> Tensor:
        """Sum a diagonal over each layer, in float64."""
        parts = diagonal.split(self.sizes)
        return self._members.double() @ torch.stack([part.sum(dtype=torch.float64) for part in parts])

    def rank_correlations(self, truth: Tensor, diagonal: Tensor) -> Tensor:
        """Correlate ranks in each layer; coordinates without effect, whose truth is 0, are left out."""
        a, b = truth[self.ranked], diagonal[self.ranked]
        found = [rank_correlation(a[layer], b[layer]) for layer in self._ranked & (a != 0)]
        return a.new_tensor(found)


class Moments:
    """Mean and variance of a stream of diagonals (Welford), and the sums over layers of each."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.sums: list[Tensor] = []
        self.mean, self._squares = layers.ranked.new_zeros(2, sum(layers.sizes), dtype=torch.float64)

    def add(self, diagonal: Tensor) -> None:
        """Take one more diagonal."""
        self.sums.append(self.layers.sums(diagonal))
        difference = diagonal - self.mean
        self.mean.add_(difference, alpha=1 / len(self.sums))
        self._squares.addcmul_(difference, diagonal - self.mean)

    def spread(self) -> tuple[Tensor, Tensor]:
        """Variance of one diagonal by coordinate, and standard errors of the sums of the mean, by layer."""
        n = len(self.sums)  # of diagonals; the coordinates of one are not independent, so sums are kept
        return self._squares / (n - 1), torch.stack(self.sums).std(0) / math.sqrt(n)


@dataclass(frozen=True)
class Truth:
    """What estimates are judged by: an exact diagonal in float64, or a long average with the noise it has."""

    name: str
    kind: str
    diagonal: Tensor
    variance: Tensor | float = 0.0  # of the diagonal, by coordinate
    sums_error: Tensor | float = 0.0  # of its sums over layers
    noise: float = 0.0  # root mean square, over that of the diagonal


@dataclass(frozen=True)
class Score:
    """How estimates compare with a truth, over some coordinates; NaN where that has no meaning."""

    bias: float  # sum(mean of the estimates - truth) / sum(truth)
    bias_error: float  # its standard error, by the noise of the estimates and of the truth
    variance: float  # sum(variance of one estimate) / sum(truth^2)
    rank_one: float  # Spearman's correlation of one estimate with the truth, the median over estimates
    rank_mean: float  # that of the estimates' mean


@dataclass(frozen=True)
class Comparison:
    """One estimator against one truth."""

    label: str
    truth: Truth
    scores: dict[str, Score]  # by layer, and "overall"
    seconds: float  # of one estimate, the median
    shown: list[Tensor]  # the ranked coordinates of the truth, of the estimates' mean, and of one


def compare(label: str, model: GPT2, stream: Stream, truths: Sequence[Truth]) -> list[Comparison]:
    """Compare a stream of at least two estimates with truths about the same sequences."""
    layers = Layers(model)
    moments = Moments(layers)
    seconds: list[float] = []
    ranks: list[list[Tensor]] = [[] for _ in truths]
    for one, elapsed in stream:
        moments.add(one)
        seconds.append(elapsed)
        for truth, of_each in zip(truths, ranks, strict=True):
            of_each.append(layers.rank_correlations(truth.diagonal, one))
    comparisons = []
    variance, sums_error = moments.spread()
    for truth, of_each in zip(truths, ranks, strict=True):
        total = layers.sums(truth.diagonal)
        ratio = layers.sums(moments.mean) / total
        squares = layers.sums(truth.diagonal**2 - truth.variance)  # those of a truth without its noise
        columns = (
            ratio - 1,
            torch.hypot(sums_error, ratio * truth.sums_error) / total.abs(),
            layers.sums(variance) / squares.where(squares > 0, math.nan),
            torch.stack(of_each).quantile(0.5, dim=0),
            layers.rank_correlations(truth.diagonal, moments.mean),
        )
        rows = zip(layers.names, torch.stack(columns, dim=1).tolist(), strict=True)
        scores = {name: Score(*row) for name, row in rows}
        shown = [diagonal[layers.ranked].cpu() for diagonal in (truth.diagonal, moments.mean, one)]
        comparisons.append(Comparison(label, truth, scores, statistics.median(seconds), shown))
    return comparisons


def estimates(
    estimator: Estimator, model: GPT2, pool: Batch, size: int, count: int, seed: int, bf16: bool = False
) -> Stream:
    """Make estimates, each from `size` sequences drawn from the pool.

    A training gradient that the estimator reads is not in the seconds: in training it is there anyway.
    """
    device = pool.inputs.device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for refresh in range(count):
        key = derive(seed, "refresh", refresh)
        order = torch.randperm(len(pool.inputs), generator=torch.Generator().manual_seed(key))
        rows = order[:size].sort().values.to(device)
        batch = Batch(pool.inputs[rows], pool.targets[rows], list(range(size)))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if estimator.reads_training_gradient:
                parts = micro_batches(batch.inputs, batch.targets, MICRO_BATCH)
                with evaluation_mode(model):
                    tokens = count_targets(batch.targets)
                    accumulate_gradients(model, parts, fused_cross_entropy, tokens=tokens)
            wait()
            start = time.perf_counter()
            estimate = estimator.estimate(Replica(model, MICRO_BATCH), batch, key)
            wait()
            seconds = time.perf_counter() - start
        model.zero_grad()
        yield torch.cat([estimate[p].detach().flatten() for p in model.parameters()]), seconds


def find_truth(name: str, model: GPT2, pool: Batch, refreshes: int, seed: int) -> Truth:
    """Compute the `Gauss-Newton` or `Hessian` diagonal: exactly if that takes no minute, or an average."""
    size, length = pool.inputs.shape
    parameters = sum(p.numel() for p in model.parameters())
    exact, passes = gauss_newton_diagonal, model.config.vocab_size * length
    estimator: Estimator = GNB(groups=size)
    if name == "Hessian":
        exact, passes, estimator = hessian_diagonal, parameters, Hutchinson(probe="rademacher")
    if passes * parameters * size * length <= EXACT_WORK[pool.inputs.device.type]:
        return Truth(name, "exact", exact(model, pool))
    moments = Moments(Layers(model))
    for one, _ in estimates(estimator, model, pool, size, refreshes, seed):
        moments.add(one)
    variance, sums_error = moments.spread()
    variance /= refreshes
    noise = (variance.sum() / moments.mean.square().sum()).sqrt().item()
    kind = f"average of {refreshes} estimates by {type(estimator).__name__}"
    return Truth(name, kind, moments.mean, variance, sums_error, noise)


def gauss_newton_diagonal(model: GPT2, batch: Batch) -> Tensor:
    """Sum p_v (d log p_v / d theta)^2 over all words v, and average over tokens."""
    weights, call = _functional(model)
    total = torch.zeros_like(weights, dtype=torch.float64)
    with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH):
        for row, targets in zip(batch.inputs.split(1), batch.targets, strict=True):
            logits, pull_back = vjp(lambda w, row=row: call(w, row)[0], weights)[:2]
            chunk = max(1, CHUNK_NUMBERS[weights.device.type] // (len(weights) + logits.numel()))
            for token in (targets >= 0).nonzero()[:, 0].tolist():
                p = logits[token].softmax(0)
                factor = p.sqrt().diag() - p.sqrt().outer(p)  # S' of S S' = diag(p) - p p'
                for rows in factor.split(chunk):
                    cotangents = rows.new_zeros(len(rows), *logits.shape)
                    cotangents[:, token] = rows
                    total += vmap(pull_back)(cotangents)[0].square().sum(0, dtype=torch.float64)
    return total / count_targets(batch.targets)


def hessian_diagonal(model: GPT2, batch: Batch) -> Tensor:
    """Take the diagonal from the Hessian's products with all basis vectors; of the mean loss over tokens."""
    weights, call = _functional(model)
    total = torch.zeros_like(weights, dtype=torch.float64)
    logits = MICRO_BATCH * batch.targets.shape[1] * model.config.vocab_size
    chunk = max(1, CHUNK_NUMBERS[weights.device.type] // (len(weights) + logits))
    whole = functools.partial(cross_entropy, chunk_tokens=batch.targets.numel())
    with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH):
        for part in micro_batches(batch.inputs, batch.targets, MICRO_BATCH):
            gradient = grad(lambda w, part=part: call(w, part.inputs, part.targets, whole))
            product = vmap(lambda u, gradient=gradient: jvp(gradient, (weights,), (u,))[1])
            for rows in torch.arange(len(weights), device=weights.device).split(chunk):
                basis = torch.zeros(len(rows), len(weights)).to(weights).scatter_(1, rows[:, None], 1.0)
                total[rows] += product(basis).gather(1, rows[:, None])[:, 0]
    return total / count_targets(batch.targets)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN where a rank is all there is."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0).double() - (counts - 1) / 2)[inverse])
    x, y = (rank - rank.mean() for rank in ranks)
    return (x @ y / (x.norm() * y.norm())).item() if len(a) else math.nan


def _functional(model: GPT2) -> tuple[Tensor, Callable[..., Tensor]]:
    """All weights as one vector, and the model as a function of it."""
    named = dict(model.named_parameters())

    def call(weights: Tensor, *arguments: Any) -> Tensor:
        parts = weights.split([p.numel() for p in named.values()])
        views = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        return functional_call(model, views, arguments)

    return torch.cat([p.detach().flatten() for p in named.values()]), call
