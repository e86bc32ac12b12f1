"""DDPM's evidence bound: the ancestral chain over N nodes t_0 < ... < t_(N-1), and a decoder of grey levels.

With x_k = x(t_k) of a path, q(x_k | x) = N(alpha x, sigma^2 I) (2006.11239, eq. 5, 8, 10 and 13; 2102.09672, eq. 4-7),

    -log P(x) <= L_N + L_(N-1) + ... + L_1 + L_0
    L_N = KL(q(x_(N-1) | x) || prior)                                       closed form
    L_k = E KL(q(x_(k-1) | x_k, x) || p(x_(k-1) | x_k))                     1 <= k < N, of two Gaussians
    L_0 = E[-log P(x | x_0)]                                                a Gaussian's integral over a level's bin.

The papers number the nodes from 1 and call these terms L_T, L_(t-1), L_0. `losses.hybrid` gives the formulas of L_k and
L_0, and defines beta and beta_tilde.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde.bounds.bound import Bound, NatsBound, bits_bound, refuse_odd, uniform
from scoresde.dequantization import check_levels, count_levels, warn_if_above_uniform
from scoresde.losses import Bins, Nodes, chain_term
from scoresde.protocols import Model, Transform
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel
from scoresde.tensors import dimensions, double, float64

# The fraction nu of `losses.hybrid` (None: the model's own), and its description.
VARIANCES = {
    "posterior": (0.0, "beta_tilde, at node 0 that of node 1"),
    "forward": (1.0, "beta, at node 0 sigma^2"),
    "learned": (None, "learned, from beta_tilde (at node 0 that of node 1) to beta (at node 0 sigma^2)"),
}


@dataclass(repr=False)
class DiscreteBound(Bound):
    """The bound of a chain, with the term of each step.

    steps: L_1 .. L_(N-1), the terms of the steps, of each image, (images, N-1), in bits per dimension; NaN for steps
    that no draw visited.
    nodes: the times of the chain (N,).
    """

    steps: Tensor
    nodes: Tensor

    def per_step(self) -> tuple[Tensor, Tensor]:
        """Return each step's mean term over the images with a draw at it, and the mean's standard error, (N-1,) each.

        A step drawn for no image is NaN. With draws=None the means add up to the mean of the term "diffusion".
        """
        count = (~self.steps.isnan()).sum(dim=0)
        mean = self.steps.nanmean(dim=0)
        squares = (self.steps - mean).square().nansum(dim=0)
        return mean, (squares / (count * (count - 1))).sqrt()


def discrete(
    model: Model,
    images: Tensor,
    transform: Transform,
    cond: Any = None,
    variance: str = "posterior",
    times: Nodes | None = None,
    draws: int | None = None,
    levels: int | None = None,
    seeds: Sequence[int] | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> DiscreteBound:
    """Return the evidence bound of DDPM's chain on the bits per dimension of integer images (2006.11239; 2102.09672).

    It is an upper bound for the ancestral chain over the nodes, not for the probability flow. The terms are "prior"
    (L_N), "diffusion" (the sum of L_1 .. L_(N-1), each in `steps`) and "reconstruction" (L_0).

    The data are the integer grey levels, not dequantised. The transform T defines their positions in model space: level
    k is at T(k + 1/2), the centre of the interval [k, k + 1) that a dequantised level fills, and neighbours are one bin
    width apart. `data.Levels(256)` places them 2/256 apart from -255/256 to 255/256; DDPM's scaling, 2/255 apart from
    -1 to 1, is `data.Levels(256, -256/255, 256/255)`.

    Args:
        model: the model, in eval mode.
        images: integer grey levels 0 .. levels - 1 (N, *), of any dtype.
        transform: T, from grey levels to model space, where they must be equally spaced.
        cond: short for `model.given(cond)`; with leading dimension N, it holds one condition for each image.
        variance: variance of the reverse steps: "posterior" (beta_tilde), "forward" (beta), or "learned", which the
            model sets between the two (2102.09672, eq. 15). The decoder uses this variance at node 0, with
            beta = sigma(t_0)^2 and the beta_tilde of node 1. The published "fixed large" is "forward" at every
            node except node 0, and "posterior" there.
        times: the nodes of the chain; default: those of a `Tabulated` path. `losses.Nodes(steps)` works for any SDE.
        draws: None (default) evaluates every step and the decoder of each image once. An even number draws that many
            steps for each image, stratified, and evaluates the decoder twice; the bound is then unbiased and has a
            standard error. Each draw is one evaluation of the network; 2 (N - 1) draws visit every step twice.
        levels: number of grey levels; default: `transform.levels`. The bins of the first and last level are open-ended.
        seeds: one per image; default 0, 1, 2, ..., so that the result is reproducible.
        batch_size: images at a time.
        progress: show a progress bar.

    Warns:
        AboveUniform: the mean is above log2(levels).

    Raises:
        ValueError: the images are not integers or not among the levels; the number of levels is unknown, or they are
            not equally spaced in model space; the variance is unknown or not learned by the model; draws is odd or more
            than twice the steps; the SDE has no nodes, or no noise at the first one; the model is in training mode; the
            number of seeds is not that of the images.
        RuntimeError: the bound is not finite; the message has the images concerned.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}; got {variance!r}")
    nodes = (times or Nodes()).nodes(model.sde)
    steps = len(nodes) - 1
    if draws is not None:
        refuse_odd(draws)
        if draws > 2 * steps:
            raise ValueError(f"draws must be at most {2 * steps}, two for each of the {steps} steps; got {draws}")
    bins = _bins(transform, images, levels)
    fraction, meaning = VARIANCES[variance]
    visits = "each step once" if draws is None else f"{draws} draws of the steps in {draws // 2} strata, 2 at node 0"
    conventions = {
        "levels": f"level k at T(k + 1/2), from {bins.low:g} to {bins.high:g} in model space, not dequantised",
        "chain": f"{len(nodes)} nodes from t={float(nodes[0]):g} to {float(nodes[-1]):g}; for each image {visits}",
        "variance": meaning,
        "decoder": f"Gaussian over bins of width {bins.width:g}, the first and the last open",
    }
    per_step: list[Tensor] = []

    def nats(model: BaseModel, batch: Tensor, stream: RandomStream) -> NatsBound:
        x0 = transform(batch.to(double(batch)) + 0.5)
        bound, of_steps = _discrete(model, x0, stream, nodes, fraction, bins, draws)
        per_step.append(of_steps / (dimensions(images) * math.log(2)))
        return bound

    bound = bits_bound(model, images, transform, cond, seeds, batch_size, progress, nats, conventions)
    declared = getattr(transform, "levels", None) if levels is None else levels
    warn_if_above_uniform(bound.mean, count_levels(images, declared))
    return DiscreteBound(**vars(bound), steps=torch.cat(per_step), nodes=nodes)


