r"""The distance of the prior from the noisy data at t_max, an error of likelihoods and of samples.

    KL(N(alpha x, sigma^2 I) || N(0, prior_std^2 I)) = (alpha^2 |x|^2 / prior_std^2 + d (q - 1 - log q)) / 2

at t_max, for clean data x in d dimensions and q = sigma^2 / prior_std^2. The mean over the data bounds
KL(p_(t_max) || prior), because the divergence is convex and p_(t_max) is a mixture of these normal distributions.
"""

import math
import warnings

import torch
from torch import Tensor

from scoresde.sdes import SDE
from scoresde.tensors import broadcast, dimensions, float64, sum_dims

# Nats/dim, or 0.007 bits/dim. For data of unit variance the mismatch is 2e-5 under VP and sub-VP, 2e-4 under
# VE(sigma_max=50), and 5e-7 under `Rectified`. It is LARGE_MISMATCH for data whose size is a tenth of sigma/alpha at
# t_max: 15 under VP, 5 under VE.
LARGE_MISMATCH = 0.005
UNLIKELY = 1e-6  # probability that the noise makes up more of |x|^2 than is taken off


class PriorMismatch(UserWarning):
    """The noise at t_max does not hide the data, so that the prior is not their distribution at t_max."""


@torch.no_grad()
def prior_mismatches(sde: SDE, x: Tensor, t: float | None = None) -> Tensor:
    """Return the KL divergence of the module docstring for states x (B, *) at t, in nats per dimension, float64 (B,).

    t is t_min by default. The clean data are estimated as x / alpha(t), with |x|^2 reduced by the amount that the noise
    at t may add: sigma^2 (d + 2 (d L)^(1/2) + 2 L) with L = 6 log 10. The factor of sigma^2 bounds the
    (1 - 1e-6)-quantile of chi-squared with d degrees of freedom (Laurent and Massart, 2000).
    """
    time, count, log = float64(sde.t_min if t is None else t), dimensions(x), -math.log(UNLIKELY)
    x = float64(x)
    square = sum_dims(x.square())
    noise = float(sde.sigma(time)) ** 2 * (count + 2 * math.sqrt(count * log) + 2 * log)
    left = ((square - noise).clamp(min=0) / square.clamp(min=torch.finfo(square.dtype).tiny)).sqrt()
    return sde.prior_divergence(broadcast(left, x) * x / float(sde.alpha(time))) / count


def warn_of_mismatch(sde: SDE, mismatches: Tensor, source: str = "data", stacklevel: int = 3) -> float:
    """Return the largest of `prior_mismatches` (B,), 0 for B = 0; warn if it exceeds LARGE_MISMATCH.

    Each sample is judged alone, so the others in its batch do not hide it.

    Args:
        source: what the states are: "data", or "samples" of the model.
        stacklevel: see `warnings.warn`; the default is the caller of the function that calls this one.

    Warns:
        PriorMismatch: with the largest value, and the number of samples above LARGE_MISMATCH.
    """
    largest = float(mismatches.max()) if len(mismatches) else 0.0
    if largest > LARGE_MISMATCH:
        t = float64(sde.t_max)
        above = int((mismatches > LARGE_MISMATCH).sum())
        other = ", or, if the samples are larger than the data, more steps or training" if source == "samples" else ""
        warnings.warn(
            f"the noise at t_max={sde.t_max:g} does not hide the {source}: sigma/alpha is only "
            f"{float(sde.sigma(t) / sde.alpha(t)):.3g}, and the prior is up to {largest:.2g} nats/dim from the noisy "
            f"{source} ({above} of {len(mismatches)} above {LARGE_MISMATCH:g}), which lowers log p and spoils samples: "
            f"scale the data down, or train with more noise at t_max (sigma_max of VE, beta_max of VP){other}",
            PriorMismatch,
            stacklevel=stacklevel,
        )
    return largest
