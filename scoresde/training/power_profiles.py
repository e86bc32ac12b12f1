"""Profiles of power-function averages: the weight of each step in an average, and profiles combined from others.

The average of the parameters theta(1), theta(2), ... with the exponent gamma > 0 (2312.02696, section 3.1),

    average(t) = b(t) average(t - 1) + (1 - b(t)) theta(t),       b(t) = (1 - 1/t)^(gamma + 1),

covers a constant fraction of the training so far. The product of b from i + 1 to t is (i/t)^(gamma + 1), so the weight
of theta(i) in average(t) is exactly

    p(i) = (i/t)^(gamma + 1) - ((i - 1)/t)^(gamma + 1),           i = 1 .. t.

This profile p is the integral over each step of the density (gamma + 1) tau^gamma / t^(gamma + 1). Its width is the
standard deviation of that density in units of t,

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2)  < 12^(-1/2) = 0.2887,

where 12^(-1/2) is the width of the plain mean of all steps (gamma = 0).

A profile q is approximated by a combination sum_k x_k p_k of others (appendix C). The x_k minimise
|sum_k x_k p_k - q| and sum to 1. The norm sums over all integer steps exactly, without replacing sums by integrals. The
paper does not require that the x_k sum to 1: with few profiles the paper's solution rescales even a parameter that does
not change during training.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WIDEST = 12**-0.5  # sigma_rel of gamma = 0
CHUNK = 2**18  # steps summed at once
NEGLIGIBLE = 1e-12  # smaller eigenvalues of the normalised inner products, relative to the largest, are rounding errors


def sigma_rel_of(gamma: float) -> float:
    """Return the relative width of the profile with the exponent gamma (2312.02696, section 3.1)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of a profile, the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.

    Raises:
        ValueError: the width is outside (0, 0.2887).
    """
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(f"sigma_rel must lie between 0 and {WIDEST:.4f}, for example 0.1; got {sigma_rel}")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def rate(gamma: float, step: int) -> float:
    """Return 1 - b(t), with b as in the module docstring and t = step."""
    return 1.0 if step == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / step))


def inner_products(steps: Sequence[int], sigma_rels: Sequence[float]) -> Tensor:
    """Return the exact inner products sum_i p_k(i) p_l(i), (K, K), of the K profiles with these steps and widths."""
    times, index = torch.tensor(steps, dtype=torch.float64).unique(return_inverse=True)
    widths = sorted(set(sigma_rels))
    width = torch.tensor([widths.index(sigma_rel) for sigma_rel in sigma_rels])
    power = torch.tensor([gamma_of(sigma_rel) for sigma_rel in widths], dtype=torch.float64) + 1
    same_step = _same_step_products([int(time) for time in times], power)  # (times, widths, widths)
    earlier = torch.minimum(index[:, None], index)
    later = torch.maximum(index[:, None], index)
    # Up to the earlier step, the later profile is proportional to the profile of its width that ends there.
    later_width = torch.where(index[:, None] > index, width[:, None], width)
    factor = (times[earlier] / times[later]) ** power[later_width]
    return factor * same_step[earlier, width[:, None], width]


def _same_step_products(times: list[int], power: Tensor) -> Tensor:
    """Return the inner products (T, P, P) of P profiles at each of T ascending steps `times`.

    `power` (P,) holds gamma + 1 of each profile.
    """
    total, done, products = torch.zeros(len(power), len(power), dtype=torch.float64), 0, []
    for time in times:
        while done < time:
            end = min(done + CHUNK, time)
            steps = torch.arange(done + 1, end + 1, dtype=torch.float64)
            weights = (steps / end) ** power[:, None] * -torch.expm1(power[:, None] * torch.log1p(-1 / steps))
            factor = (done / end) ** power
            total = factor[:, None] * total * factor + weights @ weights.T
            done = end
        products.append(total)
    return torch.stack(products)


def combination(products: Tensor) -> tuple[Tensor, float]:
    """Return the x (K,) with sum 1 that minimises r = |sum_k x_k p_k - q|, and r / |q|.

    Letters as in the module docstring.

    Args:
        products: (K + 1, K + 1), the inner products of the profiles p_1, ..., p_K, q.
    """
    norms = products.diagonal().sqrt()
    cosines = products / norms[:, None] / norms
    values, vectors = torch.linalg.eigh(cosines[:-1, :-1])
    is_significant = values > NEGLIGIBLE * values[-1]
    inverse = (vectors[:, is_significant] / values[is_significant]) @ vectors[:, is_significant].T
    ones = norms[-1] / norms[:-1]  # the coefficients are those of p_k / |p_k| and q / |q|
    free, shift = inverse @ cosines[:-1, -1], inverse @ ones
    y = free + shift * (1 - ones @ free) / (ones @ shift)
    squared = y @ cosines[:-1, :-1] @ y - 2 * y @ cosines[:-1, -1] + 1
    return y * ones, math.sqrt(max(float(squared), 0.0))
