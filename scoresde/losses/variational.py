r"""The evidence bound as an objective, for networks and for learned paths (2107.00630).

In nats per dimension, with gamma = -log SNR, x_t = alpha x + sigma eps and d dimensions (eq. 11 to 15),

    -log p(x) / d <= KL(q(x_(t_max) | x) || prior) / d                                prior
                     + \int gamma'(t)/2 E|eps_hat(x_t, t) - eps|^2 / d  dt            diffusion
                     + (log(2 pi e) + gamma(t_min)) / 2                               reconstruction.

The last term is exact for the decoder p(x | x_(t_min)) = N(x_(t_min)/alpha, (sigma/alpha)^2), which has no parameters
and is the paper's decoder for data with a density: grey levels must be dequantised. `bounds.continuous_nats` decodes
with the network instead, which gives a slightly tighter bound and costs evaluations at t_min.

The integral of the diffusion term depends on the path only through gamma(t_min) and gamma(t_max) (section 5.1), as
dgamma = gamma' dt makes it an integral over noise levels. Its estimate from a time t drawn uniformly is

    L = (t_max - t_min) gamma'(t)/2 |eps_hat(x_t, t) - eps|^2 / d.

The variance of L does depend on the path, as the shape of gamma sets the density of the drawn noise levels. A learned
path is therefore trained by two gradients: the ends of gamma, like the network, by the gradient of the bound, and the
shape between the ends by the gradient of the variance of L (appendix I.2). For a batch with mean L_bar the latter is

    d/d shape  1/(B - 1) sum_i (L_i - L_bar)^2  =  1/B sum_i  2 B/(B - 1) (L_i - L_bar)  d L_i / d shape:

the gradient of mean(L) with the contribution of each sample multiplied by a factor. Both gradients come from one
backward pass of `value.mean()`, in which the path applies these factors to its shape (`SDE.scaled_gradient`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.losses.denoising import DenoisingScoreMatching
from scoresde.losses.objective import Drawn, LossTerms
from scoresde.losses.time_densities import Nodes, TimeDensity, UniformTime
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.tensors import dimensions, float64, sum_dims


@dataclass
class BoundTerms(LossTerms):
    """The bound of each sample, in nats per dimension: `value` (B,) = `prior` + `diffusion` + `reconstruction`."""

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor


class VariationalBound(DenoisingScoreMatching):
    """The evidence bound in nats per dimension, the loss of variational diffusion models (2107.00630), for any path.

    For data x_0 of d dimensions it is the sum of the terms prior, diffusion and reconstruction,

        KL(q(x_tmax | x_0) || prior)/d  +  1/2 int (g/sigma)^2 E |eps_hat - eps|^2/d dt  +  1/2 + log((2 pi)^(1/2) r),

    with r = sigma/alpha at t_min, for the density of x_0 with noise at t_min (continuous data).

    `value.mean()` estimates the bound without bias. The shape of a learned path receives instead the gradient of the
    variance of one sample's diffusion term, estimated from the batch (from a single sample: the gradient of the squared
    term); scaling the loss scales this gradient too. When gradients of parts of a batch are averaged, each part
    estimates the variance around its own mean: also unbiased, but not identical to the gradient of the whole batch.

    Args:
        times: density of the times, default `UniformTime()`. A learned path requires `UniformTime`, as other densities
            depend on the path. For a fixed path, `UniformLogSNR()` gives less variance.
        stratified: draw the times of a batch as a lattice with a random offset, for less variance.

    Raises:
        TypeError: times is a `Nodes`.
        ValueError: when called, the path is learned and times is not `UniformTime`, or the SDE has no noise at t_min.
    """

    def __init__(self, times: TimeDensity | None = None, stratified: bool = True):
        if isinstance(times, Nodes):
            raise TypeError(
                "times must be a continuous density; got the nodes of a chain: use losses.Hybrid for the chain's bound"
            )
        super().__init__("likelihood", times or UniformTime(), stratified)

    def terms(self, model: BaseModel, drawn: Drawn) -> BoundTerms:
        learns_path = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.sde.parameters())
        if learns_path and not isinstance(self.times, UniformTime):
            raise ValueError(
                f"a learned path needs uniform times, because {type(self.times).__name__} depends on the path: pass "
                "times=None, or call sde.requires_grad_(False) to fix the path"
            )
        values: list[Tensor] = []  # the diffusion terms, filled in before the backward pass reads them
        with model.sde.scaled_gradient(drawn.t, lambda: _variance_factor(values[0])):
            terms = super().terms(model, drawn)
        diffusion = 0.5 * terms.value
        values.append(float64(diffusion.detach()).cpu())
        prior = (model.sde.prior_divergence(drawn.x0) / dimensions(drawn.x0)).to(diffusion)
        reconstruction = (0.5 + decoder_log_scale(model.sde)).to(diffusion).expand_as(diffusion)
        value = prior + diffusion + reconstruction
        return BoundTerms(value, drawn.t, terms.weight.detach(), prior, diffusion, reconstruction)


def _variance_factor(values: Tensor) -> Tensor:
    """Return the factors 2 B/(B - 1) (L_i - L_bar) of the module docstring for L (B,); 2 L_i for a single sample."""
    count = len(values)
    return 2 * values if count == 1 else 2 * count / (count - 1) * (values - values.mean())


# --- shared with `bounds` and `likelihood`


def squared_errors(model: BaseModel, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return (|eps_hat - eps|^2, |eps|^2), float64 (B,) each, at x_t = alpha x0 + sigma noise.

    At t_min the first gives the error of the decoder N(E[x_0 | x_t], (sigma/alpha)^2 I), since
    E[x_0 | x_t] - x_0 = -(sigma/alpha) (eps_hat - eps).
    """
    error = model.predict(model.sde.perturb(x0, t, noise), t).error(x0, noise).noise
    return sum_dims(error.square()), sum_dims(noise.square())


def decoder_log_scale(sde: SDE) -> Tensor:
    """Return log((2 pi)^(1/2) sigma/alpha) at t_min, the log-normaliser of the decoder per dimension; float64, ().

    Raises:
        ValueError: there is no noise at t_min.
    """
    log_snr = sde.log_snr(torch.tensor(sde.t_min, dtype=torch.float64))
    if not bool(torch.isfinite(log_snr)):
        raise ValueError(
            f"{type(sde).__name__} has no noise at t_min={sde.t_min:g}, so the Gaussian decoder of the bound would "
            "have zero width: raise t_min"
        )
    return 0.5 * (math.log(2 * math.pi) - log_snr)
