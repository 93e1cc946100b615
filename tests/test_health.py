"""Warnings of the Hessian's health: said when it matters, once, and in words that help."""

import pytest

from sophia_train.health import HealthMonitor

HEALTHY = {"optim/unclipped_fraction": 0.3, "optim/hessian_negative_fraction": 0.1, "hessian/age": 5.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"optim/unclipped_fraction": 0.026},
            "97% of coordinates are clipped: this is sign momentum; raise optimizer.gamma",
        ),
        (
            {"optim/unclipped_fraction": 0.08, "optim/hessian_zero_fraction": 0.07},
            "92% of coordinates are clipped: this is sign momentum",
        ),
        ({"optim/unclipped_fraction": 0.99}, "only 1% of coordinates are clipped"),
        ({"optim/hessian_negative_fraction": 0.6}, "60% of h is negative"),
        ({"hessian/age": 50.0}, "h is 50 steps old, refreshes are due every 10"),
        ({"optim/hessian_rejected": 2.0}, "2 estimates of the Hessian were not finite"),
    ],
)
def test_each_finding_is_said_once_and_again_when_it_returns(change, words):
    monitor = HealthMonitor(interval=10)
    assert monitor.warnings(HEALTHY, 500) == []
    (warning,) = monitor.warnings(HEALTHY | change, 510)
    assert warning.startswith(words)
    assert monitor.warnings(HEALTHY | change, 520) == []
    assert monitor.warnings(HEALTHY, 530) == []
    assert monitor.warnings(HEALTHY | change, 540) == [warning]


def test_a_hessian_that_has_just_begun_is_not_judged():
    low = {"optim/unclipped_fraction": 0.001}
    assert HealthMonitor(interval=10).warnings(low, 100) == []
    assert HealthMonitor(interval=10).warnings(low, 101) != []


def test_each_new_rejection_is_said():
    monitor = HealthMonitor(interval=10)
    assert len(monitor.warnings({"optim/hessian_rejected": 1.0}, 200)) == 1
    assert len(monitor.warnings({"optim/hessian_rejected": 1.0}, 210)) == 0
    assert len(monitor.warnings({"optim/hessian_rejected": 2.0}, 220)) == 1


def test_a_run_without_a_hessian_is_left_alone():
    assert HealthMonitor(None).warnings({"optim/unclipped_fraction": 0.0}, 1000) == []
