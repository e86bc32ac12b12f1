r"""The hybrid objective of models with a learned variance: L_simple + lambda L_vlb (2102.09672, eq. 16).

L_vlb is the evidence bound of the reverse chain over N nodes, in bits per dimension, without its term at the prior
(which does not depend on the network). At node k >= 1, with s = t_(k-1), t = t_k and the forward transition x_t =
r x_s + v^(1/2) eps, the term is

    KL( N(mu_q, beta_tilde I) || N(mu, Sigma) ),        log Sigma = nu log beta + (1 - nu) log beta_tilde,
    beta = v,        beta_tilde = v sigma_s^2 / sigma_t^2,        mu_q - mu = (alpha_s v / sigma_t^2) (x_0 - x_hat_0).

The model predicts the fraction nu of each dimension (`Views.variance`). q(x_s | x_t, x_0) = N(mu_q, beta_tilde I) has
the mean mu_q = (r sigma_s^2 x_t + v alpha_s x_0) / sigma_t^2 (2006.11239, eq. 7); mu is the same with the prediction
x_hat_0 = E[x_0 | x_t] in place of x_0. On a DDPM table, beta is the beta_k of DDPM; with alpha = 1 the formulas are
those of NCSN. At node 0 the term is -log p(x_0 | x_(t_0)), with mean x_hat_0 and beta = sigma_0^2. There beta_tilde
would be zero, so the beta_tilde of node 1 is used (the authors' "posterior_log_variance_clipped").

L_vlb trains only the variance, because x_hat_0 is detached in it (section 3.1).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.losses.denoising import DenoisingScoreMatching
from scoresde.losses.objective import Drawn
from scoresde.losses.time_densities import Nodes
from scoresde.losses.weightings import Weighting
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.tensors import broadcast, float64


class Hybrid(DenoisingScoreMatching):
    """L_simple + lambda L_vlb, for a `ScoreModel(..., learned_variance=True)` (2102.09672, eq. 16).

    A sample at a drawn node contributes the squared error of the noise, per dimension, plus lambda N times the term of
    L_vlb at this node in bits per dimension: N times the mean over nodes is the sum over the chain. With lambda = 0.001
    this is the authors' "rescaled" hybrid, in which L_vlb is multiplied by N / 1000.

    Args:
        vlb_weight: lambda.
        bin_width: spacing of the grey levels in model space, (high - low) / (levels - 1), for data that are not
            dequantised: p(x_0 | x_(t_0)) is then the integral of the Gaussian over the bin of each grey level
            (2006.11239, eq. 13). None (default) for continuous data: p is the density of the Gaussian.
        low, high: the first and the last grey level in model space; their bins are open-ended.
        times: the nodes of the chain; by default those of a `Tabulated` path. `Nodes(steps)` works for any SDE.
        weighting: weighting of the first term; "variance" gives L_simple.
        stratified: draw the times of a batch as a lattice with a random offset, for less variance.

    Raises:
        TypeError: times is not `Nodes`.
        ValueError: vlb_weight is negative, or bin_width is not in (0, high - low]. When called: the model has no
            learned variance, or the SDE has no nodes, or no noise at the first node.
    """

    times: Nodes

    def __init__(
        self,
        vlb_weight: float = 0.001,
        bin_width: float | None = None,
        low: float = -1.0,
        high: float = 1.0,
        times: Nodes | None = None,
        weighting: str | Weighting = "variance",
        stratified: bool = True,
    ):
        times = Nodes() if times is None else times
        if not isinstance(times, Nodes):
            raise TypeError(f"times must be losses.Nodes(...), the nodes of a chain; got {type(times).__name__}")
        if not vlb_weight >= 0:
            raise ValueError(f"vlb_weight must be >= 0; got {vlb_weight}")
        if bin_width is not None and not 0 < bin_width <= high - low:
            raise ValueError(f"bin_width must lie in (0, high - low]; got {bin_width} with low={low}, high={high}")
        super().__init__(weighting, times, stratified)
        self.vlb_weight, self.bins = vlb_weight, None if bin_width is None else Bins(bin_width, low, high)

    def value(self, model: BaseModel, drawn: Drawn, weight: Tensor) -> Tensor:
        index, nodes = self.times.index(model.sde, drawn.t), self.times.nodes(model.sde)
        views = model.predict(drawn.perturbed(model.sde), drawn.t)
        if views.variance is None:
            raise ValueError("Hybrid needs a model with a learned variance: use ScoreModel(..., learned_variance=True)")
        error = views.error(drawn.x0, drawn.noise)
        nats = chain_term(model.sde, nodes, index, drawn.x0, -error.denoised.detach(), views.variance, self.bins)
        bits = nats / math.log(2)
        return self._reduce(error, weight) + self.vlb_weight * len(nodes) * bits


class Bins(NamedTuple):
    """Grey levels in model space, whose bins of the first and of the last level are open-ended.

    width: the spacing of the levels. low, high: the first and the last level.
    """

    width: float
    low: float
    high: float


def chain_term(
    sde: SDE,
    nodes: Tensor,
    index: Tensor,
    x0: Tensor,
    residual: Tensor,
    fraction: Tensor | float,
    bins: Bins | None = None,
) -> Tensor:
    """Return the term of DDPM's evidence bound L_vlb at the node of each sample, in nats per dimension (B,).

    Args:
        sde: the path of the chain.
        nodes: increasing times, float64 (N,).
        index: the node of each sample, integers (B,) on the CPU.
        x0: the data (B, *).
        residual: x_0 - x_hat_0 (B, *).
        fraction: nu, (B, *) or a number: 0 for Sigma = beta_tilde, 1 for Sigma = beta.
        bins: the bins of grey levels, for their probabilities at node 0 (2006.11239, eq. 13); None for continuous data.

    Raises:
        ValueError: the first node has no noise, or a node has no more noise than the node before.
    """
    log_posterior, log_ratio, slope = _reverse_step(sde, nodes, index)
    log_excess = broadcast(log_ratio, x0) * fraction  # log(Sigma / beta_tilde)
    scaled = broadcast(slope * torch.exp(-0.5 * log_posterior), x0) * residual  # (mu_q - mu) / beta_tilde^(1/2)
    divergence = 0.5 * (log_excess + torch.expm1(-log_excess) + scaled.square() * torch.exp(-log_excess))
    nats = divergence.flatten(1).mean(dim=1)
    is_first = index == 0
    if bool(is_first.any()):
        rows = is_first.nonzero().flatten().to(x0.device)
        log_variance, x, error = float64(log_excess[rows]), float64(x0[rows]), float64(residual[rows])
        std = torch.exp(0.5 * (log_variance + broadcast(log_posterior[is_first], log_variance)))
        if bins is None:
            decoder = 0.5 * (error / std).square() + std.log() + 0.5 * math.log(2 * math.pi)
        else:
            decoder = -bin_log_prob(x, x - error, std, *bins)
        nats = nats.index_put((rows,), decoder.flatten(1).mean(dim=1).to(nats))
    return nats


def _reverse_step(sde: SDE, nodes: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log beta_tilde, log(beta / beta_tilde) and d mu / d x_hat_0 at the node of each sample, float64 (B,).

    The letters are those of the module docstring. At node 0, beta = sigma_0^2 and beta_tilde is that of node 1.

    Raises:
        ValueError: a posterior variance is not positive.
    """
    later = index.clamp(min=1)
    s, t = nodes[later - 1], nodes[later]
    _, slope, posterior = sde.posterior(t, s)
    _, forward = sde.transition(s, t)
    largest = torch.where(index == 0, sde.sigma(nodes[0]).square(), forward)
    if not bool((posterior > 0).all()):
        node = int(index[(posterior > 0).long().argmin()])
        name = type(sde).__name__
        raise ValueError(
            f"the posterior variance at node {node} (t={nodes[node]:g}) of {name} is 0: raise t_min, so that the "
            "first node has noise, or take fewer nodes, so that each has more noise than the node before"
        )
    return posterior.log(), (largest / posterior).log(), slope


