r"""DDRM and DDNM: samplers for linear measurements whose singular value decomposition A = U diag(s) V^T is known.

In the coordinates V^T x of a state, each measurement is one of a single coordinate, (A^+ y)_i = x_i + (n/s_i) e, with
n = noise_std. Both methods move every coordinate from t to s by

    a x_t + b D + c E[eps | x_t] + k A^+ y + w z,        D = E[x_0 | x_t],        z ~ N(0, I),

with coefficients that depend on the noise level l_i = n/s_i of its measurement, infinite for coordinates that are not
measured. With r = sigma_s/alpha_s, DDRM (2201.11793, eq. 7 and 8) has, in units of alpha_s,

    l_i infinite        D + (1 - eta^2)^(1/2) r E[eps | x_t] + eta r z
    r < l_i             D + (1 - eta^2)^(1/2) r (A^+ y - D) / l_i + eta r z
    r >= l_i            (1 - eta_b) D + eta_b A^+ y + (r^2 - eta_b^2 l_i^2)^(1/2) z.

DDNM (2212.00490, section 3.3, eq. 17 to 19) is the draw from q(x_s | x_t, x_0) = N(a x_t + b x_0, w^2) at
x_0 = D + g (A^+ y - D), where g is the largest number in [0, 1] for which the noise of A^+ y, b g l_i, does not exceed
w; the rest of w^2 is added as noise. Without noise, g = 1. This keeps the marginals of one transition; later ones start
from states that depend on the noise of y already, which is neglected. DDRM keeps the marginals of all transitions.

The last transition goes to clean data, sigma = 0 and alpha = 1; without measurement noise, A x = y there.

With measurement noise, DDRM uses the measurement of a coordinate at the last noise level r >= l_i of the grid, and
hardly at lower ones. If r is much larger than l_i, which happens with few steps, A x differs from y by up to about
r s_i instead of n. A grid with a time at which r = l_i makes this residual about n; in mixtures of Gaussians it did not
bring the samples closer to the posterior.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.arguments import Few, Share, checked
from scoresde.inverse.operators import as_operator, check_linear
from scoresde.inverse.twists import Spectrum, measured, noise_level
from scoresde.random_stream import RandomStream
from scoresde.samplers.grids import Grid, Transition, resolve_grid, transitions, uniform_time
from scoresde.samplers.sampler import Sampler
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.sdes.transitions import Point, points, posterior, transition
from scoresde.tensors import check_real


@dataclass(frozen=True)
class Weights:
    """The coefficients a, b, c, k and w of the module docstring: numbers, or float64 tensors (*)."""

    state: Tensor | float = 0.0
    denoised: Tensor | float = 0.0
    noise: Tensor | float = 0.0
    measured: Tensor | float = 0.0
    spread: Tensor | float = 0.0


class SpectralSampler(Sampler):
    """A sampler of the module docstring. A subclass defines `weights`.

    Args:
        operator: a linear operator with known singular values and one `noise_std`.
        y: one measurement (*m), used for all samples, or one for each (B, *m).
        steps: number of transitions, without the last one to clean data.
        grid: see `PredictorCorrector`; default: uniform in t.
        denoise_final: whether to make the last transition to clean data, with one more evaluation.

    Raises:
        TypeError: the operator is not linear; in a call, it does not know its singular values.
        ValueError: the grid is unknown; in a call, y does not fit, or noise_std is not one number.
    """

    def __init__(
        self,
        operator: Any,
        y: Tensor,
        steps: Few = 20,
        grid: str | Grid | Tensor | Sequence[float] = uniform_time,
        denoise_final: bool = True,
    ):
        super().__init__(denoise_final)
        check_real("y", y)
        self.operator, self.y = as_operator(operator), y
        check_linear(self.operator, type(self).__name__)
        self.steps, self.grid = steps, resolve_grid(grid)

    def weights(self, here: Point[float], target: Point[float], level: Tensor) -> Weights:
        """Return the coefficients of the transition to less noise, for the noise levels l_i, float64 (*)."""
        raise NotImplementedError(f"{type(self).__name__} must define weights(here, target, level)")

    def transitions(self, sde: SDE) -> list[Transition]:
        """Return the consecutive pairs of times of the grid; they may rise again (`Resampled`)."""
        return transitions(self.grid(sde, self.steps), sde)

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> list[tuple[Point[float], Point[float]]]:
        """Return the two points of each transition."""
        starts, targets = (points(sde, times) for times in zip(*transitions, strict=True))
        return list(zip(starts, targets, strict=True))

    def advance(self, model: BaseModel, x: Tensor, entry: Any, stream: RandomStream, memory: Any) -> tuple[Tensor, Any]:
        """Return the state at the end of a transition; to more noise, a draw from the forward kernel."""
        here, target = entry
        if target.lam < here.lam:
            ratio, variance = transition(here, target)
            return ratio * x + math.sqrt(variance) * stream.normal(x), None
        return self._moved(model, x, here, target, stream), None

    def denoise(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return the end of the transition to clean data."""
        (here,) = points(model.sde, [t])
        return self._moved(model, x, here, Point(t, 1.0, 0.0, math.inf), stream)

    def _moved(
        self, model: BaseModel, x: Tensor, here: Point[float], target: Point[float], stream: RandomStream
    ) -> Tensor:
        spectrum = Spectrum(self.operator, x)
        views, weights = model.predict(x, here.t), self.weights(here, target, self.level(spectrum))
        moved = _weighted(weights.denoised, spectrum.coordinates(views.denoised))
        moved = moved + _weighted(weights.measured, self.known(spectrum, x))
        for weight, part in ((weights.state, lambda: x), (weights.noise, lambda: views.noise)):
            if isinstance(weight, Tensor) or weight:
                moved = moved + _weighted(weight, spectrum.coordinates(part()))
        return spectrum.state(moved + _weighted(weights.spread, spectrum.coordinates(stream.normal(x))))

    def known(self, spectrum: Spectrum, x: Tensor) -> Tensor:
        """Return the coordinates of A^+ y, (B, *)."""
        return spectrum.of_measurement(measured(self.operator, self.y, x), power=2)

    def level(self, spectrum: Spectrum) -> Tensor:
        """Return the noise levels l_i of the coordinates of A^+ y, float64 (*)."""
        return torch.where(spectrum.values > 0, noise_level(self.operator) / spectrum.values, math.inf)


