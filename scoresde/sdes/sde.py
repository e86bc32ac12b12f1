"""Diffusions as Gaussian paths: two functions of time determine everything else.

A diffusion is given by the scale alpha(t) of the signal and the standard deviation sigma(t) of the noise,

    x_t = alpha(t) x_0 + sigma(t) eps,        eps ~ N(0, I),        t in [t_min, t_max],

where small t is data and large t is noise. It is the solution of the linear SDE (Song et al., arXiv 2011.13456, eq. 5)

    dx = f(t) x dt + g(t) dw,    f = alpha' / alpha,    g^2 = (sigma^2)' - 2 f sigma^2 = -sigma^2 (log SNR)',

with log SNR = log(alpha^2 / sigma^2), which falls with t. Backward in time, a family of processes has the same
marginals, one for every amount l >= 0 of added noise (2011.13456, eq. 6 at l = 1 and eq. 13 at l = 0; `ReverseSDE`):

    dx = [f x - (1 + l^2)/2 g^2 score] dt + l g dw.

Every function of time takes t of shape () or (B,) and returns the same shape and dtype; the library itself always
calls them in float64.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from scoresde.arguments import checked
from scoresde.protocols import Model
from scoresde.random_stream import RandomStream
from scoresde.sdes import transitions
from scoresde.sdes.transitions import Point
from scoresde.tensors import at_least_float32, broadcast, check_shape_of_states, dimensions, float64, floating, sum_dims

ROUNDED = 1e-6  # relative rounding of a time at an end of the range
SECTIONS, ROUNDS = 64, 11  # 64^11 = 2^66 narrows any interval of float64 times down to neighbouring numbers


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """d function / dt at every t, by forward-mode differentiation."""
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1].to(t)


def checked_times(sde: "SDE", t: Tensor | float) -> Tensor:
    """Return times as float64 tensors, () or (B,), none of them outside [t_min, t_max].

    The ends are widened by a millionth of themselves, for times rounded to float32. On an accelerator, where reading t
    would wait for the device, a time outside becomes NaN instead of raising an error.

    Raises:
        ValueError: a time is outside the range of the SDE, or NaN.
    """
    low, high = sde.t_min * (1 - ROUNDED), sde.t_max * (1 + ROUNDED)
    t = float64(t)
    if t.device.type != "cpu":
        return t.where((t >= low) & (t <= high), math.nan)
    if t.ndim == 0:
        first = last = t.item()
    elif t.numel():
        first, last = (end.item() for end in t.detach().aminmax())
    else:
        return t
    if not (low <= first and last <= high):
        got = f"t={first:g}" if not low <= first else f"t={last:g}"
        raise ValueError(
            f"t must lie in [{sde.t_min:g}, {sde.t_max:g}], the time range of {type(sde).__name__}; got {got}: time is "
            "continuous, so map the number of a step to this range, t_min + i (t_max - t_min) / (N - 1)"
        )
    return t


def check_level(l: float) -> float:  # noqa: E741 - the letter of the formula
    """Return the noise level of a reverse family; raise ValueError if negative."""
    if not l >= 0:
        raise ValueError(f"the noise level l must be >= 0; got {l}")
    return float(l)


def _times(t_from: Tensor | float, t_to: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return two times in float64; raise ValueError unless each is () or (B,), with one B."""
    times = float64(t_from), float64(t_to)
    shapes = tuple(t.shape for t in times)
    if max(map(len, shapes)) > 1 or len({*shapes} - {torch.Size()}) > 1:
        raise ValueError(
            f"t_from and t_to must have shape () or (B,), with one B; got {', '.join(map(str, map(tuple, shapes)))}"
        )
    return times


