"""Sophia, decay groups and schedules; every other optimizer comes from its library."""

from sophia_train.optim.sophia import Sophia

__all__ = ["Sophia"]
