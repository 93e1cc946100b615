"""Estimators of the Hessian's diagonal, and the updater that calls them when they are due."""

from sophia_train.hessian.base import Estimator, HessianUpdater, NoHessian, Replica
from sophia_train.hessian.empirical_fisher import EmpiricalFisher
from sophia_train.hessian.gnb import GNB
from sophia_train.hessian.gradient_magnitude import GradientMagnitude
from sophia_train.hessian.hutchinson import Hutchinson
from sophia_train.hessian.other_loops import attach, estimate

__all__ = [
    "GNB",
    "EmpiricalFisher",
    "Estimator",
    "GradientMagnitude",
    "HessianUpdater",
    "Hutchinson",
    "NoHessian",
    "Replica",
    "attach",
    "estimate",
]
