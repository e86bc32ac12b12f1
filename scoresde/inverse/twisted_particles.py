r"""The twisted diffusion sampler (TDS, 2306.17775): weighted samples of p(x_0 | y), and the evidence p(y).

A sampler of the reverse SDE is a Markov chain x_s = F(x_t, z), z ~ N(0, I), from pure noise at t_max. With a last
kernel p(x_0 | x) = N(D(x), V) at t_min it is a model of the data, and the likelihood p(y | x_0) = N(y; A x_0, n^2 I)
gives it a posterior. Sequential Monte Carlo samples from this posterior. With a twist h_t(x) that approximates
p(y | x_t = x), each particle draws z from N(u, I) in place of N(0, I), so that it moves along grad log h_t, and is
weighted by

    h_T(x_T)  prod  N(z; 0, I) h_s(x_s) / (N(z; u, I) h_t(x_t)),

where h at t_min is the exact integral of p(y | x_0) over the last kernel. For a Gaussian transition p(x_s | x_t), the
fraction is that of the paper, p(x_s | x_t) h_s / (q(x_s | x_t) h_t). In the limit of many particles the weighted
samples follow the posterior of the chain for any twist. For any number of particles, the product of mean
weights is an unbiased estimate of the chain's evidence. A good twist makes the weights equal and the error small. The
default is

    h_t(x) = N(y; A D(x), n^2 I + V_t A A^T),    V_t = d^2 sigma^2 / (alpha^2 d^2 + sigma^2),

with D(x) = E[x_0 | x_t = x] and d the standard deviation of the data: V_t is the variance of x_0 given x_t for data
N(m, d^2 I), for which h_t is exact. With the covariance C of the data, V_t is the matrix (C^-1 + alpha^2/sigma^2)^-1,
exact for data N(m, C); the error is then smaller where entries of x_0 are correlated, as pixels are.

Choose d or C rather too large than too small. A narrow twist leads the particles away from a part of the posterior,
which then has a few large weights, or none: most estimates are too small, and so are their stated errors. A wide twist
only makes the weights less equal.

u is the difference of two first stages of the step, with all views tilted by grad log h_t (`views.TiltedViews`) and
without, divided by the standard deviation of the noise. With `Ancestral`, the mean of x_s is then that of
p(x_s | x_t, y) if h_t is exact. A multistep method is a chain in the state and its last views; resampling copies both.

The chain's posterior and evidence differ from the model's by the error of the discretisation, of order 1/steps for
`Ancestral`, and 1/steps^2 for `DPMSolverPP(2, l=1.0)` and for `StochasticHeun`, which evaluates the network twice a
step.

When the effective sample size falls below a fraction of the particles, they are resampled (`inverse.particles`, which
also explains the error of the evidence). The particles always form one batch: every one of them depends on all others,
and the draws are functions of one seed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.arguments import Few, Positive, Share, checked
from scoresde.configured import Configured
from scoresde.counting import Evaluations, counting
from scoresde.guidance.gradients import gradient_of
from scoresde.inverse.operators import Operator, as_operator
from scoresde.inverse.particles import Cloud, Particles
from scoresde.inverse.twists import CorrelatedTwist, GaussianTwist
from scoresde.progress import progress_bar
from scoresde.protocols import Model
from scoresde.random_stream import RandomStream
from scoresde.samplers.grids import Grid, Transition, resolve_grid, transitions
from scoresde.samplers.linear import Linear, Row, combine, spread
from scoresde.samplers.predictors import Ancestral
from scoresde.score import BaseModel, device_of
from scoresde.sdes import SDE
from scoresde.sdes.transitions import Point, points
from scoresde.tensors import at_least_float32, check_integer, empty_states, float64, sum_dims
from scoresde.views import TiltedViews
from scoresde.wrappers import for_inference

Twist = Callable[[Tensor, Tensor], Tensor]
"""(denoised, t) -> log h_t (B,) in nats, differentiable, from E[x_0 | x_t] (B, *) and t, float64 ()."""


class TwistedState(NamedTuple):
    """The model and the twist at the particles: the chain's view, the same view tilted, D, log h, learned variance."""

    view: Tensor
    tilted: Tensor
    denoised: Tensor
    log_twist: Tensor
    variance: Tensor | None = None

    def at(self, rows: Tensor) -> "TwistedState":
        """Return the evaluation of the particles `rows`."""
        variance = None if self.variance is None else self.variance[rows]
        return TwistedState(self.view[rows], self.tilted[rows], self.denoised[rows], self.log_twist[rows], variance)


