r"""Weighted particles: their weights, resampling, and the estimate of the evidence with its error.

Sequential Monte Carlo multiplies the weights w of N particles by a factor at each time. When the effective sample size
(sum w)^2 / sum w^2 falls below a fraction of N, the particles are resampled at equally spaced points of the cumulative
weights (systematic resampling), and the weights become 1. The estimate of the evidence is the product of the mean
weights before each resampling and at the end; it is unbiased.

**Error of the evidence.** With S_e the final weight of all descendants of the initial particle e, the relative variance
of the estimate is about sum_e S_e^2 - 1/N, less the part sum f (1 - f) / N^2 due to rounding N w to whole numbers of
offspring with fractions f (Chan and Lai, "A general theory of particle filters in hidden Markov models", 2013; Lee and
Whiteley, 1509.00394, for multinomial resampling). It is too small if few initial particles have descendants. `pooled`
estimates the error from independent runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.counting import Evaluations
from scoresde.random_stream import RandomStream
from scoresde.result_table import Result, cost, counted, plus_minus, states
from scoresde.tensors import check_integer, float64


@dataclass(repr=False)
class Particles(Result):
    """Weighted samples of a posterior, from sequential Monte Carlo.

    Expectations under the posterior are sum_i exp(log_weights_i) f(x_i).

    Attributes:
        x: samples (N, *).
        log_weights: logarithms of their weights, which add up to 1, float64 (N,).
        log_evidence: log of the estimate of p(y), in nats. The estimate is unbiased, its log is too low by half its
            relative variance.
        stderr: the standard error of log_evidence, from the final weights S_e of the descendants of each initial
            particle e, sum_e S_e^2 - 1/N (Chan and Lai, 2013), less the part that systematic resampling saves. It is
            too small if `ancestors` is small; `pooled` estimates the error from independent runs.
        ess: effective sample size at each time before resampling, (K,).
        resampled: number of times that the particles were resampled.
        ancestors: number of initial particles with descendants.
        nfe, backward: evaluations of the network and backward passes, each of a batch of particles.
    """

    x: Tensor
    log_weights: Tensor
    log_evidence: float
    stderr: float
    ess: Tensor
    resampled: int
    ancestors: int
    nfe: int
    backward: int

    def heading(self) -> str:
        return f"Particles: {counted(len(self.x), 'particle')}"

    def rows(self) -> dict[str, str]:
        least = f"{float(self.ess.min()):.3g}" if len(self.ess) else "unknown"
        return {
            "states": states(self.x),
            "log p(y)": f"{plus_minus(self.log_evidence, self.stderr)} nats",
            "least effective size": f"{least}, resampled {self.resampled} times",
            "ancestors": f"{self.ancestors:,} of {len(self.x):,}",
            "evaluations": cost(self.nfe, self.backward, "for the batch"),
        }

    @property
    def weights(self) -> Tensor:
        """The weights, which add up to 1, float64 (N,)."""
        return self.log_weights.exp()

    def mean(self) -> Tensor:
        """Return the posterior mean, of shape `*`, float64."""
        return torch.einsum("n,n...->...", self.weights, float64(self.x))

    def variance(self) -> Tensor:
        """Return the posterior variance of each dimension, of shape `*`, float64."""
        return torch.einsum("n,n...->...", self.weights, (float64(self.x) - self.mean()).square())

    def draw(self, n: int, seed: int) -> Tensor:
        """Return n samples (n, *) without weights, by systematic resampling; some particles may occur several times."""
        check_integer("n", n, 0)
        return self.x[systematic(self.weights, n, RandomStream(seeds=[seed]))]


def pooled(runs: Sequence[Particles]) -> Particles:
    """Return the particles of independent runs as one, with the standard error of log p(y) from their spread.

    The estimate of p(y) is the mean of the estimates of the runs. Each run has a share of the weight in proportion to
    its estimate.

    Args:
        runs: the results of at least two runs of `TwistedParticles` with different seeds.

    Raises:
        ValueError: there are fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(f"runs must be at least 2 independent runs; got {len(runs)}")
    log_evidences = float64([run.log_evidence for run in runs])
    shares = log_evidences.log_softmax(0).to(runs[0].log_weights.device)
    ratios = len(runs) * shares.exp()
    return Particles(
        x=torch.cat([run.x for run in runs]),
        log_weights=torch.cat([share + run.log_weights for share, run in zip(shares, runs, strict=True)]),
        log_evidence=float(log_evidences.logsumexp(0)) - math.log(len(runs)),
        stderr=float(ratios.std()) / math.sqrt(len(runs)),
        ess=torch.stack([run.ess for run in runs]).sum(dim=0),
        resampled=sum(run.resampled for run in runs),
        ancestors=sum(run.ancestors for run in runs),
        nfe=sum(run.nfe for run in runs),
        backward=sum(run.backward for run in runs),
    )


