"""Errors of samples of a posterior that is a known mixture of Gaussians; used by `posterior.py`.

For each measurement:

- energy distance (unbiased, 0 for exact draws) and sliced 2-Wasserstein distance to exact draws;
- error of weights: the largest error of the mean component probability p(k | x) over samples;
- coverage: the exact probability of the interval between the 5% and the 95% quantile of the samples, mean over entries.
"""

import math
import sys
import warnings
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from posterior_methods import Method, Problem
from samplers import seeded
from torch import Tensor

import scoresde as ss
from scoresde.counting import counting
from scoresde.metrics import sliced_wasserstein

METRICS = ("energy", "sliced", "weights", "coverage")
TRUTHS = 4  # exact draws for each sample


@dataclass(frozen=True)
class Target:
    """Measurements y (P, *m) of a problem, the exact posterior of each, and exact draws of it, (P, n, *)."""

    problem: Problem
    y: Tensor
    posteriors: tuple[ss.GaussianMixture, ...]
    truth: Tensor

    @cached_property
    def spread(self) -> Tensor:
        """E|z - z'| for two exact draws, (P,)."""
        return mean_distance(self.truth)


@cache
def target_of(problem: Problem, count: int, samples: int, seed: int) -> Target:
    """Return `count` measurements of a problem, with TRUTHS exact draws for each of `samples` samples."""
    y = problem.measurements(count, seed)
    posteriors = tuple(problem.oracle.posterior(problem.operator, one) for one in y)
    draws = (law.sample(TRUTHS * samples, generator=seeded(10_000 + seed + i)) for i, law in enumerate(posteriors))
    return Target(problem, y, posteriors, torch.stack(list(draws)))


def mean_distance(x: Tensor) -> Tensor:
    """Return the mean distance of two different ones of the states x (P, n, *), (P,)."""
    return torch.cdist(x.flatten(2), x.flatten(2)).sum(dim=(1, 2)) / (x.shape[1] * (x.shape[1] - 1))


def energies(x: Tensor, target: Target) -> Tensor:
    """Return the unbiased energy distance of samples x (P, n, *) for each measurement, (P,); inf if not finite."""
    between = torch.cdist(x.flatten(2), target.truth.flatten(2)).mean(dim=(1, 2))
    return (2 * between - mean_distance(x) - target.spread).nan_to_num(math.inf, math.inf, math.inf)


def errors(x: Tensor, posterior: ss.GaussianMixture, truth: Tensor) -> list[float]:
    """Return sliced W2, error of weights and coverage of samples x (N, *) of a posterior with exact draws `truth`."""
    weights = posterior.log_posterior(x).exp().mean(dim=0)
    return [
        float(sliced_wasserstein(x, truth, 64, generator=seeded(0))),
        float((weights - posterior.log_weights.exp()).abs().max()),
        coverage(x, posterior),
    ]


def coverage(x: Tensor, posterior: ss.GaussianMixture) -> float:
    """Return the exact probability between the 5% and 95% quantiles of the samples, mean over entries of the state."""
    ends = torch.quantile(x.flatten(1), torch.tensor([0.05, 0.95], dtype=x.dtype), dim=0)
    rotation = torch.eye(ends.shape[1], dtype=x.dtype) if posterior.rotation is None else posterior.rotation
    stds = (rotation * posterior.stds[:, None, :]).square().sum(dim=2).sqrt()
    below = torch.special.ndtr((ends[:, None] - posterior.means) / stds)
    return float(torch.einsum("k,qki->qi", posterior.log_weights.exp(), below).diff(dim=0).mean())


def sampled(target: Target, method: Method, setting: str, samples: int, budget: int, seed: int) -> tuple[Tensor, float]:
    """Return samples (P, N, *) and the passes for each; infinite samples if the method fails.

    Raises:
        RuntimeError: the method makes more passes than the budget.
    """
    with counting() as passes, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            x = method.settings[setting](target.problem, target.y, samples, budget, seed)
        except (RuntimeError, ValueError) as error:
            print(f"{target.problem}, {budget} passes, {method.name}, {setting}: {error}", file=sys.stderr)
            x = torch.full((len(target.y), samples, *target.truth.shape[2:]), math.inf, dtype=torch.float64)
    used = (passes.forward + passes.backward) / (len(target.y) if method.one_batch_each else 1)
    if used > budget:
        raise RuntimeError(f"a method must make at most {budget} passes; {method.name}, {setting} made {used:g}")
    return x, used


def measured(
    target: Target, method: Method, setting: str, samples: int, budget: int, seed: int
) -> tuple[np.ndarray, float]:
    """Return the METRICS for each measurement, (P, 4), infinite if a method fails, and the passes for each sample."""
    x, used = sampled(target, method, setting, samples, budget, seed)
    if not bool(torch.isfinite(x).all()):
        return np.full((len(x), len(METRICS)), math.inf), used
    rest = [errors(*entry) for entry in zip(x, target.posteriors, target.truth, strict=True)]
    return np.column_stack([energies(x, target).numpy(), np.array(rest)]), used