def _weighted(weight: Tensor | float, part: Tensor) -> Tensor:
    return (weight.to(part) if isinstance(weight, Tensor) else weight) * part


@checked
class DDRM(SpectralSampler):
    """DDRM (2201.11793, eq. 7 and 8): a sampler for linear measurements with known singular values.

    In the coordinates V^T x of A = U diag(s) V^T, coordinate i is measured with noise of standard deviation
    l_i = noise_std/s_i, infinite if it is not measured. With D = E[x_0 | x_t], the transition from t to s gives, with
    r = sigma_s/alpha_s and in units of alpha_s,

        l_i infinite        D + (1 - eta^2)^(1/2) r E[eps | x_t] + eta r z
        r < l_i             D + (1 - eta^2)^(1/2) r (A^+ y - D) / l_i + eta r z
        r >= l_i            (1 - eta_b) D + eta_b A^+ y + (r^2 - eta_b^2 l_i^2)^(1/2) z,        z ~ N(0, I).

        x = ss.inverse.DDRM(operator, y)(model, shape=(16, 3, 64, 64)).x

    Args:
        operator: a linear operator with known singular values and one `noise_std`.
        y: one measurement (*m), used for all samples, or one for each (B, *m).
        steps: number of transitions, without the last one to clean data.
        grid: a name, a function (sde, steps) -> times, or the times from t_max to t_min; default: uniform in t.
        denoise_final: whether to make the last transition to clean data, with one more evaluation.
        eta: amount of fresh noise in coordinates that are not measured, or measured with more noise than the state has.
        eta_b: amount by which measured coordinates follow the measurement.

    Raises:
        TypeError: the operator is not linear; in a call, it does not know its singular values.
        ValueError: eta or eta_b is not in [0, 1], or the grid is unknown; in a call, y does not fit, or noise_std is
            not one number.
    """

    def __init__(
        self,
        operator: Any,
        y: Tensor,
        steps: Few = 20,
        grid: str | Grid | Tensor | Sequence[float] = uniform_time,
        denoise_final: bool = True,
        eta: Share = 0.85,
        eta_b: Share = 1.0,
    ):
        super().__init__(operator, y, steps, grid, denoise_final)
        self.eta, self.eta_b = eta, eta_b

    def start(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return the first state: alpha A^+ y with the rest of the noise, where l_i <= sigma/alpha (eq. 7)."""
        (here,) = points(model.sde, [t])
        spectrum = Spectrum(self.operator, x)
        level = self.level(spectrum)
        follows = here.alpha * level <= here.sigma
        rest = (1 - (here.alpha * level / here.sigma).square()).clamp(min=0).sqrt()
        noise = spectrum.coordinates(x) * torch.where(follows, rest, 1.0).to(x)
        return spectrum.state(noise + here.alpha * follows.to(x) * self.known(spectrum, x))

    def weights(self, here: Point[float], target: Point[float], level: Tensor) -> Weights:
        """Return the coefficients of eq. 8."""
        ratio, root = target.sigma / target.alpha, math.sqrt(1 - self.eta**2)
        follows, unseen = level <= ratio, torch.isinf(level)
        pull = torch.where(follows, self.eta_b, root * ratio / level)
        rest = (ratio**2 - (self.eta_b * level).square()).clamp(min=0).sqrt()
        return Weights(
            denoised=target.alpha * (1 - pull),
            noise=target.alpha * torch.where(unseen, root * ratio, 0.0),
            measured=target.alpha * pull,
            spread=target.alpha * torch.where(follows, rest, self.eta * ratio),
        )


@checked
class DDNM(SpectralSampler):
    """DDNM, and DDNM+ with noise (2212.00490): a null-space sampler for measurements with known singular values.

    The transition from t to s is a draw from q(x_s | x_t, x_0) = N(a x_t + b x_0, w^2) at

        x_0 = D + g (A^+ y - D),        D = E[x_0 | x_t],

    where in each coordinate of the singular value decomposition g is the largest number in [0, 1] for which the noise
    of A^+ y does not exceed w (section 3.3, eq. 17 to 19); the rest of w^2 is added as noise. Without noise, g = 1.

    With `grid=Resampled(jump, repeats)` it has the time travel of the paper's section 3.4.

        x = ss.inverse.DDNM(operator, y)(model, shape=(16, 3, 64, 64)).x

    Args:
        operator: a linear operator with known singular values and one `noise_std`.
        y: one measurement (*m), used for all samples, or one for each (B, *m).
        steps: number of transitions, without the last one to clean data.
        grid: a name, a function (sde, steps) -> times, or the times from t_max to t_min; default: uniform in t.
        denoise_final: whether to make the last transition to clean data, with one more evaluation.

    Raises:
        TypeError: the operator is not linear; in a call, it does not know its singular values.
        ValueError: the grid is unknown; in a call, y does not fit, or noise_std is not one number.
    """

    def __init__(
        self,
        operator: Any,
        y: Tensor,
        steps: Few = 100,
        grid: str | Grid | Tensor | Sequence[float] = uniform_time,
        denoise_final: bool = True,
    ):
        super().__init__(operator, y, steps, grid, denoise_final)

    def weights(self, here: Point[float], target: Point[float], level: Tensor) -> Weights:
        """Return the coefficients of eq. 17 to 19."""
        state, data, variance = posterior(target, here)
        noise = data * level  # of the measurement in x_s; inf where nothing is measured
        gain = torch.where(noise <= math.sqrt(variance), 1.0, math.sqrt(variance) / noise)
        rest = variance - torch.where(torch.isinf(level), 0.0, gain * noise).square()
        return Weights(state, data * (1 - gain), 0.0, data * gain, rest.clamp(min=0).sqrt())
