"""Intervals of any statistic of samples, by halves drawn without replacement."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST = 4  # of a sample that is to be halved

Statistic = Callable[..., Tensor]


@dataclass(frozen=True)
class Interval:
    """A statistic and an interval for its expectation."""

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
    """A statistic of samples, and an interval for its expectation at these numbers of samples, by half-samples.

    Resampling with replacement repeats points, which distances between samples take for structure: they come out too
    large, by about their own bias once more. Halves drawn without replacement repeat nothing. Of n samples, the
    statistics of halves vary around their mean as the statistic itself does around its expectation (the delete-d
    jackknife with d = n/2, whose factor (n - d)/d is 1: Shao and Wu 1989). Their mean has the bias of n/2 samples, and
    is not used: with v the value and e_q the quantiles of the halves less their mean, the interval is

        [v + e_((1 - level)/2),  v + e_(1 - (1 - level)/2)].

    It is for the expectation of the statistic at N and M samples, what repetitions of the experiment scatter around: of
    an unbiased statistic, the distance itself; of a biased one, the distance with its bias. Measured between Gaussians
    in space with 200 samples each, intervals of 95% cover that in 93 to nearly 100% of repetitions (sliced Wasserstein,
    energy and Frechet distance, error of the mean; 300 of them), and nearly always where P = Q, too wide there.

    Args:
        statistic: a function of (x, y), or of x alone, to `()`; with `SlicedWasserstein` and `Discrepancy`, of the
            index sets `.all`.
        x, y: samples (N, ...) and (M, ...), the sample axis first.
        resamples: halves drawn.
        level: of confidence.
        generator: of the halves.

    Raises:
        ValueError: fewer than four samples, fewer than two resamples, or a level outside of (0, 1).
    """
    samples = [x] if y is None else [x, y]
    if min(len(part) for part in samples) < FEWEST:
        raise ValueError(f"{FEWEST} samples or more expected; got {[len(part) for part in samples]}")
    if resamples < 2 or not 0 < level < 1:
        raise ValueError(f"two resamples or more, and a level in (0, 1), expected; got {resamples}, {level}")
    value = float(statistic(*samples))
    halves = torch.stack([statistic(*(_half(part, generator) for part in samples)) for _ in range(resamples)]).double()
    # Of R draws the k-th smallest is the quantile k/(R + 1), in expectation.
    tail = max((0.5 * (1 - level) * (resamples + 1) - 1) / (resamples - 1), 0.0)
    low, high = torch.quantile(halves - halves.mean(), halves.new_tensor([tail, 1 - tail])).tolist()
    return Interval(value, value + low, value + high)


def _half(samples: Tensor, generator: torch.Generator | None) -> Tensor:
    """Half of the samples, drawn without replacement."""
    order = torch.randperm(len(samples), generator=generator)
    return samples[order[: len(samples) // 2].to(samples.device)]
