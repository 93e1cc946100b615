"""Means of many refreshes against the exact diagonals, by curvlinops: no bias, errors as due."""

import math

import pytest
import torch
from oracle import batch, exact_diagonal, flat, hessian_diagonal, tiny

from sophia_train.hessian import GNB, Hutchinson, Replica

# estimator, its exact mean, whether targets are masked, refreshes, micro-batch, error of the mean to reach
CASES = {
    "gnb, 1 group": (GNB(groups=1), exact_diagonal, False, 768, 4, 0.06),
    "gnb, 4 groups": (GNB(groups=4), exact_diagonal, False, 512, 4, 0.06),
    "gnb, masked targets": (GNB(groups=2), exact_diagonal, True, 512, 3, 0.08),
    "hutchinson, gaussian": (Hutchinson(micro_batch_size=4), hessian_diagonal, False, 320, 4, 0.32),
    "hutchinson, rademacher": (
        Hutchinson(probe="rademacher", micro_batch_size=4),
        hessian_diagonal,
        False,
        320,
        4,
        0.32,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_mean_of_refreshes_goes_to_the_exact_diagonal(case):
    estimator, exact_of, masked, refreshes, micro_batch_size, sharp = CASES[case]
    model, data = tiny(), batch(4, masked)
    exact = exact_of(model, data)
    replica = Replica(model, micro_batch_size)
    estimates = [estimator.estimate(replica, data, seed) for seed in range(refreshes)]
    values = torch.stack([flat(each[p] for p in model.parameters()) for each in estimates])
    error = values.std(0) / refreshes**0.5

    z = (values.mean(0) - flat(exact.values())) / error.clamp(min=1e-12)
    for name, part in zip(exact, z.split([len(diagonal) for diagonal in exact.values()]), strict=True):
        assert part.abs().max() < 6, name
        assert part.mean().abs() < 2.0, name  # no common drift, as a wrong B would make
    # sharp enough to mean something
    assert error.sum() / flat(exact.values()).abs().sum() < sharp

    off = (values - flat(exact.values())) / values.std(0).clamp(min=1e-12)
    off = off[:, error > 1e-12]  # every coordinate that is random counts alike

    def error_of_means(n):
        return off[: refreshes // n * n].view(refreshes // n, n, -1).mean(1).square().mean().sqrt().item()

    assert error_of_means(1) / error_of_means(16) == pytest.approx(4, rel=0.15)
    logs = torch.tensor([[math.log(n), math.log(error_of_means(n))] for n in (1, 2, 4, 8, 16, 32)]).T
    slope = (torch.cov(logs)[0, 1] / logs[0].var()).item()
    assert slope == pytest.approx(-0.5, abs=0.06)  # a bias would flatten it
