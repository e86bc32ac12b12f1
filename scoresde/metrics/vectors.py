r"""Distances between a sample x (N, *) of a distribution P and a sample y (M, *) of Q, states flattened, in float64.

    sliced Wasserstein   SW_p = (mean over unit vectors u of W_p(u x, u y)^p)^(1/p)               (Rabin et al. 2011)
    maximum mean         MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), k Gaussian                (Gretton et al. 2012)
    energy distance      2 E|x - y| - E|x - x'| - E|y - y'|: the same with k = -|x - y|           (1207.6076)
    mean, covariance     |m_x - m| / tr(C)^(1/2)  and  |C_x - C|_F / |C|_F
    Frechet distance     |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x^(1/2) C_y C_x^(1/2))^(1/2))        (1706.08500)

MMD^2 and the energy distance are U-statistics, without bias: where P = Q they are zero on average, and often negative.
The others are biased upwards by what samples of finite number vary: compare figures at equal N and M, beside the
figure that a sample of Q itself has. `bootstrap` gives the interval of any of them.
"""

from scoresde.metrics.intervals import FEWEST, Interval, Statistic, bootstrap
from scoresde.metrics.kernels import (
    Discrepancy,
    energy_distance,
    gaussian,
    median_bandwidths,
    median_distance,
    mmd,
)
from scoresde.metrics.moments import (
    PrincipalComponents,
    covariance_error,
    frechet_distance,
    mean_error,
    moments,
)
from scoresde.metrics.samples import flatten
from scoresde.metrics.transport import SlicedWasserstein, directions, sliced_wasserstein, wasserstein

__all__ = [
    "FEWEST",
    "Discrepancy",
    "Interval",
    "PrincipalComponents",
    "SlicedWasserstein",
    "Statistic",
    "bootstrap",
    "covariance_error",
    "directions",
    "energy_distance",
    "flatten",
    "frechet_distance",
    "gaussian",
    "mean_error",
    "median_bandwidths",
    "median_distance",
    "mmd",
    "moments",
    "sliced_wasserstein",
    "wasserstein",
]
