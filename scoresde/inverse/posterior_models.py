r"""Posterior models: the score of p(x_t | y) for a measurement y = A(x_0) + noise_std * noise, without training.

    grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t),      p(y | x_t) = E[p(y | x_0) | x_t].

Each model approximates p(x_0 | x_t) by a Gaussian around m(x_t) = E[x_0 | x_t] with a covariance V, so that

    p(y | x_t)  ~  N(y; A m, S),     S = A V A^T + noise_std^2 I,     grad log p(y | x_t)  ~  J^T A^T S^-1 (y - A m),

with the Jacobian J = dm/dx_t, and V held fixed in the gradient.

| model | V | cost of an evaluation |
| --- | --- | --- |
| `DPS` | 0 | 1 forward and 1 backward pass of the network |
| `PiGDM` | r^2 I with r^2 = c^2 sigma^2 / (c^2 alpha^2 + sigma^2), for data of standard deviation c | 1 and 1 |
| `MMPS` | sigma^2/alpha J, the exact Cov(x_0 | x_t) | 1 and one for each iteration of the solver |

Tweedie moment projection (2310.06721) takes the row sums of A V A^T as a diagonal S. It needs two backward passes and
was further from the exact score of mixtures than `MMPS` with one, so it is left out.

For Gaussian data p(x_0 | x_t) is Gaussian and its V does not depend on x_t, so that MMPS with as many iterations as
measurements is exact, and so is PiGDM for data N(m, c^2 I). DPS ignores the spread of x_0 given x_t, and so trusts the
measurement too much at all but the smallest noise levels. For data with several modes all of them are approximate; the
particle sampler corrects them.

Guidance at scale 1 and without an interval is the approximation itself. `predict` of a posterior model costs the same
in every sampler; a likelihood is that of its probability flow, see `scoresde.guidance`.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from scoresde.arguments import Count, NonNegative, Positive, checked
from scoresde.guidance import Guided
from scoresde.guidance.gradients import gradient_of, pullback, views_outside
from scoresde.guidance.guided import Interval
from scoresde.inverse.krylov import conjugate_gradients, minimal_residuals
from scoresde.inverse.operators import as_operator, check_linear, check_measurement, positive_std
from scoresde.protocols import Model
from scoresde.tensors import broadcast, check_real, floating, send, sum_dims
from scoresde.views import TiltedViews, Views

PUBLISHED_STEPS = 1000  # of the chain in 2209.14687
RULES = ("likelihood", "published")


class Measured(Guided):
    """Base class of posterior models: a model, an operator and a measurement; a subclass defines `guide`.

    Args:
        model: the model of the prior p(x).
        operator: an `Operator`, or a linear physics object of `deepinv`.
        y: one measurement of the shape `*m`, used for all samples, or one for each sample, (B, *m).
        scale: factor of grad log p(y | x_t), a number or (B,).
        interval: the noise levels (low, high) of sigma/alpha at which the measurement acts; None for all.

    Raises:
        TypeError: the operator is of another kind, or y is not a tensor of real numbers.
        ValueError: y is not finite; in a call, y does not have the shape of a measurement of the states.
    """

    def __init__(
        self, model: Model, operator: Any, y: Tensor, scale: float | Tensor = 1.0, interval: Interval | None = None
    ):
        super().__init__(model, scale, interval)
        vars(self)["operator"] = as_operator(operator)
        check_real("y", y)
        if not bool(torch.isfinite(y).all()):
            raise ValueError("y must be finite; got NaN or infinity: leave missing entries out by Inpainting(mask)")
        self.y = floating(y)
        self._samples: Tensor | None = None  # the places of these samples in y, None for the whole batch

    def _settings(self) -> str:
        return f"{self.operator!r}, {super()._settings()}"

    def rows(self, rows: Tensor | slice, count: int) -> Self:
        """Return the model for the samples `rows` from a batch of `count`, with only their measurements and scales."""
        if isinstance(rows, slice) and rows.indices(count) == (0, count, 1):
            return self
        guided = super().rows(rows, count)
        guided = guided if guided is not self else self.__copy__()
        samples = torch.arange(count) if self._samples is None else self._samples
        guided._samples = samples[rows.to(samples.device) if isinstance(rows, Tensor) else rows]
        return guided

    def residual(self, expected: Tensor) -> Tensor:
        """Return y - A(m), (B, *m), for the expected measurements A(m) (B, *m)."""
        y = self.y
        if y.shape == expected.shape[1:]:
            y = y[None]
        elif (
            self._samples is not None
            and y.ndim == expected.ndim
            and len(y) > 1
            and bool((self._samples < len(y)).all())
        ):
            y = y[self._samples.to(y.device)]
        check_measurement(y, expected)
        return send(y, expected.device).to(expected.dtype) - expected


@checked
class DPS(Measured):
    """Diffusion posterior sampling (2209.14687): p(y | x_t) ~ p(y | x_0) at x_0 = E[x_0 | x_t].

    The score is grad log p(x_t) - scale grad |y - A(m)|^2 / (2 noise_std^2) with m = E[x_0 | x_t]. An evaluation costs
    one forward and one backward pass of the network. The operator may be nonlinear.

        posterior = ss.inverse.DPS(model, ss.inverse.Inpainting(mask, noise_std=0.1), y)
        x = ss.samplers.Ancestral()(posterior, shape=(16, 3, 32, 32)).x

    With the rule "likelihood", the gradient grows like 1/noise_std^2, and samplers with few steps diverge for a small
    noise_std. For data of variance c^2 and a singular value s of the operator, an ancestral step from r_t to r_s, with
    r = sigma/alpha, multiplies a deviation along this singular vector by a number below -1, unless

        (r_t^2 - r_s^2) s^2 c^4 / (n^2 (c^2 + r_t^2)^2)  <  1 + (c^2 + r_s^2) / (c^2 + r_t^2),        n = noise_std.

    The steepest steps are those near r = c; the condition there is about n > s c (1 - r_s^2/r_t^2)^(1/2) / 8^(1/2).
    Where it fails, take more steps, rule="published", or `PiGDM` or `MMPS`, which add the variance of x_0 to n^2.

    Args:
        model: the model of the prior p(x).
        operator: an `Operator`, or a linear physics object of `deepinv`.
        y: one measurement of the shape `*m`, used for all samples, or one for each sample, (B, *m).
        scale: factor of grad log p(y | x_t), a number or (B,); 1 approximates the posterior.
        interval: the noise levels (low, high) of sigma/alpha at which the measurement acts; None for all.
        rule: "likelihood" takes the gradient of log N(y; A(m), noise_std^2). "published" takes the steps of the paper's
            algorithm 1, x <- x - scale grad |y - A(m)| in each of 1,000 steps, as a term of the score: with
            N = 1000/(t_max - t_min) steps per unit of time, -scale N/g(t)^2 grad |y - A(m)|. The reverse SDE then has
            the drift of the published chain; the probability flow, half of it. It does not use noise_std.

    Raises:
        ValueError: rule is unknown, or noise_std is 0 with rule="likelihood".
    """

    def __init__(
        self,
        model: Model,
        operator: Any,
        y: Tensor,
        scale: float | Tensor = 1.0,
        interval: Interval | None = None,
        rule: str = "likelihood",
    ):
        super().__init__(model, operator, y, scale, interval)
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
        self.rule = rule
        if rule == "likelihood":
            positive_std(self.operator, "DPS with rule='likelihood'")

    def guide(self, x: Tensor, t: Tensor, scale: Tensor) -> Views:
        views: list[Views] = []

        def log_likelihood(state: Tensor) -> Tensor:
            views.append(self.model.predict(state, t))
            residual = self.residual(self.operator(views[0].denoised))
            if self.rule == "published":
                return -torch.linalg.vector_norm(residual.flatten(1), dim=1)
            return -0.5 * sum_dims((residual / self.operator.noise_std.to(residual)).square())

        gradient = gradient_of(log_likelihood, x)
        if self.rule == "published":
            per_time = PUBLISHED_STEPS / (self.sde.t_max - self.sde.t_min)
            scale = scale * per_time / self.sde.diffusion(t).square()
        inner = views_outside(self.model, x, t, views[0])
        return TiltedViews(inner, broadcast(scale, gradient) * gradient)


class MomentMatched(Measured):
    """Base class of the models with a Gaussian p(x_0 | x_t); a subclass defines `pulled`.

    Raises:
        TypeError: the operator is not linear.
    """

    def __init__(
        self, model: Model, operator: Any, y: Tensor, scale: float | Tensor = 1.0, interval: Interval | None = None
    ):
        super().__init__(model, operator, y, scale, interval)
        check_linear(self.operator, type(self).__name__)

    def guide(self, x: Tensor, t: Tensor, scale: Tensor) -> Views:
        views: list[Views] = []

        def denoised(state: Tensor) -> Tensor:
            views.append(self.model.predict(state, t))
            return views[0].denoised

        mean, pull = pullback(denoised, x)
        gradient = self.pulled(self.residual(self.operator(mean)), pull, t)
        inner = views_outside(self.model, x, t, views[0])
        return TiltedViews(inner, broadcast(scale, gradient) * gradient)

    def pulled(self, residual: Tensor, pull: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        """Return J^T A^T S^-1 (y - A m), (B, *), for the residual y - A m (B, *m) and pull(v) = J^T v."""
        raise NotImplementedError(f"{type(self).__name__} must define pulled(residual, pull, t)")


@checked
class PiGDM(MomentMatched):
    """Pseudo-inverse guidance, PiGDM (Song et al., ICLR 2023, eq. 7): a posterior model for y = A x_0 + noise.

    It takes p(x_0 | x_t) as N(m, V) with m = E[x_0 | x_t] and V = r^2 I, and adds to the score

        grad log p(y | x_t)  ~  J^T A^T S^-1 (y - A m),        S = A V A^T + noise_std^2 I,        J = dm/dx_t.

    r^2 = c^2 sigma^2 / (c^2 alpha^2 + sigma^2) is the variance of x_0 given x_t for data N(0, c^2 I), and the paper's
    choice for c = 1. An evaluation costs one forward and one backward pass of the network. The noise_std may be 0; the
    gradient is then J^T A^+ (y - A m) / r^2.

    S is inverted by the singular values of the operator if they are known and noise_std is one number, otherwise by
    conjugate gradients, which evaluate the operator but not the network.

    Args:
        model: the model of the prior p(x).
        operator: an `Operator`, or a linear physics object of `deepinv`.
        y: one measurement of the shape `*m`, used for all samples, or one for each sample, (B, *m).
        scale: factor of grad log p(y | x_t), a number or (B,); 1 approximates the posterior.
        interval: the noise levels (low, high) of sigma/alpha at which the measurement acts; None for all.
        data_std: c, the standard deviation of the data.
        iterations, tolerance: of the conjugate gradients: their largest number, and the relative residual to stop at.
    """

    def __init__(
        self,
        model: Model,
        operator: Any,
        y: Tensor,
        scale: float | Tensor = 1.0,
        interval: Interval | None = None,
        data_std: Positive = 1.0,
        iterations: Count = 100,
        tolerance: NonNegative = 1e-6,
    ):
        super().__init__(model, operator, y, scale, interval)
        self.data_std, self.iterations, self.tolerance = data_std, iterations, tolerance

    def variance(self, t: Tensor) -> Tensor:
        """Return r^2 at t, float64."""
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return (self.data_std * sigma).square() / ((self.data_std * alpha).square() + sigma.square())

    def pulled(self, residual: Tensor, pull: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        operator, spread = self.operator, self.variance(t)
        if operator.has_spectrum and not operator.noise_std.ndim:
            back = operator.adjoint(residual)
            spread, noise = broadcast(spread, back), operator.noise_std.to(back).square()

            def inverse(s: Tensor) -> Tensor:
                eigenvalues = spread * s.square() + noise
                return torch.where((s > 0) & (eigenvalues > 0), 1 / eigenvalues, 0.0)

            return pull(operator.filter(back, inverse))

        def product(u: Tensor) -> tuple[Tensor, Tensor]:
            back = operator.adjoint(u)
            return back, broadcast(spread, u) * operator(back)

        return pull(conjugate_gradients(product, residual, operator.noise_std, self.iterations, self.tolerance))


@checked
class MMPS(MomentMatched):
    """Moment matching posterior sampling, MMPS (2405.13712, section 4.2): a posterior model for y = A x_0 + noise.

    It takes p(x_0 | x_t) as N(m, V) with m = E[x_0 | x_t], J = dm/dx_t and the exact covariance V = sigma^2/alpha J,
    and adds to the score

        grad log p(y | x_t)  ~  J^T A^T S^-1 (y - A m),        S = A V A^T + noise_std^2 I.

    S u = y - A m is solved by minimal residuals, with V A^T p = sigma^2/alpha J^T A^T p by one backward pass for each
    iteration. The same products add up to the gradient J^T A^T u, which costs no further pass. An evaluation thus costs
    one forward pass and at most `iterations` backward passes. The noise_std may be 0.

    The solution is exact after as many iterations as S has different eigenvalues; fewer iterations find the part of
    the correction that reduces |S u - (y - A m)| most. Each sample stops by itself, at a relative residual below
    `tolerance`.

    The paper solves by conjugate gradients. The Jacobian of a network is only approximately symmetric and positive, so
    their steps have no bound: of 9 restorations of a picture, one had values of 7 in place of 1
    (benchmarks/RESULTS.md). They are kept for a single iteration, where both solvers take a multiple of y - A m, and
    the multiple of minimal residuals is the smaller one.

    Args:
        model: the model of the prior p(x).
        operator: an `Operator`, or a linear physics object of `deepinv`.
        y: one measurement of the shape `*m`, used for all samples, or one for each sample, (B, *m).
        scale: factor of grad log p(y | x_t), a number or (B,); 1 approximates the posterior.
        interval: the noise levels (low, high) of sigma/alpha at which the measurement acts; None for all.
        iterations: largest number of iterations.
        tolerance: relative residual |S u - (y - A m)| / |y - A m| at which a sample stops.
    """

    def __init__(
        self,
        model: Model,
        operator: Any,
        y: Tensor,
        scale: float | Tensor = 1.0,
        interval: Interval | None = None,
        iterations: Count = 3,
        tolerance: NonNegative = 1e-6,
    ):
        super().__init__(model, operator, y, scale, interval)
        self.iterations, self.tolerance = iterations, tolerance
        self.solve = conjugate_gradients if iterations == 1 else minimal_residuals

    def gain(self, t: Tensor) -> Tensor:
        """Return sigma^2/alpha, the factor of J in Cov(x_0 | x_t); 0 where alpha = 0 (x_t is pure noise)."""
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return torch.where(alpha > 0, sigma.square() / alpha, 0.0)

    def pulled(self, residual: Tensor, pull: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        def product(u: Tensor) -> tuple[Tensor, Tensor]:
            gradient = pull(self.operator.adjoint(u))
            image = self.operator(gradient)
            return gradient, broadcast(self.gain(t), image) * image

        return self.solve(product, residual, self.operator.noise_std, self.iterations, self.tolerance)
