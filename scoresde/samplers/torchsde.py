"""The SDE solvers of torchsde applied to `ReverseSDE`, for comparison with the samplers of this package.

torchsde solves forward in time, for states (B, D). With s = t_from + t_to - t, the family of `ReverseSDE` is

    dx = -drift(x, t) ds + l g(t) dW_s,        s from t_to to t_from,

with additive noise: the Ito and the Stratonovich solutions are the same, so methods for either apply.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchsde import BrownianInterval, sdeint  # type: ignore[import-untyped]

from scoresde.random_stream import RandomStream
from scoresde.samplers.grids import Transition, segments
from scoresde.samplers.sampler import Sampler
from scoresde.score import BaseModel
from scoresde.sdes import SDE, ReverseSDE
from scoresde.sdes.sde import check_level
from scoresde.tensors import double

METHODS = {"euler": "ito", "srk": "ito", "heun": "stratonovich", "midpoint": "stratonovich"}


class Brownian:
    """Brownian motions (B, D) for torchsde: one `BrownianInterval` per sample, seeded with its entry of `entropy`."""

    def __init__(self, entropy: list[int], x: Tensor, ends: tuple[float, float], dt: float | None, area: str):
        options = {"size": (1, x.shape[1]), "dtype": x.dtype, "device": x.device, "levy_area_approximation": area}
        self.motions = [BrownianInterval(*ends, entropy=seed, dt=dt, **options) for seed in entropy]
        self.shape, self.dtype, self.device, self.levy_area_approximation = x.shape, x.dtype, x.device, area

    def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False) -> Any:
        """Return W(tb) - W(ta), (B, D); if return_U, also U, the integral of W(s) - W(ta) over s in [ta, tb]."""
        parts = [motion(ta, tb, return_U=return_U, return_A=return_A) for motion in self.motions]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class _Reversed:
    """The equation of the module docstring on flattened states, with the attributes and methods that torchsde uses."""

    noise_type = "additive"

    def __init__(self, family: ReverseSDE, sde_type: str, shape: torch.Size, ends: tuple[float, float]):
        self.family, self.sde_type, self.shape, self.ends = family, sde_type, shape, ends

    def _time(self, s: Tensor) -> Tensor:
        low, high = self.ends
        return (low + high - s).clamp(low, high)

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """Return -drift(x, t), (B, D), at y = x flattened; letters as in the module docstring."""
        return -self.family.drift(y.reshape(self.shape), self._time(s)).flatten(1)

    def g_prod(self, s: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Return l g(t) v, (B, D), for a vector v of each sample; letters as in the module docstring."""
        return self.family.diffusion(self._time(s)).to(v) * v


class TorchSDE(Sampler):
    """A solver of torchsde on the reverse SDE dx = [f x - (1 + l^2)/2 g^2 score] dt + l g dw, in the time t.

    Every sample has its own Brownian motion. With adaptive=False and seeds, a sample therefore does not depend on the
    others in its batch. With adaptive=True it does, since torchsde takes one step size for the whole batch, from the
    root mean square error over the batch.

    Args:
        method: "euler" (Euler-Maruyama), "srk" (Roessler's, strong order 1.5), "heun" or "midpoint".
        steps: number of equal steps; with adaptive=True, the first step is the time range divided by `steps`.
        l: noise level; 1 is the reverse SDE, 0 the probability flow.
        adaptive: if True, control the error, by comparing a step with two steps of half the size; if False, take equal
            steps.
        rtol, atol, dt_min: for adaptive=True, the relative and absolute tolerance, and the smallest step, which is
            accepted with any error.
        denoise_final: if True, replace the last state by E[x_0 | x], which costs one more evaluation.

    torchsde evaluates the drift once more at the start, to learn its shape; `nfe` counts this evaluation.

    Raises:
        ValueError: method is unknown, steps, rtol, atol or dt_min is not positive, or l is negative; in a call,
            alpha = 0 at t_max.
        RuntimeError: in a call, a state turns NaN.
    """

    def __init__(
        self,
        method: str = "srk",
        steps: int = 250,
        l: float = 1.0,  # noqa: E741 - the letter of the formula
        adaptive: bool = False,
        rtol: float = 1e-2,
        atol: float = 1e-2,
        dt_min: float = 1e-6,
        denoise_final: bool = False,
    ):
        super().__init__(denoise_final)
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
        if steps < 1 or min(rtol, atol, dt_min) <= 0:
            raise ValueError(f"steps, rtol, atol, dt_min must be positive; got {steps=}, {rtol=}, {atol=}, {dt_min=}")
        self.method, self.steps, self.l, self.adaptive = method, steps, check_level(l), adaptive
        self.control = {"adaptive": adaptive, "rtol": rtol, "atol": atol, "dt_min": dt_min}

    def transitions(self, sde: SDE) -> list[Transition]:
        """Return the single transition from t_max to t_min.

        Raises:
            ValueError: alpha(t_max) = 0.
        """
        if not math.isfinite(float(sde.drift(torch.tensor(sde.t_max, dtype=torch.float64)))):
            raise ValueError(
                f"TorchSDE needs alpha > 0 at t_max={sde.t_max:g}, where the drift of {type(sde).__name__} is "
                "infinite: lower t_max, or use ErrorControlled"
            )
        return segments(sde, 1)

    def step(self, model: BaseModel, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream) -> Tensor:
        """Return the state at t_to, from x (B, *) at t_from > t_to; computed in float64 on devices that have it."""
        if not len(x):
            return x  # torchsde needs a sample
        low, high = float(t_to), float(t_from)
        dt = (high - low) / self.steps
        y = x.to(double(x)).flatten(1)
        area = "space-time" if self.method == "srk" else "none"
        motion = Brownian(stream.seeds(len(x)), y, (low, high), None if self.adaptive else dt, area)
        family = _Reversed(ReverseSDE(model, self.l), METHODS[self.method], x.shape, (low, high))
        times = torch.stack([t_to, t_from])
        # A little longer than dt: torchsde cuts the last step at the end, and rounding of the sum would add another one
        first = dt * (1 + 1e-10)
        try:
            path = sdeint(family, y, times, bm=motion, method=self.method, dt=first, **self.control)
        except AssertionError as error:  # how torchsde reports NaN in an error estimate
            raise RuntimeError(f"torchsde gave up ({error}): check the network's output for NaN") from error
        return path[-1].reshape(x.shape).to(x.dtype)