def systematic(weights: Tensor, n: int, stream: RandomStream) -> Tensor:
    """Return the indices (n,) of a systematic resampling: where the cumulative weights reach (i + u)/n, u uniform."""
    u = stream.uniform(torch.empty(1, 1, dtype=torch.float64)).to(weights.device)[0]
    positions = (torch.arange(n, dtype=torch.float64, device=weights.device) + u) / n
    cumulative = weights.cumsum(0)
    return torch.searchsorted(cumulative / cumulative[-1], positions, right=True).clamp(max=len(weights) - 1)


class Cloud:
    """The weights, the ancestors and the evidence of the particles during a run.

    Args:
        count: number of particles, N.
        device: their device.
        threshold: fraction of N below which an effective sample size leads to resampling.
        stream: the stream of the batch.

    Raises:
        ValueError: there are fewer than two particles.
    """

    def __init__(self, count: int, device: torch.device, threshold: float, stream: RandomStream):
        if count < 2:
            raise ValueError(f"shape must be (N, *) with at least 2 particles; got {count}")
        self.count, self.threshold, self.stream = count, threshold, stream
        self.log_weights = torch.zeros(count, dtype=torch.float64, device=device)
        self.roots = torch.arange(count, device=device)
        self.log_evidence, self.rounding, self.times = 0.0, 0.0, 0
        self.ess: list[Tensor] = []

    def weigh(self, log_factors: Tensor) -> None:
        """Multiply the weights by factors with these logarithms (N,), and record the effective sample size.

        Raises:
            RuntimeError: a weight is NaN or infinite, or all weights are 0.
        """
        self.log_weights = self.log_weights + log_factors.to(self.log_weights.device)
        top = self.log_weights.max()
        if not bool(torch.isfinite(top)) or bool(self.log_weights.isnan().any()):
            raise RuntimeError(
                "particles have weights that are NaN or infinite, or all weights are 0: check that the network gives "
                "finite values, or take more steps or a wider twist (data_std)"
            )
        self.ess.append(1 / self.log_weights.softmax(0).square().sum())

    def resampled(self) -> Tensor | None:
        """Return the rows of the particles that continue, or None if all of them do."""
        if not self.ess[-1] < self.threshold * self.count:
            return None
        weights = self.log_weights.softmax(0)
        rows = systematic(weights, self.count, self.stream)
        fractions = (self.count * weights).frac()
        self.rounding += float((fractions * (1 - fractions)).sum()) / self.count**2
        self._bank()
        self.roots, self.times = self.roots[rows], self.times + 1
        self.log_weights = torch.zeros_like(self.log_weights)
        return rows

    def _bank(self) -> None:
        """Multiply the evidence by the mean weight."""
        self.log_evidence += float(self.log_weights.logsumexp(0)) - math.log(self.count)

    def particles(self, x: Tensor, count: Evaluations) -> Particles:
        """Return the result, with the particles x."""
        self._bank()
        log_weights = self.log_weights.log_softmax(0)
        families = torch.zeros_like(log_weights).index_add(0, self.roots, log_weights.exp())
        variance = (float(families.square().sum()) - 1 / self.count) * self.count / (self.count - 1) - self.rounding
        return Particles(
            x, log_weights, self.log_evidence, math.sqrt(max(variance, 0.0)), torch.stack(self.ess).cpu(), self.times,
            int((families > 0).sum()), count.forward, count.backward,
        )  # fmt: skip
