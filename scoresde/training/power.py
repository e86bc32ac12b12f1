"""Profiles of power-function averages: what each step weighs in an average, and profiles made of others.

The average of the parameters theta(1), theta(2), ... with the exponent gamma > 0 (2312.02696, section 3.1),

    average(t) = b(t) average(t - 1) + (1 - b(t)) theta(t),       b(t) = (1 - 1/t)^(gamma + 1),

remembers a constant fraction of the training so far. The product of b from i + 1 to t is (i/t)^(gamma + 1), so that
theta(i) has in average(t) exactly the weight

    p(i) = (i/t)^(gamma + 1) - ((i - 1)/t)^(gamma + 1),           i = 1 .. t,

its profile: the integral over a step of the density (gamma + 1) tau^gamma / t^(gamma + 1). A profile's width is named
by the standard deviation of that density in units of t,

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2)  < 12^(-1/2) = 0.2887, the mean of all steps.

A profile q is near a combination sum_k x_k p_k of others (appendix C). The x_k minimise |sum_k x_k p_k - q|, the norm
being that of sums over all integer steps (exact: no integral stands in for them), and sum to 1. The paper does not ask
for the latter: with few profiles its solution scales a parameter that stands still, such as the gain of a
normalisation.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WIDEST = 12**-0.5  # sigma_rel of gamma = 0
CHUNK = 2**18  # steps summed at once
NEGLIGIBLE = 1e-12  # eigenvalues of the normalised inner products below this fraction of the largest are rounding


def sigma_rel_of(gamma: float) -> float:
    """The relative width of the profile of an exponent (2312.02696, section 3.1)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile, the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.

    Raises:
        ValueError: a width outside (0, 0.2887).
    """
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(f"a sigma_rel between 0 and {WIDEST:.4f} expected, for example 0.1; got {sigma_rel}")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def rate(gamma: float, step: int) -> float:
    """1 - b(t) of an exponent at step t."""
    return 1.0 if step == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / step))


def inner_products(steps: Sequence[int], sigma_rels: Sequence[float]) -> Tensor:
    """sum_i p_k(i) p_l(i) of the profiles of these steps and widths, exact but for float64's rounding: (K, K)."""
    times, which = torch.tensor(steps, dtype=torch.float64).unique(return_inverse=True)
    widths = sorted(set(sigma_rels))
    width = torch.tensor([widths.index(sigma_rel) for sigma_rel in sigma_rels])
    power = torch.tensor([gamma_of(sigma_rel) for sigma_rel in widths], dtype=torch.float64) + 1
    same_step = _same_step_products([int(time) for time in times], power)  # (times, widths, widths)
    earlier = torch.minimum(which[:, None], which)
    later = torch.maximum(which[:, None], which)
    longer = torch.where(which[:, None] > which, width[:, None], width)  # the width of the later profile,
    shrunk = (times[earlier] / times[later]) ** power[longer]  # which up to the earlier step is this times
    return shrunk * same_step[earlier, width[:, None], width]  # the one that ends there


def _same_step_products(times: list[int], power: Tensor) -> Tensor:
    """The inner products of profiles of one step, for ascending steps and all pairs of powers gamma + 1."""
    total, done, found = torch.zeros(len(power), len(power), dtype=torch.float64), 0, []
    for time in times:
        while done < time:
            end = min(done + CHUNK, time)
            steps = torch.arange(done + 1, end + 1, dtype=torch.float64)
            weights = (steps / end) ** power[:, None] * -torch.expm1(power[:, None] * torch.log1p(-1 / steps))
            shrunk = (done / end) ** power
            total = shrunk[:, None] * total * shrunk + weights @ weights.T
            done = end
        found.append(total)
    return torch.stack(found)


def combination(products: Tensor) -> tuple[Tensor, float]:
    """The x with sum 1 that minimises |sum_k x_k p_k - q|, and the relative residual; q is the last profile."""
    norms = products.diagonal().sqrt()
    cosines = products / norms[:, None] / norms
    values, vectors = torch.linalg.eigh(cosines[:-1, :-1])
    kept = values > NEGLIGIBLE * values[-1]
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    ones = norms[-1] / norms[:-1]  # the coefficients are those of p_k / |p_k| and q / |q|
    free, shift = inverse @ cosines[:-1, -1], inverse @ ones
    y = free + shift * (1 - ones @ free) / (ones @ shift)
    squared = y @ cosines[:-1, :-1] @ y - 2 * y @ cosines[:-1, -1] + 1
    return y * ones, math.sqrt(max(float(squared), 0.0))
