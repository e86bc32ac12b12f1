"""Evaluation of a run: likelihood with errors, quality of samples, comparison of samplers."""

from scoresde.evaluation.dataset_likelihood import Budget, DatasetLikelihood, Estimate, evaluate_likelihood
from scoresde.evaluation.generation import DrawnSamples, draw_samples
from scoresde.evaluation.quality import Quality, QualitySettings, quality_of_images, quality_of_states
from scoresde.evaluation.references import Reference, mixture_of_three
from scoresde.evaluation.sampler_comparison import ComparisonRow, compare

__all__ = [
    "Budget",
    "ComparisonRow",
    "DatasetLikelihood",
    "DrawnSamples",
    "Estimate",
    "Quality",
    "QualitySettings",
    "Reference",
    "compare",
    "draw_samples",
    "evaluate_likelihood",
    "mixture_of_three",
    "quality_of_images",
    "quality_of_states",
]
