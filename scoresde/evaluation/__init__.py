"""Measurements of a run: its likelihood with its errors."""

from scoresde.evaluation.likelihood import Budget, Estimate, Likelihood, evaluate_likelihood

__all__ = ["Budget", "Estimate", "Likelihood", "evaluate_likelihood"]
