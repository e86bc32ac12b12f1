r"""The evidence bound as an objective, for networks and for paths that learn (2107.00630).

In nats per dimension, with gamma = -log SNR, x_t = alpha x + sigma eps and d dimensions (eq. 11 to 15),

    -log p(x) / d <= KL(q(x_(t_max) | x) || prior) / d                                prior
                     + \int gamma'(t)/2 E|eps_hat(x_t, t) - eps|^2 / d  dt            diffusion
                     + (log(2 pi e) + gamma(t_min)) / 2                               reconstruction.

The last term is exact for the decoder p(x | x_(t_min)) = N(x_(t_min)/alpha, (sigma/alpha)^2), which has no parameters
and is the paper's for data with a density: levels have to be dequantised. `bounds.continuous_nats` decodes with the
network instead, which is a little tighter and costs evaluations at t_min.

The diffusion's integral depends on the path through gamma(t_min) and gamma(t_max) alone (section 5.1): by dgamma =
gamma' dt it is one over noise levels. Its estimate from a time t drawn uniformly,

    L = (t_max - t_min) gamma'(t)/2 |eps_hat(x_t, t) - eps|^2 / d,

has another variance along every path, as the shape of gamma is an importance sampling of noise levels. So a path that
learns is trained by two gradients: its ends, with the network, by that of the bound, and its shape between them by that
of the variance of L (appendix I.2). Of a batch, with mean L_bar, the latter is

    d/d shape  1/(B - 1) sum_i (L_i - L_bar)^2  =  1/B sum_i  2 B/(B - 1) (L_i - L_bar)  d L_i / d shape:

the gradient of mean(L), each sample's part times a factor. All come from one backward pass of `value.mean()`, in which
the path multiplies by these factors what goes to its shape (`SDE.scaled_gradient`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.losses.denoising import DenoisingScoreMatching
from scoresde.losses.objective import Drawn, LossTerms
from scoresde.losses.times import Nodes, TimeDensity, UniformTime
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.tensors import dimensions, float64, sum_dims


@dataclass
class BoundTerms(LossTerms):
    """Per-sample terms of the bound, in nats per dimension: `value` (B,) is the sum of the other three (B,)."""

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor


class VariationalBound(DenoisingScoreMatching):
    """The module's bound in nats per dimension: the objective of variational diffusion models, for any path.

    `value.mean()` estimates it without bias. Its gradient in the shape of a path that learns is that of the variance of
    one sample's diffusion term instead, estimated from the batch (of one sample: of its square), whatever scales the
    loss. Parts of a batch whose gradients are averaged estimate it from a mean of their own each: without bias as
    well, but not the very same number as the whole batch gives.

    Args:
        times: density of the times, `UniformTime()` if not given: the only one for a path that learns, as others have
            gradients in the path of their own. A given path has less variance under `UniformLogSNR()`.
        stratified: see `Objective`.

    Raises:
        TypeError: the nodes of a chain as times.
        ValueError: when called, a path that learns under other than uniform times, or one without noise at t_min.
    """

    def __init__(self, times: TimeDensity | None = None, stratified: bool = True):
        if isinstance(times, Nodes):
            raise TypeError("a density over a continuum of times expected; got the nodes of a chain: see losses.Hybrid")
        super().__init__("likelihood", times or UniformTime(), stratified)

    def terms(self, model: BaseModel, drawn: Drawn) -> BoundTerms:
        self._refuse_other_times(model.sde)
        values: list[Tensor] = []  # the diffusion terms, known when their gradients are asked for
        with model.sde.scaled_gradient(drawn.t, lambda: _variance_factor(values[0])):
            terms = super().terms(model, drawn)
        diffusion = 0.5 * terms.value
        values.append(float64(diffusion.detach()).cpu())
        prior = (model.sde.prior_divergence(drawn.x0) / dimensions(drawn.x0)).to(diffusion)
        reconstruction = (0.5 + decoder_log_scale(model.sde)).to(diffusion).expand_as(diffusion)
        value = prior + diffusion + reconstruction
        return BoundTerms(value, drawn.t, terms.weight.detach(), prior, diffusion, reconstruction)

    def _refuse_other_times(self, sde: SDE) -> None:
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in sde.parameters())
        if learns and not isinstance(self.times, UniformTime):
            raise ValueError(
                f"uniform times (times=None) expected for a path that learns; got {type(self.times).__name__}, whose "
                "times move with the path: give the path .requires_grad_(False) if it is not to learn"
            )


def _variance_factor(values: Tensor) -> Tensor:
    """What turns the gradient of the mean of the values (B,) into that of their variance: 2 B/(B - 1) (L_i - mean)."""
    count = len(values)
    return 2 * values if count == 1 else 2 * count / (count - 1) * (values - values.mean())


# --- what other evidence bounds share with this one


def squared_errors(model: BaseModel, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(|eps_hat - eps|^2, |eps|^2), float64 (B,) each, at x_t = alpha x0 + sigma noise.

    At t_min they are those of the decoder N(E[x_0 | x_t], (sigma/alpha)^2 I), whose mean is off by
    E[x_0 | x_t] - x_0 = -(sigma/alpha) (eps_hat - eps).
    """
    error = model.predict(model.sde.perturb(x0, t, noise), t).error(x0, noise).noise
    return sum_dims(error.square()), sum_dims(noise.square())


def decoder_log_scale(sde: SDE) -> Tensor:
    """log((2 pi)^(1/2) sigma/alpha) at t_min, the log of the decoder's normaliser per dimension; float64, ().

    Raises:
        ValueError: no noise at t_min, the width of the decoder.
    """
    log_snr = sde.log_snr(torch.tensor(sde.t_min, dtype=torch.float64))
    if not bool(torch.isfinite(log_snr)):
        raise ValueError(
            f"sigma(t_min) > 0 expected, the width of the decoder; {type(sde).__name__} has a log-SNR of "
            f"{log_snr.item():g} at t_min={sde.t_min:g}: raise t_min"
        )
    return 0.5 * (math.log(2 * math.pi) - log_snr)
