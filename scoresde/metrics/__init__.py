"""Distances between samples with their errors: of states as they are, and of images in a feature space."""

from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import ClassifierFeatures, Features, FeatureSpace, Inception, Pixels
from scoresde.metrics.image_quality import (
    Figure,
    frechet,
    inception_score,
    kernel_distance,
    measure,
    measure_images,
    precision_recall,
)
from scoresde.metrics.vectors import (
    Discrepancy,
    Interval,
    PrincipalComponents,
    SlicedWasserstein,
    bootstrap,
    covariance_error,
    energy_distance,
    frechet_distance,
    mean_error,
    mmd,
    moments,
    sliced_wasserstein,
    wasserstein,
)

__all__ = [
    "ClassifierFeatures",
    "Discrepancy",
    "FeatureSpace",
    "FeatureStatistics",
    "Features",
    "Figure",
    "Inception",
    "Interval",
    "Pixels",
    "PrincipalComponents",
    "SlicedWasserstein",
    "bootstrap",
    "covariance_error",
    "energy_distance",
    "frechet",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "mean_error",
    "measure",
    "measure_images",
    "mmd",
    "moments",
    "precision_recall",
    "sliced_wasserstein",
    "wasserstein",
]