@checked
class TwistedParticles(Configured):
    """The twisted diffusion sampler (2306.17775): particles drift towards the measurement, are weighted and resampled.

    With a twist h_t(x) ~ p(y | x_t = x), each particle of the chain x_s = F(x_t, z) draws z from N(u, I) in place of
    N(0, I), moves along grad log h_t, and is weighted by N(z; 0, I) h_s(x_s) / (N(z; u, I) h_t(x_t)). The default is

        h_t(x) = N(y; A D(x), noise_std^2 I + V_t A A^T),    D(x) = E[x_0 | x_t = x],
        V_t = d^2 sigma^2 / (alpha^2 d^2 + sigma^2).

    In the limit of many particles the weighted samples follow the posterior of the chain, and the estimate of p(y) is
    unbiased for any number. A step costs one evaluation and one backward pass. The result of a call is a `Particles`.

        sampler = ss.inverse.TwistedParticles(steps=100)
        result = sampler(model, operator, y, shape=(256, 3, 32, 32), seed=0)

    Args:
        predictor: the step that defines the chain: a linear method that draws noise and has no corrector, such as
            `Ancestral` (default), with an `OptimalVariance` for few steps, `DPMSolverPP(2, l=1.0)` or `StochasticHeun`.
        steps: number of transitions. The evidence is that of the chain, which approaches the model's with more steps.
        grid: see `PredictorCorrector`; its times must decrease from t_max.
        threshold: particles are resampled below this effective sample size, as a fraction of N; 0 never, 1 always.
        data_std: d in the default V_t, the standard deviation of the data.
        data_covariance: in place of d, the covariance C (D, D) of the flattened data, x.flatten(1).T.cov().
        variance: V_t as a function of a `Point` of the path, such as `OptimalVariance.data_variance`, in place of the
            formula; 0 everywhere is the approximation of DPS (2209.14687).

    Raises:
        TypeError: `predictor` is not a linear method.
        ValueError: an argument is out of range, grid is unknown, or both data_covariance and variance are given.
    """

    def __init__(
        self,
        predictor: Linear | None = None,
        steps: Few = 100,
        grid: str | Grid | Tensor | Sequence[float] | None = None,
        threshold: Share = 0.5,
        data_std: Positive = 1.0,
        variance: Callable[[Point[float]], float] | None = None,
        data_covariance: Tensor | None = None,
    ):
        if data_covariance is not None and variance is not None:
            raise ValueError("data_covariance and variance both set V_t; got both: leave one of them out")
        self.predictor = Ancestral() if predictor is None else predictor
        if not isinstance(self.predictor, Linear):
            raise TypeError(f"predictor must be a linear method such as Ancestral(); got {predictor!r}")
        self.grid = self.predictor.grid if grid is None else resolve_grid(grid)
        self.steps, self.threshold, self.data_std = steps, threshold, data_std
        self._variance, self.data_covariance = variance, data_covariance

    def variance(self, here: Point[float], data: Any = None) -> Any:
        """Return V_t, the variance of x_0 given x_t that the twist assumes.

        Given the variances `data` (D,) along the axes of the data's covariance, return V_t along the same axes.
        """
        if self._variance is not None:
            return float(self._variance(here))
        data = self.data_std**2 if data is None else data
        return data * here.sigma**2 / (here.alpha**2 * data + here.sigma**2)

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        operator: Any,
        y: Tensor,
        shape: Sequence[int],
        seed: int | None = None,
        cond: Any = None,
        twist: Twist | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Particles:
        """Draw the particles, N samples of the posterior given one measurement.

        Args:
            model: the model, in eval mode.
            operator: an `Operator`, or a linear physics object of `deepinv`. A noise_std
                of 0 needs linearly independent measurements and sigma(t_min) > 0. If the operator is not linear, A A^T
                in the twist is replaced by the identity, and the last kernel has V = 0, so that noise is needed.
            y: one measurement, (*m) or (1, *m).
            shape: (N, *), with N the number of particles.
            seed, generator: source of randomness of the whole batch, at most one of them.
            cond: condition, short for `model.given(cond)`.
            twist: another twist (denoised, t) -> log h_t (B,). It does not change the limit, only the error.
            batch_size: number of particles in one evaluation of the network; default: all.
            progress: if True, show a progress bar.
            device, dtype: device and dtype of the particles; default: the model's device and float32.

        Raises:
            TypeError: the operator is of another kind, or batch_size is not an integer.
            ValueError: y does not fit, the measurement has no density because its noise is 0, the predictor draws no
                noise or has a corrector, batch_size < 1, or the grid rises or does not start at t_max.
            RuntimeError: no particle has a finite weight.
        """
        model, operator = for_inference(model, cond), as_operator(operator)
        steps = transitions(self.grid(model.sde, self.steps), model.sde)
        rows = self._rows(model.sde, steps)
        ends = points(model.sde, [steps[0][0], *(t_to for _, t_to in steps)])
        like = at_least_float32(empty_states(shape, dtype, device or device_of(model)))
        stream = RandomStream(generator, None if seed is None else [seed])
        measurement, spreads = self._measurement(operator, y, like, ends)
        last = spreads[-1]
        measurement.check(last)
        at = {float(end.t): value for end, value in zip(ends, spreads, strict=True)}
        tilt = twist or (lambda denoised, t: measurement.log_prob(denoised, at[float(t)]))
        cloud = Cloud(len(like), like.device, self.threshold, stream)
        size = max(len(like), 1) if batch_size is None else batch_size
        check_integer("batch_size", size, 1)
        with counting(Evaluations()) as count:
            x = model.sde.prior_std * stream.normal(like[None])[0]
            here = _evaluated(model, x, ends[0].t, tilt, self.predictor.view, size)
            cloud.weigh(here.log_twist)
            past: list[Tensor] = []
            for row, end in zip(
                progress_bar(rows, title="particles", unit="step", shown=progress), ends[1:], strict=True
            ):
                if (chosen := cloud.resampled()) is not None:
                    x, here, past = x[chosen], here.at(chosen), [view[chosen] for view in past]
                x, log_ratio, views = _moved(model, x, here, past, row, self.predictor.view, size, stream)
                past = views[: self.predictor.past - 1]
                before, is_last = here.log_twist, end is ends[-1]
                final = lambda denoised, t: measurement.log_prob(denoised, last)  # noqa: E731
                here = _evaluated(model, x, end.t, final if is_last else tilt, self.predictor.view, size, not is_last)
                cloud.weigh(log_ratio + here.log_twist - before)
        x = measurement.draw(here.denoised, last, stream).to(dtype)
        return cloud.particles(x, count)

    def _measurement(self, operator: Operator, y: Tensor, x: Tensor, ends: Sequence[Point[float]]) -> tuple[Any, list]:
        """Return the twist, and V at each time: 0 at the last one if the operator is not linear."""
        if self.data_covariance is not None:
            correlated = CorrelatedTwist(operator, y, x, self.data_covariance)
            return correlated, [self.variance(end, correlated.variances) for end in ends]
        spreads = [self.variance(end) for end in ends]
        return GaussianTwist(operator, y, x), spreads if operator.is_linear else [*spreads[:-1], 0.0]

    def _rows(self, sde: SDE, steps: Sequence[Transition]) -> list[Row]:
        """Return the coefficients of each transition.

        Raises:
            ValueError: a transition goes to more noise, the predictor has a corrector, or no transition draws noise.
        """
        if steps[0][0] != sde.t_max or not all(t_to < t_from for t_from, t_to in steps):
            raise ValueError("the grid of the particle sampler must decrease from t_max: choose another grid")
        rows = self.predictor.plan(sde, steps)
        draws = any(row.stages[0].c or row.stages[0].learned for row in rows)
        if any(row.correct for row in rows) or not draws:
            raise ValueError(
                f"the predictor must draw noise and have no corrector; got {type(self.predictor).__name__}: use "
                "Ancestral(), StochasticHeun(), DPMSolverPP(2, l=1.0), ReverseDiffusion() or DDIM(eta=1)"
            )
        return rows


