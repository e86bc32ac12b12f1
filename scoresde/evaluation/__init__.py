"""Measurements of a run: its likelihood with its errors, the quality of its samples, its samplers side by side."""

from scoresde.evaluation.generation import DrawnSamples, draw_samples
from scoresde.evaluation.likelihood import Budget, Estimate, Likelihood, evaluate_likelihood
from scoresde.evaluation.quality import Comparison, Quality, quality_of_images, quality_of_states
from scoresde.evaluation.references import Reference, mixture_of_three
from scoresde.evaluation.samplers import Row, compare

__all__ = [
    "Budget",
    "Comparison",
    "DrawnSamples",
    "Estimate",
    "Likelihood",
    "Quality",
    "Reference",
    "Row",
    "compare",
    "draw_samples",
    "evaluate_likelihood",
    "mixture_of_three",
    "quality_of_images",
    "quality_of_states",
]