def _discrete(
    model: BaseModel,
    x0: Tensor,
    stream: RandomStream,
    nodes: Tensor,
    fraction: float | None,
    bins: Bins,
    draws: int | None,
) -> tuple[NatsBound, Tensor]:
    """Return the bound of data x0 (B, *) in model space, and the term of each step (B, N-1), in nats, on the CPU."""
    count, steps = len(x0), len(nodes) - 1

    def term(index: Tensor) -> Tensor:
        t = nodes[index]
        eps = stream.normal(x0)
        views = model.predict(model.sde.perturb(x0, t, eps), t)
        nu = views.variance if fraction is None else fraction
        if nu is None:
            raise ValueError(
                "variance='learned' needs a model with a learned variance, and this one has none: build it with "
                "ScoreModel(..., learned_variance=True), or choose 'posterior' or 'forward'"
            )
        nats = chain_term(model.sde, nodes, index, x0, -views.error(x0, eps).denoised, nu, bins)
        return dimensions(x0) * float64(nats).cpu()

    strata, repeats = (steps, 1) if draws is None else (draws // 2, 2)
    edges = [stratum * steps // strata for stratum in range(strata + 1)]
    estimates, total, visits = [], torch.zeros(count, steps, dtype=torch.float64), torch.zeros(count, steps)
    for first, end in pairwise(edges):
        for _ in range(repeats):
            step = first + ((end - first) * uniform(stream, count)).long()
            value = term(step + 1)
            total.scatter_add_(1, step[:, None], value[:, None])
            visits.scatter_add_(1, step[:, None], torch.ones(count, 1))
            estimates.append(strata * (end - first) * value)  # their mean over all draws estimates the sum over steps
    diffusion = torch.stack(estimates)
    reconstruction = torch.stack([term(torch.zeros(count, dtype=torch.long)) for _ in range(repeats)])
    terms = {
        "prior": model.sde.prior_divergence(x0).cpu(),
        "diffusion": diffusion.mean(dim=0),
        "reconstruction": reconstruction.mean(dim=0),
    }
    return NatsBound(terms, None if draws is None else (terms["prior"] + diffusion, reconstruction)), total / visits


def _bins(transform: Transform, images: Tensor, levels: int | None) -> Bins:
    """Return the positions of the grey levels in model space.

    Raises:
        ValueError: the number of levels is unknown, an image has values that are not levels, or the levels are not
            equally spaced.
    """
    levels = getattr(transform, "levels", None) if levels is None else levels
    if levels is None:
        raise ValueError(f"{transform} does not define the number of grey levels: pass levels, such as 256 for 8 bits")
    check_levels(images, levels)
    probes = torch.tensor([0.5, 1.5, levels / 2, levels - 0.5], dtype=torch.float64)
    positions = torch.stack([transform(k.expand(images[:1].shape)) for k in probes]).flatten(1)
    low, width = positions[0, 0], positions[1, 0] - positions[0, 0]
    expected = (low + width * (probes - 0.5))[:, None].expand_as(positions)
    if not bool(width > 0 and torch.allclose(positions, expected, rtol=0.0, atol=1e-6 * float(width))):
        raise ValueError(
            f"the grey levels must be increasing and equally spaced in model space; {transform} does not place them "
            "so: use data.Levels"
        )
    return Bins(float(width), float(low), float(expected[-1, 0]))