def _evaluated(
    model: BaseModel, x: Tensor, t: Tensor, twist: Twist, view: str, size: int, is_tilted: bool = True
) -> TwistedState:
    """Return the evaluation of all particles, `size` at a time; if not `is_tilted`, without the gradient."""
    batches = [_of_batch(part, x[rows], t, twist, view, is_tilted) for rows, part in _parts(model, len(x), size)]
    columns = [torch.cat(column) for column in zip(*(batch[:4] for batch in batches), strict=True)]
    fractions = [batch.variance for batch in batches if batch.variance is not None]
    variance = torch.cat(fractions) if fractions else None
    return TwistedState(columns[0], columns[1], columns[2], columns[3], variance)


def _parts(model: BaseModel, count: int, size: int) -> Iterator[tuple[slice, BaseModel]]:
    """Yield the rows of batches of `size` from `count` particles, and the model for each of them."""
    for start in range(0, count, size):
        rows = slice(start, start + size)
        yield rows, model if size >= count else model.rows(rows, count)


def _of_batch(model: BaseModel, x: Tensor, t: Tensor, twist: Twist, view: str, is_tilted: bool) -> TwistedState:
    seen = []

    def log_twist(state: Tensor) -> Tensor:
        views = model.predict(state, t)
        value = twist(views.denoised, t)
        if value.shape != x.shape[:1]:
            raise ValueError(f"a twist must return one number for each particle, {(len(x),)}; got {tuple(value.shape)}")
        seen.append((views, float64(value)))
        return value

    gradient = gradient_of(log_twist, x) if is_tilted else torch.zeros_like(x)
    if not is_tilted:
        log_twist(x)
    ((views, value),) = seen
    tilted = getattr(TiltedViews(views, gradient), view)
    variance = None if views.variance is None else views.variance.detach()
    return TwistedState(
        getattr(views, view).detach(), tilted.detach(), views.denoised.detach(), value.detach(), variance
    )


