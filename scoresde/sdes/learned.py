r"""A variance-preserving path whose log-SNR is learned (variational diffusion models, 2107.00630).

    alpha^2 = sigmoid(-gamma),   sigma^2 = sigmoid(gamma),   gamma(t) = -log SNR = gamma_0 + (gamma_1 - gamma_0) phi(u),

with u = (t - t_min)/(t_max - t_min) and a shape phi that rises from 0 to 1: a monotone network of one linear path and K
sigmoid units beside it (appendix H), whose scale drops out as its ends are fixed,

    phi(u) = (n(u) - n(0)) / (n(1) - n(0)),        n(u) = u + sum_k a_k sigmoid(b_k (u - c_k)),        a_k, b_k > 0,
    phi'(u) = (1 + sum_k a_k b_k s_k (1 - s_k)) / (n(1) - n(0)).

The linear path keeps phi' > 0 whatever the parameters. -gamma_0, gamma_1, a_k and b_k are positive as softplus of
numbers that train; these and the c_k are a start (nearly linear in t, with the ends given) plus a deviation. The
deviations are the module's parameters: zero at first, in float32 and never less. All arithmetic is in float64 on the
CPU, so that a path is the same function wherever its parameters are and in whichever precision the network beside it
runs. They follow the model from device to device as any parameters do (optimisers, averages and DistributedDataParallel
need nothing special); an evaluation copies them to the CPU, which waits for an accelerator.

Every function is differentiable in the parameters, twice, but for `time`. Which gradient trains them is the
objective's matter: `losses.VariationalBound`. Most others would draw the ends together, for they have no term that
holds them apart: `path.requires_grad_(False)` there.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from scoresde.sdes.log_snr import LogSNRPath
from scoresde.tensors import float64

ROUNDS, ROUNDING = 80, 4e-15  # of the root search: bisection alone would need 50 rounds; that of phi itself


class LearnedVP(LogSNRPath):
    """The module's path: gamma(t) = -log SNR is a monotone network of t (2107.00630, eq. 4 and appendix H).

    Args:
        gamma_min, gamma_max: gamma at t_min and at t_max, where training starts: gamma_min < 0 < gamma_max. The paper's
            are -13.3 and 5 (appendix H); at 10 as much signal is left at t_max as in `VP`.
        units: K, sigmoid units of the shape.
        learn_ends: whether gamma_0 and gamma_1 train as well, or the shape between them alone.
        t_min, t_max: the range of time.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        gamma_min: float = -13.3,
        gamma_max: float = 10.0,
        units: int = 64,
        learn_ends: bool = True,
        t_min: float = 0.0,
        t_max: float = 1.0,
    ):
        super().__init__(t_min, t_max)
        if not -math.inf < gamma_min < 0 < gamma_max < math.inf:
            raise ValueError(f"gamma_min < 0 < gamma_max, finite, expected; got {gamma_min}, {gamma_max}")
        if not isinstance(units, int) or units < 1:
            raise ValueError(f"units >= 1 expected, an integer; got {units!r}")
        # Plain attributes, not buffers: they stay in float64 on the CPU wherever the model goes.
        self._first_ends = _softplus_inverse(float64([-gamma_min, gamma_max]))
        self._first_shape = torch.stack(
            [
                _softplus_inverse(torch.full((units,), 1 / units, dtype=torch.float64, device="cpu")),
                _softplus_inverse(torch.full((units,), units / 2, dtype=torch.float64, device="cpu")),
                (torch.arange(units, dtype=torch.float64, device="cpu") + 0.5) / units,
            ]
        )
        self.ends = nn.Parameter(torch.zeros(2, dtype=torch.float32), requires_grad=learn_ends)
        self.shape = nn.Parameter(torch.zeros(3, units, dtype=torch.float32))
        self._scaled: tuple[Tensor, Tensor, Tensor] | None = None  # within `scaled_gradient`: t, phi and phi'

    def gammas(self) -> Tensor:
        """(gamma_0, gamma_1), float64 (2,), on the CPU."""
        sizes = _softplus(self._first_ends + float64(self.ends).cpu())
        return torch.stack([-sizes[0], sizes[1]])

    def fraction(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The shape phi and its derivative in t, float64, on the CPU."""
        t = float64(t).cpu()
        if self._scaled is not None and torch.equal(t, self._scaled[0]):
            return self._scaled[1:]
        width = self.t_max - self.t_min
        a, b, c = self._units()
        value, slope = _rise((t - self.t_min) / width, a, b, c)
        return value, slope / width

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _log_snr(self.gammas(), *self.fraction(t))

    @torch.no_grad()
    def time(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr`, clamped to [t_min, t_max]; without gradient.

        Newton's method; bisection where it would leave the bracket or crawl, as down the steep foot of a unit.
        """
        low, high = self.gammas()
        goal = ((-float64(log_snr).cpu() - low) / (high - low)).clamp(0, 1)
        a, b, c = self._units()
        left, right, u = torch.zeros_like(goal), torch.ones_like(goal), goal
        step = right - left
        for _ in range(ROUNDS):
            value, slope = _rise(u, a, b, c)
            excess = value - goal
            left, right = torch.where(excess > 0, left, u), torch.where(excess > 0, u, right)
            found = torch.minimum(excess.abs(), right - left) <= ROUNDING
            newton = -excess / slope
            inside = (u + newton >= left) & (u + newton <= right)
            halved = newton.abs() <= 0.5 * step.abs()
            step = torch.where(inside & (halved | found), newton, 0.5 * (left + right) - u)
            u = u + step
            if bool(found.all()):
                break
        return (self.t_min + (self.t_max - self.t_min) * u).clamp(self.t_min, self.t_max).to(log_snr)

    @contextmanager
    def scaled_gradient(self, t: Tensor, factor: Callable[[], Tensor]) -> Iterator[None]:
        """See `SDE.scaled_gradient`: the gradient of phi and phi', and so that of the shape but not of the ends.

        Both are evaluated once, for all that asks for them at the times t.
        """
        value, slope = self.fraction(t)
        for part in (value, slope):
            if part.requires_grad and self.shape.requires_grad:
                part.register_hook(lambda gradient: gradient * factor())
        before, self._scaled = self._scaled, (float64(t).cpu(), value, slope)
        try:
            yield
        finally:
            self._scaled = before

    @property
    def prior_std(self) -> float:
        """1, whatever sigma(t_max) becomes: the prior does not learn (2107.00630, section 3.3)."""
        return 1.0

    def _units(self) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, c) of the units, float64 (K,) each, on the CPU."""
        a, b, c = self._first_shape + float64(self.shape).cpu()
        return _softplus(a), _softplus(b), c

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moved and cast as any module, but not to half precision, which would be another path."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if torch.finfo(moved.dtype).bits >= 32 else tensor.to(moved.device)

        return super()._apply(kept, recurse)

    def extra_repr(self) -> str:
        if self.ends.is_meta:
            return super().extra_repr()
        low, high = self.gammas().tolist()
        return f"gamma_min={low:g}, gamma_max={high:g}, units={self.shape.shape[1]}, " + super().extra_repr()


def _log_snr(gammas: Tensor, fraction: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """-gamma and its derivative, from the ends, phi and phi'."""
    low, high = gammas
    return -torch.lerp(low, high, fraction), -(high - low) * slope  # exact at both ends


def _rise(u: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """phi and phi' at u (*), of the units a, b, c (K,): the module's formulas."""
    at = torch.cat([u.new_ones(1), u.flatten()])[:, None]  # the first for n(1) - n(0)
    exponent = b * (at - c)
    unit, rest = torch.sigmoid(exponent), torch.sigmoid(-exponent)
    risen = unit * torch.sigmoid(b * c) * -torch.expm1(-b * at)  # of the unit since 0, which would cancel far from c
    height = at[:, 0] + (a * risen).sum(dim=1)
    slope = 1 + (a * b * unit * rest).sum(dim=1)
    phi = height[1:] / height[0]
    phi = phi + torch.where(at[1:, 0] == 1, 1 - phi, 0).detach()  # sums of two rows may be rounded otherwise
    return phi.reshape(u.shape), (slope[1:] / height[0]).reshape(u.shape)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); by default PyTorch drops a term of 1e-9 beyond 20."""
    return softplus(x, threshold=40)


def _softplus_inverse(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))
