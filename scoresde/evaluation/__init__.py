"""Measurements of a run: its likelihood with its errors, its samplers side by side."""

from scoresde.evaluation.likelihood import Budget, Estimate, Likelihood, evaluate_likelihood
from scoresde.evaluation.samplers import Reference, Row, compare, mixture_of_three

__all__ = [
    "Budget",
    "Estimate",
    "Likelihood",
    "Reference",
    "Row",
    "compare",
    "evaluate_likelihood",
    "mixture_of_three",
]
