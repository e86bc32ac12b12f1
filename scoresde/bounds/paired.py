r"""The evidence bounds of several models on the same data, with common random numbers and early elimination.

All models have the same times, noise and dequantisations, which depend on the seeds alone, so that most of the noise of
the bounds cancels in their differences (Diffusion Classifier, 2303.16203, section 3.3). The draws of a bound come in
pairs that share a stratum (`bounds.bound`), so the covariance of the K bounds is, as the variance of one, a sum over
pairs.

Early elimination. The draws are made in rounds, each as large as all before it. After a round, a model is dropped if it
lies below the best one by more than c standard errors of their paired difference: c is the quantile of Student's t that
has the tail probability of `confidence` standard deviations of a normal variable. The degrees of freedom are those of
the standard error, about (sum of v)^2 / (sum of v^2) for the measured variances v of the strata (Satterthwaite 1946).
The estimate of a dropped model is that of the best one in all rounds, plus the difference of the two in their common
rounds. A sample is finished when one model is left.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from scoresde.bounds.evidence import continuous_nats
from scoresde.counting import counting
from scoresde.dequantization import DataMap
from scoresde.losses import TimeDensity
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel
from scoresde.tensors import check_integer, float64


class Evidence(NamedTuple):
    """Estimates of log p(x | model k), nats.

    value: the estimates (B, K), float64. covariance: that of their errors, (B, K, K); None if it is unknown. draws: the
    draws of each model, int64 (B, K). nfe, backward: network evaluations, and products with Jacobians of the networks,
    of all models together, int64 (B,).
    """

    value: Tensor
    covariance: Tensor | None
    draws: Tensor
    nfe: Tensor
    backward: Tensor


def round_sizes(draws: int, rounds: int) -> list[int]:
    """Return the draws of each round, n, n, 2 n, 4 n, ..., which add up to `draws`.

    Raises:
        ValueError: draws is not a multiple of 2^rounds: the draws of a round come in pairs.
    """
    check_integer("draws", draws, 2)
    check_integer("rounds", rounds, 1)
    if draws % 2**rounds:
        raise ValueError(f"draws must be a multiple of 2^rounds = {2**rounds}, for rounds of even size; got {draws}")
    totals = [0, *(draws >> (rounds - 1 - i) for i in range(rounds))]
    return [last - first for first, last in pairwise(totals)]


def paired_nats(
    models: Sequence[BaseModel],
    x: Tensor,
    log_prior: Tensor,
    sizes: Sequence[int],
    confidence: float,
    seeds: Sequence[int],
    times: TimeDensity | None = None,
    data_map: DataMap | None = None,
) -> Evidence:
    """Return minus the evidence bounds of x under K models, in rounds with early elimination (module docstring).

    Args:
        models: K models, in eval mode.
        x: data (B, *), see `continuous_nats`.
        log_prior: logarithm of the prior of each model, (K,): elimination compares the sums of it and the estimates.
        sizes: draws of each round, even numbers, see `round_sizes`.
        confidence: significance of a difference at which a model is dropped, in standard deviations.
        seeds: one per sample, the same for all models.
        times, data_map: see `continuous_nats`.
    """
    count, stream = len(x), RandomStream(seeds=seeds)
    alive = torch.ones(count, len(models), dtype=torch.bool)
    last, cost, terms = torch.full(alive.shape, -1), torch.zeros(2, count, dtype=torch.int64), []
    for number, size in enumerate(sizes):
        keys = stream.seeds(count)
        last[alive] = number
        columns: list[Tensor | None] = [None] * len(models)
        for k in (alive.any(dim=0) | (count == 0)).nonzero().flatten().tolist():
            rows = alive[:, k].nonzero().flatten()
            part, own = models[k].rows(rows, count), [keys[i] for i in rows.tolist()]
            with torch.no_grad(), counting() as evaluations:
                estimates = continuous_nats(
                    part, x[rows.to(x.device)], draws=size, times=times, seeds=own, data_map=data_map
                ).estimates
            drawn = -torch.cat([float64(values).cpu() / len(values) for values in estimates or ()])
            columns[k] = torch.zeros(len(drawn), count, dtype=torch.float64).index_copy(1, rows, drawn)
            cost[:, rows] += torch.tensor([[evaluations.forward], [evaluations.backward]])
        blank = next(torch.zeros_like(column) for column in columns if column is not None)
        terms.append(torch.stack([blank if column is None else column for column in columns], dim=2))
        estimate = _Estimates(terms, sizes, last, log_prior)
        alive &= ~estimate.is_below(confidence)
        alive &= (alive.sum(dim=1) > 1)[:, None]
        if not bool(alive.any()):
            break
    totals = torch.tensor(sizes).cumsum(0)
    return Evidence(estimate.linear.sum(dim=0), estimate.covariance(), totals[last], *cost)


class _Estimates:
    """The estimates of the classes after some rounds, as sums of independent terms.

    linear: terms (n, B, K) whose sum is the estimate. Consecutive pairs share a stratum, so that the covariance of sums
    of terms is the sum over pairs of products of their differences. best: the number of the best class, (B,).

    Args:
        terms: of each round, the terms (n, B, K) whose sum is its estimate; zero for classes that have none.
        sizes: the draws of each round, the weights of the rounds.
        last: the last round of each class, (B, K).
        log_prior: added to the estimates to find the best class.
    """

    def __init__(self, terms: Sequence[Tensor], sizes: Sequence[int], last: Tensor, log_prior: Tensor):
        self.log_prior, totals = log_prior, torch.tensor(sizes).cumsum(0)
        shares = [torch.where(last >= r, sizes[r] / totals[last].double(), 0.0) for r in range(len(terms))]
        value = torch.stack([share * part.sum(dim=0) for share, part in zip(shares, terms, strict=True)]).sum(dim=0)
        is_full = last == last.max(dim=1, keepdim=True).values
        self.best = torch.where(is_full, value + log_prior, -math.inf).argmax(dim=1)
        self.linear = torch.cat(
            [
                share * part + (self._of_best(share) - share) * self._of_best(part)
                for share, part in zip(shares, terms, strict=True)
            ]
        )

    def _of_best(self, values: Tensor) -> Tensor:
        """Select the best class of values (..., B, K), as (..., B, 1)."""
        index = self.best[:, None].expand(*values.shape[:-1], 1)
        return values.gather(-1, index)

    def is_below(self, confidence: float) -> Tensor:
        """Return which classes (B, K) lie significantly below the best one, see the module docstring."""
        value = self.linear.sum(dim=0) + self.log_prior
        terms = self._of_best(self.linear) - self.linear
        variances = (terms[0::2] - terms[1::2]).square()
        total = variances.sum(dim=0)
        # A squared normal variable has the fourth moment 3, so that n equal pairs have n degrees of freedom.
        freedom = 3 * total.square() / variances.square().sum(dim=0).clamp(min=torch.finfo(total.dtype).tiny) - 2
        multiple = torch.from_numpy(stats.t.isf(stats.norm.sf(confidence), freedom.clamp(min=1).numpy()))
        return self._of_best(value) - value > multiple * total.sqrt()

    def covariance(self) -> Tensor:
        """Return the covariance of the errors of the estimates, (B, K, K)."""
        pairs = self.linear[0::2] - self.linear[1::2]
        return torch.einsum("pbk,pbj->bkj", pairs, pairs)