@checked
class SDE(nn.Module):
    """A diffusion with Gaussian transition kernel. A subclass defines `alpha` and `sigma`.

    A subclass should override the functions that it has in closed form. By default derivatives come from automatic
    differentiation, and the inverse of the log-SNR from repeated sectioning.

    Args:
        t_min: time of the (almost) clean data, where samplers end and likelihoods start.
        t_max: time of the prior.

    Raises:
        ValueError: t_min >= t_max, or a negative t_min.
    """

    def __init__(self, t_min: float, t_max: float):
        super().__init__()
        if not 0 <= t_min < t_max:
            raise ValueError(f"times must satisfy 0 <= t_min < t_max; got {t_min=}, {t_max=}")
        self.t_min, self.t_max = float(t_min), float(t_max)

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal, alpha(t)."""
        raise NotImplementedError(f"{type(self).__name__} must define alpha(t)")

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise, sigma(t)."""
        raise NotImplementedError(f"{type(self).__name__} must define sigma(t)")

    def alpha_dot(self, t: Tensor) -> Tensor:
        """d alpha / dt."""
        return derivative(self.alpha, t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / dt."""
        return derivative(self.sigma, t)

    def drift(self, t: Tensor) -> Tensor:
        """The coefficient f(t) = alpha'/alpha of the drift f(t) x."""
        return self.alpha_dot(t) / self.alpha(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """The diffusion coefficient g(t), g^2 = 2 sigma (sigma' - f sigma)."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        return torch.sqrt(2 * sigma / alpha * (alpha * self.sigma_dot(t) - self.alpha_dot(t) * sigma))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), in nats; decreasing in t."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def size(self, t: Tensor) -> Tensor:
        """(alpha^2 + sigma^2)^(1/2), the size of the states of unit data."""
        return torch.hypot(self.alpha(t), self.sigma(t))

    def time(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr`, clamped to [t_min, t_max]; by default with 700 evaluations for each time."""
        low = torch.full_like(log_snr, self.t_min)
        width = torch.full_like(log_snr, self.t_max - self.t_min)
        steps = torch.arange(1, SECTIONS, dtype=log_snr.dtype, device=log_snr.device) / SECTIONS
        for _ in range(ROUNDS):
            inner = low[..., None] + width[..., None] * steps
            cleaner = self.log_snr(inner.flatten()).reshape(inner.shape) > log_snr[..., None]
            width = width / SECTIONS
            low = low + width * cleaner.sum(dim=-1)
        return low

    def chain_alpha(self, t: Tensor, steps: int = 1000) -> Tensor:
        """alpha_i = 1 - beta_i, beta_i = beta(t_i) t_max/steps, of the chain of `steps` nodes from 0 to t_max.

        It is that of the last node up to t, as in the code of 2011.13456; f = -beta/2, so that it is 1 where alpha = 1.
        """
        spacing = self.t_max / (steps - 1)
        node = (spacing * torch.floor(t / spacing + 1e-6)).clamp(min=self.t_min)
        return (1 + 2 * self.drift(node) * self.t_max / steps).clamp(min=0)

    def perturb(self, x0: Tensor, t: Tensor | float, noise: Tensor) -> Tensor:
        """A draw from p(x_t | x_0): alpha(t) x0 + sigma(t) noise, with x0 and noise (B, *), t () or (B,).

        Raises:
            ValueError: t is outside [t_min, t_max], or noise or t has another shape.
        """
        check_shape_of_states("noise", noise, x0)
        x0, t = floating(x0), checked_times(self, t)
        state = at_least_float32(x0)
        perturbed = broadcast(self.alpha(t), state) * state + broadcast(self.sigma(t), state) * noise
        return perturbed.to(x0.dtype)

    def at(self, t: Tensor) -> Point[Tensor]:
        """The path at float64 t, () or (B,): alpha, sigma, log(alpha/sigma), and the properties of `Point`.

        Raises:
            ValueError: t is outside [t_min, t_max].
        """
        t = checked_times(self, t)
        return Point(t, self.alpha(t), self.sigma(t), 0.5 * self.log_snr(t))

    def transition(self, t_from: Tensor | float, t_to: Tensor | float) -> tuple[Tensor, Tensor]:
        """(r, v) of the forward kernel x_to = r x_from + v^(1/2) eps for t_from < t_to; see `sdes.transitions`.

        Raises:
            ValueError: times that are not () or (B,).
        """
        t_from, t_to = _times(t_from, t_to)
        return transitions.transition(self.at(t_from), self.at(t_to))

    def posterior(self, t_from: Tensor | float, t_to: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, v) of q(x_to | x_from, x_0) = N(a x_from + b x_0, v I) for t_to < t_from; see `sdes.transitions`.

        Raises:
            ValueError: times that are not () or (B,).
        """
        t_from, t_to = _times(t_from, t_to)
        return transitions.posterior(self.at(t_to), self.at(t_from))

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior N(0, prior_std^2 I), the law of x at t_max."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))

    def prior_sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draws (B, *) from the prior; `seeds` gives each sample its own stream."""
        like = torch.empty(tuple(shape), dtype=dtype, device=device)
        return self.prior_std * RandomStream(generator, seeds, len(like)).normal(like)

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """Log-density of the prior at z (B, *), in nats, (B,), float64."""
        log_scale = math.log(self.prior_std) + 0.5 * math.log(2 * math.pi)
        return -0.5 * sum_dims(float64(z).square()) / self.prior_std**2 - dimensions(z) * log_scale

    def prior_divergence(self, x: Tensor) -> Tensor:
        """KL(N(alpha x, sigma^2 I) || N(0, prior_std^2 I)) at t_max of clean states x (B, *), in nats, float64 (B,)."""
        t = torch.tensor(self.t_max, dtype=torch.float64)
        signal, noise = (self.alpha(t) / self.prior_std).square(), (self.sigma(t) / self.prior_std).square()
        return 0.5 * (signal * sum_dims(floating(x).square()) + dimensions(x) * (noise - 1 - noise.log()))

    def scaled_gradient(self, t: Tensor, factor: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """Within the block, multiply the gradient of a learned shape at the times t (B,) by factor().

        factor() is the weight of each sample, (B,), and is called in the backward pass. Without effect on a path that
        does not learn its shape between the ends.
        """
        return nullcontext()

    def extra_repr(self) -> str:
        return f"t_min={self.t_min:g}, t_max={self.t_max:g}"


class ReverseSDE:
    """The family dx = [f x - (1 + l^2)/2 g^2 score] dt + l g dw, from t_max to t_min.

    All members have the marginals of the forward process: l = 1 is the reverse-time SDE of Anderson (2011.13456,
    eq. 6), l = 0 the probability-flow ODE (eq. 13).

    Args:
        model: the model, with its `sde`.
        l: noise level, >= 0.

    Raises:
        ValueError: a negative noise level.
    """

    def __init__(self, model: Model, l: float = 1.0):  # noqa: E741 - the letter of the formula
        self.model, self.sde, self.l = model, model.sde, check_level(l)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift at x (B, *) and t () or (B,): velocity - l^2/2 g^2 score, from one network evaluation."""
        t = checked_times(self.sde, t)
        sde = self.sde
        churn = 0.5 * self.l**2 * sde.diffusion(t).square() / sde.sigma(t) if self.l else torch.zeros_like(t)
        return self.model.predict(x, t).combine(sde.alpha_dot(t), sde.sigma_dot(t) + churn)

    def diffusion(self, t: Tensor) -> Tensor:
        """l g(t), () or (B,)."""
        return self.l * self.sde.diffusion(checked_times(self.sde, t))
