"""Diffusions as Gaussian paths: two functions of time determine everything else.

A diffusion is given by the scale alpha(t) of the signal and the standard deviation sigma(t) of the noise,

    x_t = alpha(t) x_0 + sigma(t) eps,        eps ~ N(0, I),        t in [t_min, t_max],

where small t is data and large t is noise. It is the solution of the linear SDE (Song et al., arXiv 2011.13456, eq. 5)

    dx = f(t) x dt + g(t) dw,    f = alpha' / alpha,    g^2 = (sigma^2)' - 2 f sigma^2 = -sigma^2 (log SNR)',

with log SNR = log(alpha^2 / sigma^2), which falls with t. Backward in time, a family of processes has the same
marginals, one for every amount l >= 0 of added noise (2011.13456, eq. 6 at l = 1 and eq. 13 at l = 0; `ReverseSDE`):

    dx = [f x - (1 + l^2)/2 g^2 score] dt + l g dw.

Every function of time takes t of shape () or (B,) and returns the same shape and dtype; the library itself always
calls them in float64. They are the bare formulas and do not check t: see `SDE`.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from scoresde.arguments import checked
from scoresde.configured import Configured, one_line
from scoresde.protocols import Model
from scoresde.random_stream import RandomStream
from scoresde.sdes import transitions
from scoresde.sdes.transitions import Point
from scoresde.tensors import at_least_float32, broadcast, check_shape_of_states, dimensions, float64, floating, sum_dims

ROUNDED = 1e-6  # relative rounding error allowed for a time at an end of the range
SECTIONS, ROUNDS = 64, 11  # 64^11 = 2^66 narrows any interval of float64 times down to neighbouring numbers


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """d function / dt at every t, by forward-mode differentiation."""
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1].to(t)


def checked_times(sde: "SDE", t: Tensor | float) -> Tensor:
    """Return t as a float64 tensor, () or (B,), and check that it lies in [t_min, t_max].

    A time may exceed an end of the range by a millionth of that end, since times may be rounded to float32. On an
    accelerator, where reading t would wait for the device, a time outside becomes NaN instead of raising an error.

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
            "continuous, so replace the index i of one of N discrete steps by t_min + i (t_max - t_min) / (N - 1)"
        )
    return t


def check_level(l: float) -> float:  # noqa: E741 - the letter of the formula
    """Return the noise level l of a `ReverseSDE` as a float; raise ValueError if it is negative."""
    if not l >= 0:
        raise ValueError(f"the noise level l must be >= 0; got {l}")
    return float(l)


def _ordered_points(sde: "SDE", t_from: Tensor | float, t_to: Tensor | float, forward: bool) -> list[Point[Tensor]]:
    """Return the `Point` at each of the two times, the earlier time first.

    The times must satisfy t_from <= t_to if `forward`, else t_to <= t_from.
    On an accelerator, where reading times would wait for the device, times in the wrong order become NaN instead of
    raising an error.

    Raises:
        ValueError: the order is wrong, a time is outside the range, or the shapes are not () or (B,) with the same B.
    """
    times = float64(t_from), float64(t_to)
    shapes = tuple(t.shape for t in times)
    if max(map(len, shapes)) > 1 or len({*shapes} - {torch.Size()}) > 1:
        raise ValueError(
            "t_from and t_to must have shape () or (B,), with the same B; got shapes "
            f"{' and '.join(map(str, map(tuple, shapes)))}"
        )
    early, late = (checked_times(sde, t) for t in (times if forward else times[::-1]))
    wrong = early > late
    if wrong.device.type != "cpu":
        late = late.where(~wrong, math.nan)
    elif bool(wrong.any()):
        first = int(wrong.flatten().long().argmax())
        got = [float(t.expand(wrong.shape).flatten()[first]) for t in times]
        relation = "<=" if forward else ">="
        raise ValueError(
            f"times must satisfy t_from {relation} t_to; got t_from={got[0]:g} and t_to={got[1]:g}: exchange them (the "
            "kernel to less noise is `posterior`, to more noise `transition`)"
        )
    return [sde.at(early), sde.at(late)]


