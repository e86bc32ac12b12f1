r"""Distances between samples of states, or of images in a feature space, and the errors of these distances.

The distances are between a sample x (N, *) of a distribution P and a sample y (M, *) of Q. The states are flattened and
in float64. W_p is the Wasserstein distance on the line; m_x and C_x are the mean and covariance of x, m and C those of
Q or of y; x' and y' are other members of the same samples.

    sliced Wasserstein   SW_p = (mean over unit vectors u of W_p(u x, u y)^p)^(1/p)               (Rabin et al. 2011)
    maximum mean         MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), k Gaussian                (Gretton et al. 2012)
    energy distance      2 E|x - y| - E|x - x'| - E|y - y'|: the same with k = -|x - y|           (1207.6076)
    mean, covariance     |m_x - m| / tr(C)^(1/2)  and  |C_x - C|_F / |C|_F
    Frechet distance     |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x^(1/2) C_y C_x^(1/2))^(1/2))        (1706.08500)

MMD^2 and the energy distance are unbiased U-statistics: where P = Q they are zero on average, and often negative. The
others are biased upwards by the variance of finite samples: compare them at equal N and M, and with the distance of a
second sample of Q from y. `bootstrap` gives an interval for any of them.

`retrieval` is the share of queries whose partner is among the k most similar candidates.

For probabilistic classifications (N, K) with labels there are `accuracy`, `log_score`, `brier_score`, `confusion`,
`calibration` and `fit_temperature`, see `metrics.classification`.
"""

from scoresde.metrics.classification import (
    Calibration,
    accuracy,
    brier_score,
    calibration,
    confusion,
    fit_temperature,
    log_score,
)
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import ClassifierFeatures, Features, FeatureSpace, Inception, Pixels
from scoresde.metrics.frechet import frechet_distance
from scoresde.metrics.image_quality import (
    MetricValue,
    frechet,
    inception_score,
    kernel_distance,
    measure,
    measure_images,
    precision_recall,
)
from scoresde.metrics.intervals import Interval, bootstrap, wilson
from scoresde.metrics.kernels import Discrepancy, energy_distance, mmd
from scoresde.metrics.moments import PrincipalComponents, covariance_error, mean_error, moments
from scoresde.metrics.retrieval import ranks, retrieval
from scoresde.metrics.transport import SlicedWasserstein, sliced_wasserstein, wasserstein

__all__ = [
    "Calibration",
    "ClassifierFeatures",
    "Discrepancy",
    "FeatureSpace",
    "FeatureStatistics",
    "Features",
    "Inception",
    "Interval",
    "MetricValue",
    "Pixels",
    "PrincipalComponents",
    "SlicedWasserstein",
    "accuracy",
    "bootstrap",
    "brier_score",
    "calibration",
    "confusion",
    "covariance_error",
    "energy_distance",
    "fit_temperature",
    "frechet",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "log_score",
    "mean_error",
    "measure",
    "measure_images",
    "mmd",
    "moments",
    "precision_recall",
    "ranks",
    "retrieval",
    "sliced_wasserstein",
    "wasserstein",
    "wilson",
]
