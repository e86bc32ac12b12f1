r"""Means and variances of a posterior by multilevel Monte Carlo (2409.15511).

The samples x of a posterior model, drawn with n_0 < n_1 < ... steps of a deterministic sampler, are functions of the
noise x_T that they start from. From the same x_T, samples with n_l and with n_(l-1) steps differ little, so that few of
these differences correct the mean of many cheap samples (`scoresde.multilevel`). The estimated quantities are

    E[x]    and    E[(x - c)^2],        Var[x] = E[(x - c)^2] - (E[x] - c)^2,

entry by entry. c is the mean of a few further samples, so that the difference loses no digits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from scoresde.multilevel import Level, Multilevel, estimate
from scoresde.protocols import Model
from scoresde.result_table import Result, cost, range_of, typical_error
from scoresde.samplers import DPMSolverPP, PredictorCorrector, Sampler
from scoresde.score import device_of
from scoresde.tensors import check_integer, float64

STEPS = (8, 16, 32, 64, 128, 256)
CENTRE = 16  # number of samples whose mean is c of the module docstring
APART = 2**48  # distance of the seeds of different values of `seed`; those of one estimate are smaller


@dataclass(repr=False)
class PosteriorMoments(Result):
    """Means and variances of the entries of a posterior.

    mean, variance: float64 (*). mean_stderr, variance_stderr: their standard errors (*), which include the estimated
    bias of the finest sampler that was used. nfe, backward: evaluations of the network and backward passes, summed over
    all samples. plain: the cost, nfe + backward, of plain Monte Carlo: independent samples of the finest sampler that
    was used, with the same standard error; the bias is not counted. estimate: the multilevel estimate; its values are
    stacked, E[x] and E[(x - c)^2], (2, *).
    """

    mean: Tensor
    variance: Tensor
    mean_stderr: Tensor
    variance_stderr: Tensor
    nfe: int
    backward: int
    plain: float
    estimate: Multilevel

    def heading(self) -> str:
        return f"PosteriorMoments of states {tuple(self.mean.shape)}"

    def rows(self) -> dict[str, str]:
        return {
            "mean": range_of(self.mean),
            "  error": typical_error(self.mean_stderr, "an entry", "samples and steps"),
            "standard deviation": range_of(self.std),
            "variance, error": typical_error(self.variance_stderr, "an entry", "samples and steps"),
            "evaluations": cost(self.nfe, self.backward, "in all"),
        }

    @property
    def std(self) -> Tensor:
        """The standard deviation of each entry (*)."""
        return self.variance.sqrt()


def posterior_moments(
    posterior: Model,
    shape: Sequence[int],
    tolerance: float,
    sampler: Callable[[int], Sampler] | None = None,
    steps: Sequence[int] = STEPS,
    pilot: int = 16,
    batch_size: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PosteriorMoments:
    """Estimate the mean and the variance of each entry of the samples of a model, by multilevel Monte Carlo.

    Samples with n_0 < n_1 < ... steps of a deterministic sampler from the same noise differ little, so that few of
    these differences correct the means of many cheap samples (2409.15511). Estimated are E[x] and E[(x - c)^2], entry
    by entry, with c the mean of 16 further samples; Var[x] = E[(x - c)^2] - (E[x] - c)^2.

        moments = ss.inverse.posterior_moments(ss.inverse.MMPS(model, operator, y), (3, 32, 32), tolerance=0.01)

    Args:
        posterior: the model of p(x | y), such as `MMPS(model, operator, y)` with one measurement y; any other model
            works as well.
        shape: the shape `*` of one state.
        tolerance: the error to reach, in root mean square over the entries of E[x] and E[(x - c)^2].
        sampler: a function of the number of steps that returns a deterministic sampler; default:
            `PredictorCorrector(DPMSolverPP(2), steps=n)`.
        steps: the numbers of steps, increasing. The later ones are only used if the bias needs them.
        pilot: number of samples with which each level begins.
        batch_size: samples at a time.
        seed: seed of the estimate; others give independent estimates.
        dtype: of the states.

    Warns:
        UserWarning: samples with the largest numbers of steps still differ by more than a third of the tolerance.

    Raises:
        TypeError: a number of steps, batch_size or seed is not an integer.
        ValueError: the numbers of steps do not increase, the sampler is not deterministic, batch_size < 1, or seed < 0;
            see also `multilevel.estimate`.
    """
    for n in steps:
        check_integer("steps", n, 1)
    if len(steps) < 2 or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"steps must be at least two increasing numbers; got {list(steps)}: give steps=(8, 16, 32)")
    draws = _Draws(posterior, tuple(shape), sampler or _default, batch_size, seed, dtype)
    centre = draws.centre(steps[0])

    def values(x: Tensor) -> Tensor:
        return torch.stack([x, (x - centre).square()], dim=1)

    def level(fine: int, coarse: int | None) -> Level:
        def terms(items: Tensor, repeats: Tensor) -> Tensor:
            fine_values = values(draws(items.tolist(), fine))
            return fine_values if coarse is None else fine_values - values(draws(items.tolist(), coarse))

        name = f"{fine} steps" if coarse is None else f"{fine} - {coarse} steps"
        return Level(name, fine + (coarse or 0), terms)

    levels = [level(n, before) for n, before in zip(steps, [None, *steps], strict=False)]
    result = estimate(levels, tolerance, pilot=pilot)
    (mean, square), (error, square_error) = result.mean, result.error
    offset = mean - centre
    passes = (draws.nfe + draws.backward) / draws.taken  # of one step
    variance, reached = float(result.terms[0].within.mean()), float(result.stderr.square().mean())
    wanted = variance / reached if reached else 1.0  # samples; one if all are equal
    return PosteriorMoments(
        mean,
        (square - offset.square()).clamp(min=0),
        error,
        torch.hypot(square_error, 2 * offset * error),
        draws.nfe,
        draws.backward,
        wanted * steps[len(result.terms) - 1] * passes,
        result,
    )


def _default(steps: int) -> Sampler:
    return PredictorCorrector(DPMSolverPP(2), steps=steps)


class _Draws:
    """Samples by their seeds, and the evaluations that they took.

    nfe, backward: evaluations and backward passes so far. taken: steps so far, summed over samples.
    """

    def __init__(
        self,
        model: Model,
        shape: tuple[int, ...],
        sampler: Callable[[int], Sampler],
        batch_size: int,
        seed: int,
        dtype: torch.dtype,
    ):
        self.model, self.shape, self.sampler, self.dtype = model, shape, sampler, dtype
        check_integer("batch_size", batch_size, 1)
        check_integer("seed", seed, 0)
        self.batch_size, self.seed = batch_size, seed
        self.nfe = self.backward = self.taken = 0

    def __call__(self, items: Sequence[int], steps: int) -> Tensor:
        """Return the samples (n, *), float64, of these items."""
        size, batches = self.batch_size, []
        for i in range(0, len(items), size):
            seeds = [self.seed * APART + item for item in items[i : i + size]]
            drawn = self._sample(steps, shape=(len(seeds), *self.shape), seeds=seeds, device=device_of(self.model))
            batches.append(float64(drawn).cpu())
        return torch.cat(batches)

    def centre(self, steps: int) -> Tensor:
        """Return the mean of a few samples, with seeds of their own, after checking that the sampler is deterministic.

        Raises:
            ValueError: from equal starts and different seeds, the sampler returns different samples.
        """
        first = self([APART - 1 - i for i in range(CENTRE)], steps)
        start = torch.ones(2, *self.shape, dtype=self.dtype, device=device_of(self.model))
        a, b = self._sample(steps, x_T=start * self.model.sde.prior_std, seeds=[0, 1])
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(first.std())):
            raise ValueError(
                "sampler must be deterministic, so that samples with different numbers of steps start from the same "
                "noise and stay close; got one that draws noise: use DPMSolverPP(2) (sampler=dpmpp2), DDIM() or "
                "another method with l=0"
            )
        return first.mean(dim=0)

    def _sample(self, steps: int, **how) -> Tensor:
        result = self.sampler(steps)(self.model, dtype=self.dtype, **how)
        self.taken += steps * len(result.x)
        self.nfe += result.nfe * len(result.x)
        self.backward += result.backward * len(result.x)
        return result.x
