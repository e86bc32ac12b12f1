"""Distances between samples, and their intervals."""

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
    "Discrepancy",
    "Interval",
    "PrincipalComponents",
    "SlicedWasserstein",
    "bootstrap",
    "covariance_error",
    "energy_distance",
    "frechet_distance",
    "mean_error",
    "mmd",
    "moments",
    "sliced_wasserstein",
    "wasserstein",
]
