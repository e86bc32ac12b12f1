r"""The hybrid objective of models with a learned variance: L_simple + lambda L_vlb (2102.09672, eq. 16).

L_vlb is the evidence bound of the reverse chain over N nodes, in bits per dimension, without its term at the prior
(which has nothing to learn). At node k >= 1, with s = t_(k-1), t = t_k and the forward transition x_t = r x_s +
v^(1/2) eps, the term is

    KL( N(mu_q, beta_tilde I) || N(mu, Sigma) ),        log Sigma = nu log beta + (1 - nu) log beta_tilde,
    beta = v,        beta_tilde = v sigma_s^2 / sigma_t^2,        mu_q - mu = (alpha_s v / sigma_t^2) (x_0 - x_hat_0),

since q(x_s | x_t, x_0) = N(mu_q, beta_tilde I) has the mean (r sigma_s^2 x_t + v alpha_s x_0) / sigma_t^2 (2006.11239,
eq. 7) and the model puts x_hat_0 in place of x_0. On a DDPM table beta is its beta_k; with alpha = 1 the same formulas
are NCSN's. At node 0 the term is -log p(x_0 | x_(t_0)), with mean x_hat_0, beta = sigma_0^2, and the beta_tilde of node
1, as the one of node 0 is zero (the authors' "posterior_log_variance_clipped").

The gradient of L_vlb reaches the variance alone: x_hat_0 is detached in it (section 3.1).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.losses.denoising import DenoisingScoreMatching
from scoresde.losses.objective import Drawn
from scoresde.losses.times import Nodes
from scoresde.losses.weightings import Weighting
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.tensors import broadcast, float64


class Hybrid(DenoisingScoreMatching):
    """L_simple + lambda L_vlb, for a `ScoreModel(..., learned_variance=True)` (2102.09672, eq. 16).

    A sample at a drawn node contributes its squared error of the noise, per dimension, plus lambda N times its term of
    the bound in bits per dimension: the mean over nodes is the sum over the chain. With lambda = 0.001 this is the
    authors' "rescaled" hybrid, whose term is multiplied by N / 1000.

    Args:
        vlb_weight: lambda.
        bin_width: distance of neighbouring data levels in model space, (high - low) / (levels - 1), for data that lie
            on them (not dequantised): node 0 then has the Gaussian's integral over the level's bin (2006.11239,
            eq. 13). None for continuous data: its density there.
        low, high: the first and the last level in model space, whose bins are open-ended.
        times: the nodes of the chain; those of a `Tabulated` path if not given, `Nodes(steps)` for any SDE.
        weighting: of the first term, "variance" for L_simple.
        stratified: see `Objective`.

    Raises:
        TypeError: times other than `Nodes`.
        ValueError: a negative lambda, a width that is not positive or does not fit between low and high; when called, a
            model without a learned variance, an SDE without nodes or without noise at its first node.
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
            raise TypeError(f"losses.Nodes expected as the times of a chain; got {type(times).__name__}")
        if not vlb_weight >= 0:
            raise ValueError(f"vlb_weight >= 0 expected; got {vlb_weight}")
        if bin_width is not None and not 0 < bin_width <= high - low:
            raise ValueError(f"0 < bin_width <= high - low expected; got bin_width={bin_width}, low={low}, high={high}")
        super().__init__(weighting, times, stratified)
        self.vlb_weight, self.bin_width, self.low, self.high = vlb_weight, bin_width, low, high

    def value(self, model: BaseModel, drawn: Drawn, weight: Tensor) -> Tensor:
        index = self.times.index(model.sde, drawn.t)
        views = model.predict(drawn.perturbed(model.sde), drawn.t)
        if views.variance is None:
            raise ValueError("a model with a learned variance expected: ScoreModel(..., learned_variance=True)")
        error = views.error(drawn.x0, drawn.noise)
        nodes = self.times.nodes(model.sde)
        bins = None if self.bin_width is None else Bins(self.bin_width, self.low, self.high)
        missing = -error.denoised.detach()
        bits = chain_term(model.sde, nodes, index, drawn.x0, missing, views.variance, bins) / math.log(2)
        return self._reduce(error.noise, weight) + self.vlb_weight * len(nodes) * bits


class Bins(NamedTuple):
    """Data levels in model space: their distance, the first and the last, whose bins are open-ended."""

    width: float
    low: float
    high: float


