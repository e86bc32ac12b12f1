"""Confidence intervals for the expectation of a statistic, from half-samples drawn without replacement."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST = 4  # samples that can be halved

Statistic = Callable[..., Tensor]


@dataclass(frozen=True)
class Interval:
    """The value of a statistic and an interval for its expectation."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Statistic,
    x: Tensor,
    y: Tensor | None = None,
    resamples: int = 200,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> Interval:
    """Return a statistic of samples and an interval for its expectation, from half-samples.

    Resampling with replacement repeats points, and distances between samples mistake repeated points for structure:
    they come out too large, by about their own bias once more. Halves drawn without replacement repeat no point. For n
    samples, the statistics of halves vary around their mean as the statistic itself varies around its expectation
    (the delete-d jackknife with d = n/2, whose factor (n - d)/d is 1: Shao and Wu 1989). Their mean has the bias of n/2
    samples and is subtracted: with v the value and e_q the quantiles of the halves minus their mean, the interval is

        [v + e_((1 - level)/2),  v + e_(1 - (1 - level)/2)].

    It covers the expectation of the statistic at N and M samples, around which repeated experiments scatter. For an
    unbiased statistic this is the distance; for a biased one, the distance with its bias. Measured between Gaussians in
    3 dimensions with 200 samples each (300 repetitions; sliced Wasserstein, energy and Frechet distance, error of the
    mean), 95% intervals cover it in 93% to nearly 100% of repetitions. Where P = Q they are too wide and nearly always
    cover it.

    Args:
        statistic: a function of (x, y), or of x alone, that returns `()`. `SlicedWasserstein` and `Discrepancy` are
            statistics of index sets: pass their `.all` as x and y.
        x, y: samples (N, ...) and (M, ...).
        resamples: number of halves drawn.
        level: confidence level.
        generator: draws the halves.

    Raises:
        ValueError: fewer than 4 samples, fewer than 2 resamples, or a level outside (0, 1).
    """
    samples = [x] if y is None else [x, y]
    if min(len(part) for part in samples) < FEWEST:
        raise ValueError(f"an interval needs at least {FEWEST} samples; got {[len(part) for part in samples]}")
    if resamples < 2 or not 0 < level < 1:
        raise ValueError(f"expected resamples >= 2 and level in (0, 1); got {resamples} and {level}")
    value = float(statistic(*samples))
    halves = torch.stack([statistic(*(_half(part, generator) for part in samples)) for _ in range(resamples)]).double()
    # The k-th smallest of R draws estimates the quantile k/(R + 1).
    tail = max((0.5 * (1 - level) * (resamples + 1) - 1) / (resamples - 1), 0.0)
    low, high = torch.quantile(halves - halves.mean(), halves.new_tensor([tail, 1 - tail])).tolist()
    return Interval(value, value + low, value + high)


def _half(samples: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw half of the samples without replacement."""
    order = torch.randperm(len(samples), generator=generator)
    return samples[order[: len(samples) // 2].to(samples.device)]
