r"""Training objectives for any SDE and any prediction type.

Each is an integral over time of a loss of the model at perturbed states, per dimension,

    L = \int omega(t) E ell(x_t, t) dt,        x_t = alpha x_0 + sigma eps,

estimated without bias by drawing t from a density q (`losses.time_densities`) and weighting each sample with
omega(t) / q(t) (`losses.weightings`). With eps_hat = -sigma score, the noise that the model predicts:

| class                    | ell                                                        | source                      |
| ------------------------ | ---------------------------------------------------------- | --------------------------- |
| `DenoisingScoreMatching` | ||eps_hat - eps||^2 / d, or that of another view           | Vincent 2011; 2011.13456    |
| `ImplicitScoreMatching`  | (||eps_hat||^2 - 2 sigma tr(d eps_hat/dx)) / d             | Hyvarinen 2005; 1905.07088  |
| `SlicedScoreMatching`    | as above, the trace estimated along random directions      | 1905.07088                  |
| `Hybrid`                 | row 1 plus the evidence bound, for a learned variance      | 2102.09672                  |
| `VariationalBound`       | half of row 1: the evidence bound, also for learned paths  | 2107.00630                  |
| `InpaintingObjective`    | another row, given a random part of x_0                    | 2111.05826, 2112.10741      |
| `SuperResolution`        | another row, given the low resolution of x_0               | 2104.07636, 2106.15282      |
| `CrossEntropy`           | -log p(y | x_t), for a noise-conditional classifier        | 2011.13456, appendix I      |
| `InfoNCE`                | of pairs (x_t, condition), for a contrastive model         | 1807.03748, 2103.00020      |

A view is E[eps | x_t], E[x_0 | x_t] or a combination of the two, such as the velocity (`scoresde.views`). The
objectives of the first three rows differ by constants. The exact score minimises each objective but the
last two.
"""

from scoresde.losses.cross_entropy import CrossEntropy
from scoresde.losses.denoising import DenoisingScoreMatching
from scoresde.losses.hybrid import Bins, Hybrid, bin_log_prob, chain_term
from scoresde.losses.implicit import ImplicitScoreMatching, SlicedScoreMatching
from scoresde.losses.info_nce import InfoNCE
from scoresde.losses.inpainting import InpaintingObjective
from scoresde.losses.objective import Drawn, LossTerms, Objective
from scoresde.losses.random_masks import RandomMasks
from scoresde.losses.super_resolution import SuperResolution
from scoresde.losses.time_densities import LogNormal, Nodes, TimeDensity, UniformLogSNR, UniformTime
from scoresde.losses.variational import BoundTerms, VariationalBound, decoder_log_scale, squared_errors
from scoresde.losses.weightings import (
    WEIGHTINGS,
    KarrasWeighting,
    LikelihoodWeighting,
    MinSNRWeighting,
    UnitWeighting,
    VarianceWeighting,
    Weighting,
)

__all__ = [
    "WEIGHTINGS",
    "Bins",
    "BoundTerms",
    "CrossEntropy",
    "DenoisingScoreMatching",
    "Drawn",
    "Hybrid",
    "ImplicitScoreMatching",
    "InfoNCE",
    "InpaintingObjective",
    "KarrasWeighting",
    "LikelihoodWeighting",
    "LogNormal",
    "LossTerms",
    "MinSNRWeighting",
    "Nodes",
    "Objective",
    "RandomMasks",
    "SlicedScoreMatching",
    "SuperResolution",
    "TimeDensity",
    "UniformLogSNR",
    "UniformTime",
    "UnitWeighting",
    "VarianceWeighting",
    "VariationalBound",
    "Weighting",
    "bin_log_prob",
    "chain_term",
    "decoder_log_scale",
    "squared_errors",
]
