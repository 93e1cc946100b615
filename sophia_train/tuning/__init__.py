"""Tuning of optimizers with equal budgets."""
