r"""The evidence bounds of several models on the same data, with common random numbers and early elimination.

All models have the same times, noise and dequantisations, which depend on the seeds alone, so that most of the noise of
the bounds cancels in their differences (Diffusion Classifier, 2303.16203, section 3.3). The range of times is divided
into strata with two draws each (`scoresde.bounds`). The variance of a bound is a sum over these pairs of draws, and so
is the covariance of the K bounds.

Early elimination. The draws are made in rounds. Each round after the first has as many draws as all rounds before it
together. After a round, every model whose estimate is more than c standard errors below the best one is dropped. The
standard error is that of the difference of the two estimates. The factor c is a quantile of Student's t-distribution:
its tail probability equals that of a normal distribution beyond `confidence` standard deviations. The degrees of
freedom are about (sum of v)^2 / (sum of v^2), with v the measured variances of the strata (Satterthwaite 1946).

The best model takes part in all rounds, a dropped model only in the first ones. The estimate of the dropped model is
the best model's estimate from all rounds, plus the difference of the two models in the rounds that they share. The
draws for a sample end when only one model is left.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import scipy  # its subpackages are imported where they are first used
import torch
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

    value: the estimates (B, K), float64. covariance: the covariance of their errors, (B, K, K); None if it is unknown.
    draws: the number of draws made for each model, int64 (B, K). nfe, backward: the numbers of network evaluations and
    of products with Jacobians of the networks, summed over the models, int64 (B,).
    """

    value: Tensor
    covariance: Tensor | None
    draws: Tensor
    nfe: Tensor
    backward: Tensor


def round_sizes(draws: int, rounds: int) -> list[int]:
    """Return the number of draws in each round: n, n, 2 n, 4 n, ..., with n such that they add up to `draws`.

    Raises:
        ValueError: draws is not a multiple of 2^rounds, so that a round would have an odd number of draws.
    """
    check_integer("draws", draws, 2)
    check_integer("rounds", rounds, 1)
    if draws % 2**rounds:
        raise ValueError(
            f"draws must be a multiple of 2^rounds = {2**rounds}, so that every round has an even number of draws; got "
            f"{draws}: change draws or rounds"
        )
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
        log_prior: logarithm of the prior probability of each model, (K,). It is added to the estimates to find the best
            model and the models to drop; the returned values do not contain it.
        sizes: number of draws in each round, even numbers, see `round_sizes`.
        confidence: significance at which a model is dropped, in standard deviations of a normal variable.
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
    """The estimates for B samples and K models after a number of rounds: sums with one term per draw.

    linear: the terms (n, B, K); their sum over the n draws is the estimate. Draws 2 i and 2 i + 1 share a stratum. With
    d_i the difference of their terms, (B, K), the covariance of models j and k is the sum over i of d_ij d_ik.
    best: the index of the best model, (B,).

    Args:
        terms: one tensor (n, B, K) for each round, whose sum over n is the estimate from this round alone; zero for
            models that were dropped before.
        sizes: number of draws in each round; rounds are weighted in proportion to it.
        last: the index of the last round that each model took part in, (B, K).
        log_prior: logarithm of the prior probabilities, (K,), added to the estimates to find the best model.
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
        """Return the entries of the best model in `values` (..., B, K), as a tensor (..., B, 1)."""
        index = self.best[:, None].expand(*values.shape[:-1], 1)
        return values.gather(-1, index)

    def is_below(self, confidence: float) -> Tensor:
        """Return a mask (B, K), True for each model significantly below the best one; see the module docstring."""
        value = self.linear.sum(dim=0) + self.log_prior
        terms = self._of_best(self.linear) - self.linear
        variances = (terms[0::2] - terms[1::2]).square()
        total = variances.sum(dim=0)
        # A squared normal variable has the fourth moment 3, so that n equal pairs have n degrees of freedom.
        freedom = 3 * total.square() / variances.square().sum(dim=0).clamp(min=torch.finfo(total.dtype).tiny) - 2
        quantile = scipy.special.stdtrit(freedom.clamp(min=1).numpy(), scipy.special.ndtr(-confidence))
        multiple = torch.from_numpy(quantile).abs()  # the quantile is negative, but +inf if the probability is 0
        return self._of_best(value) - value > multiple * total.sqrt()

    def covariance(self) -> Tensor:
        """Return the covariance of the errors of the estimates, (B, K, K)."""
        pairs = self.linear[0::2] - self.linear[1::2]
        return torch.einsum("pbk,pbj->bkj", pairs, pairs)