def _moved(
    model: BaseModel,
    x: Tensor,
    here: TwistedState,
    past: Sequence[Tensor],
    row: Row,
    view: str,
    size: int,
    stream: RandomStream,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the particles after a guided step, log N(z; 0, I) - log N(z; u, I), float64 (N,), and the views.

    past, views: the views at the states of earlier transitions, before and after the step, the newest first. size: see
    `_view`.
    """
    first, z, log_ratio = row.stages[0], None, x.new_zeros(len(x), dtype=torch.float64)
    if isinstance(c := spread(first, here.variance), Tensor) or c:
        shift, z = sum(first.b) * (here.tilted - here.view) / c, stream.normal(x[None])[0]
        log_ratio = -sum_dims(z * shift) - 0.5 * sum_dims(shift.square())
        z = z + shift
    y, views = x, list(past)
    for stage in row.stages:
        views.insert(0, here.view if stage is first else _view(model, y, stage.t, view, size))
        anchor = stage.a * x
        y = combine(anchor if z is None else anchor + (c if stage is first else stage.c) * z, stage.b, views)
    return y, log_ratio, views


def _view(model: BaseModel, x: Tensor, t: Tensor, view: str, size: int) -> Tensor:
    """Return a view of the model at the particles x (N, *), `size` of them at a time."""
    return torch.cat([getattr(part.predict(x[rows], t), view) for rows, part in _parts(model, len(x), size)])
