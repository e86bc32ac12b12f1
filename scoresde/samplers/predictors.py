"""Predictors: one step of a discretised reverse-time SDE from t to s < t, with one or two evaluations.

The formulas use the coefficients r and v of the forward transition, x_t = r x_s + v^(1/2) eps: r = alpha_t/alpha_s and
v = sigma_t^2 - r^2 sigma_s^2. The published discrete updates are special cases: r = (1 - beta_i)^(1/2), v = beta_i for
DDPM, and r = 1, v = sigma_i^2 - sigma_(i-1)^2 for NCSN.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.arguments import checked
from scoresde.configured import Configured
from scoresde.protocols import Model
from scoresde.random_stream import RandomStream
from scoresde.samplers.grids import Angle
from scoresde.samplers.linear import Linear, Row, Stage, check_signal
from scoresde.sdes import SDE
from scoresde.sdes.sde import check_level
from scoresde.sdes.transitions import Point, posterior, transition
from scoresde.wrappers import as_model

REVERSE_GRID, FLOW_GRID = Angle(3.0, scale=3.0), Angle(4.0, scale=30.0)  # grids on which a few steps are stable
TINY = 1e-300  # replaces a variance of 0 under a logarithm
VARIANCES = ("posterior", "forward", "learned")


class ReverseFamilyStep(Linear):
    """Base class of the steps that discretise the drift and the diffusion of `ReverseSDE` at noise level l."""

    default_steps = 500
    grid = FLOW_GRID
    view = "noise"

    def __init__(self, l: float = 1.0):  # noqa: E741 - the letter of the formula
        self.l = check_level(l)
        self.stochastic = self.l > 0

    def drift(self, sde: SDE, t: Tensor) -> tuple[float, float, float]:
        """Return (f, k, l g) with the drift f x + k E[eps | x] of `ReverseSDE`: k = (1 + l^2)/2 g^2 / sigma."""
        l, g, sigma = self.l, float(sde.diffusion(t)), float(sde.sigma(t))  # noqa: E741
        if sigma == 0:
            raise ValueError(f"the drift of the reverse SDE needs sigma > 0, but sigma({float(t):g}) = 0: raise t_min")
        return float(sde.drift(t)), 0.5 * (1 + l * l) * g * g / sigma, l * g


@checked
class EulerMaruyama(ReverseFamilyStep):
    """Euler-Maruyama on `ReverseSDE`, x_s = x + (s - t) drift + l g |s - t|^(1/2) z; weak order 1.

    Args:
        l: noise level; 1 is the reverse SDE, 0 Euler's method in t on the probability flow.

    Raises:
        ValueError: l is negative; in a run, alpha = 0 at the start of a transition.
    """

    def __init__(self, l: float = 1.0):  # noqa: E741 - the letter of the formula
        super().__init__(l)
        self.grid = REVERSE_GRID if self.l >= 1 else FLOW_GRID

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        check_signal(sde, nodes[0], self)
        t, h = nodes[0].t, float(target.t - nodes[0].t)
        f, k, g = self.drift(sde, t)
        return Row((Stage(t, 1 + h * f, (h * k,), g * math.sqrt(abs(h))),))


class StochasticHeun(ReverseFamilyStep):
    """Heun's method on `ReverseSDE`, with the same z in both stages; weak order 2, two evaluations a step.

        y = x + (s - t) b(x, t) + c z,    x(s) = x + (s - t)/2 (b(x, t) + b(y, s)) + c z,    c^2 = l^2 int g^2

    with the drift b of `ReverseSDE` and the integral over the step by the trapezoidal rule (additive noise: Kloeden and
    Platen, section 15.1).

    Args:
        l: noise level; 1 is the reverse SDE, 0 Heun's method in t on the probability flow.

    Raises:
        ValueError: l is negative; in a run, alpha = 0 at the start of a transition.
    """

    default_steps = 100

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        check_signal(sde, nodes[0], self)
        t, s = nodes[0].t, target.t
        h = float(s - t)
        (f0, k0, g0), (f1, k1, g1) = self.drift(sde, t), self.drift(sde, s)
        c = math.sqrt(0.5 * (g0 * g0 + g1 * g1) * abs(h))
        first = Stage(t, 1 + h * f0, (h * k0,), c)
        # The second drift is f1 y + k1 E[eps | y], where y is a combination of x, E[eps | x] and z.
        a = 1 + 0.5 * h * (f0 + f1 * first.a)
        b = (0.5 * h * k1, 0.5 * h * (k0 + f1 * first.b[0]))
        return Row((first, Stage(s, a, b, c * (1 + 0.5 * h * f1))))


class ReverseDiffusion(Linear):
    """The reverse SDE discretised like the forward one (2011.13456, eq. 46, appendix E); weak order 1.

        x_s = (2 - r) x + v score(x, t) + v^(1/2) z,        r = alpha_t/alpha_s, v = sigma_t^2 - r^2 sigma_s^2

    A first step from alpha = 0, where x is pure noise of standard deviation sigma_t, adds noise of the same standard
    deviation. Use many steps on such a path.
    """

    default_steps = 500
    grid = REVERSE_GRID
    view = "noise"
    stochastic = True

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        ratio, variance = transition(target, nodes[0])
        return Row((Stage(nodes[0].t, 2 - ratio, (-variance / nodes[0].sigma,), math.sqrt(variance)),))


class OptimalVariance(Configured):
    """The variance of an ancestral step that fits the true reverse process best (2201.06503, theorem 1).

        c^2 = sigma_s^2 v / sigma_t^2 + k^2 (sigma_t/alpha_t)^2 V(t),      v = sigma_t^2 - (sigma_s alpha_t/alpha_s)^2,
        V(t) = E |eps - E[eps | x_t]|^2 / d = 1 - E |E[eps | x_t]|^2 / d,

    where k = v alpha_s / sigma_t^2 is the coefficient of E[x_0 | x] in `Ancestral`, d is the number of dimensions, and
    (sigma_t/alpha_t)^2 V is the mean variance of x_0 given x_t. V is estimated from data, once for a model, at
    noise levels uniform in log-SNR, and log V is interpolated between them. The estimate uses the first form of V,
    which has the same relative error at all noise levels, while the second subtracts numbers near 1 where there is
    little signal. The first form also gives the best variance around an inexact mean (2206.07309).

    Args:
        model: the model.
        x0: data (N, *), in model space.
        points: number of noise levels.
        generator: generator of the noise; default: PyTorch's global generator.
        cond: condition, short for `model.given(cond)`.
    """

    def __init__(
        self, model: Model, x0: Tensor, points: int = 64, generator: torch.Generator | None = None, cond: Any = None
    ):
        model = as_model(model, cond)
        sde = model.sde
        times = torch.linspace(sde.t_max, sde.t_min, 4 * points, dtype=torch.float64)
        levels = sde.log_snr(times)
        levels = levels[torch.isfinite(levels)]
        self.log_snr = torch.linspace(float(levels.min()), float(levels.max()), points, dtype=torch.float64)
        stream, unexplained = RandomStream(generator), []
        with torch.no_grad():
            for t in sde.time(self.log_snr):
                z = stream.normal(x0)
                error = model.predict(sde.perturb(x0, t, z), t).error(x0, z).noise
                unexplained.append(error.square().mean().cpu())
        self.log_unexplained = torch.stack(unexplained).double().clamp(1e-30, 1).log()
        self.prior = float(x0.double().var(dim=0, unbiased=False).mean())

    def data_variance(self, here: Point) -> float:
        """Return the mean variance of x_0 given x_t, see `OptimalVariance`; if alpha = 0, the variance of the data."""
        return here.ratio**2 * self.unexplained(2 * here.lam) if here.alpha else self.prior

    def unexplained(self, log_snr: float) -> float:
        """Return V, as in `OptimalVariance`, at a log-SNR; constant beyond the first and the last noise level."""
        grid = self.log_snr
        i = int(torch.searchsorted(grid, log_snr).clamp(1, len(grid) - 1))
        part = min(max((log_snr - float(grid[i - 1])) / float(grid[i] - grid[i - 1]), 0.0), 1.0)
        return math.exp(float(torch.lerp(self.log_unexplained[i - 1], self.log_unexplained[i], part)))


@checked
class Ancestral(Linear):
    """A draw from the Gaussian q(x_s | x_t, x_0) at the predicted x_0 (2006.11239, eq. 7; 2011.13456, eq. 4 and 47).

        x_s = (r sigma_s^2 x + v alpha_s E[x_0 | x]) / sigma_t^2 + noise

    with r = alpha_t/alpha_s and v = sigma_t^2 - r^2 sigma_s^2.

    Args:
        variance: variance of the noise: "posterior", sigma_s^2 v / sigma_t^2 (DDPM's beta-tilde, NCSN's ancestral
            sampler); "forward", v (DDPM's beta, the choice of score_sde for VP); "learned", which the network sets
            between the two (2102.09672, eq. 15); or an `OptimalVariance`.

    Raises:
        ValueError: variance is unknown; in a run, variance is "learned" and the model has no learned variance.
    """

    default_steps = 500
    grid = REVERSE_GRID
    view = "denoised"
    stochastic = True

    def __init__(self, variance: str | OptimalVariance = "posterior"):
        if variance not in VARIANCES and not isinstance(variance, OptimalVariance):
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, or an OptimalVariance; got {variance!r}")
        self.variance = variance

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        here = nodes[0]
        state, data, posterior_variance = posterior(target, here)
        _, forward = transition(target, here)
        learned = None
        if self.variance == "learned":
            learned = (math.log(max(posterior_variance, TINY)), math.log(forward))
        variance = forward if self.variance == "forward" else posterior_variance
        if isinstance(self.variance, OptimalVariance):
            variance += data**2 * self.variance.data_variance(here)
        return Row((Stage(here.t, state, (data,), math.sqrt(variance), learned),))