def chain_term(
    sde: SDE,
    nodes: Tensor,
    index: Tensor,
    x0: Tensor,
    missing: Tensor,
    fraction: Tensor | float,
    bins: Bins | None = None,
) -> Tensor:
    """The term of L_vlb at the node of each sample, in nats per dimension (B,): the module's formulas.

    Args:
        sde: the path of the chain.
        nodes: its times, increasing, float64 (N,).
        index: the node of each sample, integers (B,) on the CPU; the decoder's term at 0, a divergence beyond.
        x0: the data (B, *).
        missing: x_0 - x_hat_0 (B, *).
        fraction: nu, (B, *) or one number: 0 for Sigma = beta_tilde, 1 for beta.
        bins: of data on levels, for the decoder (2006.11239, eq. 13); None for its density.

    Raises:
        ValueError: nodes without noise, or without more of it than the node before.
    """
    log_posterior, log_ratio, data = _reverse_step(sde, nodes, index)
    grown = broadcast(log_ratio, x0) * fraction  # log(Sigma / beta_tilde)
    scaled = broadcast(data * torch.exp(-0.5 * log_posterior), x0) * missing  # (mu_q - mu) / beta_tilde^(1/2)
    divergence = 0.5 * (grown + torch.expm1(-grown) + scaled.square() * torch.exp(-grown))
    nats = divergence.flatten(1).mean(dim=1)
    first = index == 0
    if bool(first.any()):
        rows = first.nonzero().flatten().to(x0.device)
        log_variance = float64(grown[rows])
        log_variance = log_variance + broadcast(log_posterior[first], log_variance)
        decoder = _decode(float64(x0[rows]), float64(missing[rows]), torch.exp(0.5 * log_variance), bins)
        nats = nats.index_put((rows,), decoder.flatten(1).mean(dim=1).to(nats))
    return nats


def _decode(x0: Tensor, missing: Tensor, std: Tensor, bins: Bins | None) -> Tensor:
    """-log p(x_0 | x_(t_0)) of each dimension, in nats (n, *), float64."""
    if bins is not None:
        return -bin_log_prob(x0, x0 - missing, std, *bins)
    return 0.5 * (missing / std).square() + std.log() + 0.5 * math.log(2 * math.pi)


def _reverse_step(sde: SDE, nodes: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log beta_tilde, log(beta / beta_tilde) and d mu / d x_hat_0 of the step from each node, float64 (B,).

    Of node 0, which no step leaves, beta = sigma_0^2 and the beta_tilde of node 1.

    Raises:
        ValueError: a posterior variance that is not positive.
    """
    later = index.clamp(min=1)
    s, t = nodes[later - 1], nodes[later]
    _, data, posterior = sde.posterior(t, s)
    _, forward = sde.transition(s, t)
    largest = torch.where(index == 0, sde.sigma(nodes[0]).square(), forward)
    if not bool((posterior > 0).all()):
        at = int(index[(posterior > 0).long().argmin()])
        raise ValueError(
            f"posterior variances > 0 expected at every node; not so at node {at} (t={float(nodes[at]):g}) of "
            f"{type(sde).__name__}: the first node needs sigma > 0 (raise t_min), each next one more noise"
        )
    return posterior.log(), (largest / posterior).log(), data


def bin_log_prob(x: Tensor, mean: Tensor, std: Tensor, width: float, low: float, high: float) -> Tensor:
    """log of the integral of N(mean, std^2) over the bin of each level x, in nats (2006.11239, eq. 13).

    The bin is (x - width/2, x + width/2), open below at the level `low` and above at `high`: over the levels low,
    low + width, ..., high the probabilities sum to one. Nothing underflows, however far from the mean.

    Args:
        x, mean, std: tensors of one shape, float64 for the tails.
        width: distance of neighbouring levels.
        low, high: the first and the last level.
    """
    upper, lower = (x - mean + 0.5 * width) / std, (x - mean - 0.5 * width) / std
    # Phi(upper) - Phi(lower) = Phi(-lower) - Phi(-upper): in the tail that both lie in, where no digits cancel
    above = x > mean
    log_larger = torch.special.log_ndtr(torch.where(above, -lower, upper))
    log_smaller = torch.special.log_ndtr(torch.where(above, -upper, lower))
    inside = log_larger + torch.log(-torch.expm1(log_smaller - log_larger))
    open_below, open_above = x < low + 0.5 * width, x > high - 0.5 * width
    ends = torch.special.log_ndtr(torch.where(open_below, upper, -lower))
    return torch.where(open_below | open_above, ends, inside)