@checked
class SDE(Configured, nn.Module):
    """A diffusion with Gaussian transition kernel. A subclass defines `alpha` and `sigma`.

    A subclass should override the functions that have a closed form. By default, derivatives come from automatic
    differentiation, and the inverse of the log-SNR from a root search.

    The functions of time alone (`alpha`, `sigma`, their derivatives, `drift`, `diffusion`, `log_snr`, `size` and
    `chain_alpha`) are the bare formulas: outside of [t_min, t_max] they extrapolate, or are NaN or infinite. They call
    each other, in the loops of solvers and under `torch.func` and `torch.compile`, where reading t would cost as much
    as the formula or is not possible. Everything that takes a state or relates two times checks its times once:
    `perturb`, `at`, `transition`, `posterior`, `ReverseSDE` and every model, loss, sampler and likelihood.
    `checked_times(sde, t)` is the same check for your own code; `sde.at(t)` returns checked values.

    Args:
        t_min: time of the (almost) clean data, where samplers end and likelihoods start.
        t_max: time of the prior.

    Raises:
        ValueError: t_min >= t_max, or t_min is negative.
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
        """(alpha^2 + sigma^2)^(1/2), the standard deviation of x_t for data of unit variance."""
        return torch.hypot(self.alpha(t), self.sigma(t))

    def time(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr`, clamped to [t_min, t_max]; the default evaluates `log_snr` 700 times per value."""
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
        """Return alpha_i = 1 - beta_i of the discrete chain with `steps` nodes t_i from 0 to t_max, at each time t.

        t_i is the last node at or before t and beta_i = beta(t_i) t_max/steps with beta = -2 f, as in the code of
        2011.13456. Paths with alpha = 1 have f = 0, so alpha_i = 1.
        """
        spacing = self.t_max / (steps - 1)
        node = (spacing * torch.floor(t / spacing + 1e-6)).clamp(min=self.t_min)
        return (1 + 2 * self.drift(node) * self.t_max / steps).clamp(min=0)

    def perturb(self, x0: Tensor, t: Tensor | float, noise: Tensor) -> Tensor:
        """Return x_t = alpha(t) x0 + sigma(t) noise, with x0 and noise (B, *), t () or (B,).

        For standard normal noise it is a draw from p(x_t | x_0).

        Raises:
            ValueError: t is outside [t_min, t_max], or noise or t has the wrong shape.
        """
        check_shape_of_states("noise", noise, x0)
        x0, t = floating(x0), checked_times(self, t)
        state = at_least_float32(x0)
        perturbed = broadcast(self.alpha(t), state) * state + broadcast(self.sigma(t), state) * noise
        return perturbed.to(x0.dtype)

    def at(self, t: Tensor) -> Point[Tensor]:
        """Return the `Point` of the path at float64 t, () or (B,): alpha, sigma and log(alpha/sigma) there.

        Raises:
            ValueError: t is outside [t_min, t_max].
        """
        t = checked_times(self, t)
        return Point(t, self.alpha(t), self.sigma(t), 0.5 * self.log_snr(t))

    def transition(self, t_from: Tensor | float, t_to: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return (r, v) of the forward kernel x_to = r x_from + v^(1/2) eps, t_from <= t_to; see `sdes.transitions`.

        Raises:
            ValueError: t_from > t_to, or the times do not have shape () or (B,) with the same B, or are outside
                [t_min, t_max].
        """
        return transitions.transition(*_ordered_points(self, t_from, t_to, forward=True))

    def posterior(self, t_from: Tensor | float, t_to: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return (a, b, v) of q(x_to | x_from, x_0) = N(a x_from + b x_0, v I), t_to <= t_from; see `sdes.transitions`.

        Raises:
            ValueError: t_to > t_from, or the times do not have shape () or (B,) with the same B, or are outside
                [t_min, t_max].
        """
        return transitions.posterior(*_ordered_points(self, t_from, t_to, forward=False))

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
        """Draw samples of `shape` (B, *) from the prior; with `seeds`, each sample depends on its own seed alone."""
        like = torch.empty(tuple(shape), dtype=dtype, device=device)
        return self.prior_std * RandomStream(generator, seeds, len(like)).normal(like)

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """Log-density of the prior at z (B, *), in nats, (B,), float64."""
        log_scale = math.log(self.prior_std) + 0.5 * math.log(2 * math.pi)
        return -0.5 * sum_dims(float64(z).square()) / self.prior_std**2 - dimensions(z) * log_scale

    def prior_divergence(self, x: Tensor) -> Tensor:
        """KL(N(alpha x, sigma^2 I) || N(0, prior_std^2 I)) at t_max, for clean x (B, *), in nats, float64 (B,)."""
        t = torch.tensor(self.t_max, dtype=torch.float64)
        signal, noise = (self.alpha(t) / self.prior_std).square(), (self.sigma(t) / self.prior_std).square()
        return 0.5 * (signal * sum_dims(floating(x).square()) + dimensions(x) * (noise - 1 - noise.log()))

    def scaled_gradient(self, t: Tensor, factor: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """Return a context in which the gradient of a learned path's shape is multiplied by factor().

        factor() is called in the backward pass and returns one number for each of the times t (B,); see
        `losses.variational`. By default the context does nothing; paths with a learned shape override it (`LearnedVP`).
        """
        return nullcontext()

    def extra_repr(self) -> str:
        """Return all arguments of the path, defaults included: each changes a likelihood."""
        return ", ".join(f"{name}={one_line(value)}" for name, value in self.every_argument().items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class ReverseSDE(Configured):
    """The family dx = [f x - (1 + l^2)/2 g^2 score] dt + l g dw, from t_max to t_min.

    All members have the marginals of the forward process: l = 1 is the reverse-time SDE of Anderson (2011.13456,
    eq. 6), l = 0 the probability-flow ODE (eq. 13).

    Args:
        model: the model; its `sde` is the forward process.
        l: noise level, >= 0.

    Raises:
        ValueError: the noise level is negative.
    """

    def __init__(self, model: Model, l: float = 1.0):  # noqa: E741 - the letter of the formula
        self.model, self.sde, self.l = model, model.sde, check_level(l)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift f x - (1 + l^2)/2 g^2 score at x (B, *) and t () or (B,), from one network evaluation."""
        t = checked_times(self.sde, t)
        sde = self.sde
        churn = 0.5 * self.l**2 * sde.diffusion(t).square() / sde.sigma(t) if self.l else torch.zeros_like(t)
        return self.model.predict(x, t).combine(sde.alpha_dot(t), sde.sigma_dot(t) + churn)

    def diffusion(self, t: Tensor) -> Tensor:
        """The diffusion coefficient l g(t) with the noise level l of this family: () or (B,), as t."""
        return self.l * self.sde.diffusion(checked_times(self.sde, t))