def bin_log_prob(x: Tensor, mean: Tensor, std: Tensor, width: float, low: float, high: float) -> Tensor:
    """Return log of the integral of N(mean, std^2) over the bin of each grey level x, in nats (2006.11239, eq. 13).

    The bin is (x - width/2, x + width/2), open below at the level `low` and above at `high`: over the levels low,
    low + width, ..., high the probabilities sum to one. Nothing underflows, however far the level is from the mean.

    Args:
        x, mean, std: tensors of the same shape; float64 for accurate tails.
        width: spacing of the grey levels.
        low, high: the first and the last grey level.
    """
    upper, lower = (x - mean + 0.5 * width) / std, (x - mean - 0.5 * width) / std
    # Phi(upper) - Phi(lower) = Phi(-lower) - Phi(-upper): take the tail that contains both, where no digits cancel.
    is_above = x > mean
    log_larger = torch.special.log_ndtr(torch.where(is_above, -lower, upper))
    log_smaller = torch.special.log_ndtr(torch.where(is_above, -upper, lower))
    inside = log_larger + torch.log(-torch.expm1(log_smaller - log_larger))
    open_below, open_above = x < low + 0.5 * width, x > high - 0.5 * width
    ends = torch.special.log_ndtr(torch.where(open_below, upper, -lower))
    return torch.where(open_below | open_above, ends, inside)
