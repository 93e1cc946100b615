"""Estimators of the Hessian's diagonal, and the updater that calls them when they are due."""

from sophia_train.hessian.base import Estimator, HessianUpdater, NoHessian, Replica
from sophia_train.hessian.gnb import GNB

__all__ = ["GNB", "Estimator", "HessianUpdater", "NoHessian", "Replica"]
