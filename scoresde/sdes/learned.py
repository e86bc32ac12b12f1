r"""A variance-preserving path whose log-SNR is learned (variational diffusion models, 2107.00630).

    alpha^2 = sigmoid(-gamma),   sigma^2 = sigmoid(gamma),   gamma(t) = -log SNR = gamma_0 + (gamma_1 - gamma_0) phi(u),

with u = (t - t_min)/(t_max - t_min) and a shape phi that rises from 0 to 1. phi is a monotone network n of one linear
unit and K parallel sigmoid units (appendix H), scaled to run from 0 to 1,

    phi(u) = (n(u) - n(0)) / (n(1) - n(0)),        n(u) = u + sum_k a_k sigmoid(b_k (u - c_k)),        a_k, b_k > 0,
    phi'(u) = (1 + sum_k a_k b_k s_k (1 - s_k)) / (n(1) - n(0)),               s_k = sigmoid(b_k (u - c_k)).

The linear unit keeps phi' > 0 for all parameters. -gamma_0, gamma_1, a_k and b_k are the softplus of trained numbers,
and so positive. Each of these numbers and each c_k is an initial value plus a deviation; the initial values make gamma
nearly linear in t, with the given ends. The deviations are the module's parameters: zero at first, and float32 or
wider. All arithmetic is in float64 on the CPU, so a path is the same function on every device and in every precision
of the network. The parameters move between devices like any others (optimisers, averages and DistributedDataParallel
need nothing special); an evaluation copies them to the CPU, which synchronises with an accelerator.

Every function except `time` is twice differentiable in the parameters. Train a learned path with
`losses.VariationalBound`. Most other losses would make gamma_0 and gamma_1 approach each other, because they have no
term that keeps the two apart: call `path.requires_grad_(False)` before using such a loss.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from scoresde.arguments import checked
from scoresde.sdes.log_snr import LogSNRPath
from scoresde.tensors import FullPrecision, float64

ROUNDS = 80  # largest number of iterations of the root search in `time`; bisection alone would need 50
ROUNDING = 4e-15  # rounding error of phi


@checked
class LearnedVP(FullPrecision, LogSNRPath):
    """A path whose gamma(t) = -log SNR is a monotone network of t (2107.00630, eq. 4 and appendix H).

    Args:
        gamma_min, gamma_max: initial gamma at t_min and at t_max, gamma_min < 0 < gamma_max. The paper uses -13.3 and 5
            (appendix H); gamma_max = 10 leaves as much signal at t_max as `VP`.
        units: K, the number of sigmoid units.
        learn_ends: if True, train gamma at both ends and its shape between them; if False, only the shape.
        t_min, t_max: the range of time.

    Raises:
        ValueError: gamma_min < 0 < gamma_max does not hold, units is not a positive integer, or t_min >= t_max.
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
            raise ValueError(
                f"gammas must satisfy gamma_min < 0 < gamma_max, both finite; got {gamma_min=}, {gamma_max=}"
            )
        if not isinstance(units, int) or units < 1:
            raise ValueError(f"units must be a positive integer; got {units!r}")
        # Plain attributes, not buffers: they stay in float64 on the CPU when the model moves.
        self._first_ends = _softplus_inverse(float64([-gamma_min, gamma_max]))
        centres = (torch.arange(units, dtype=torch.float64, device="cpu") + 0.5) / units
        heights, slopes = torch.full_like(centres, 1 / units), torch.full_like(centres, units / 2)
        self._first_shape = torch.stack([_softplus_inverse(heights), _softplus_inverse(slopes), centres])
        self.ends = nn.Parameter(torch.zeros(2, dtype=torch.float32), requires_grad=learn_ends)
        self.shape = nn.Parameter(torch.zeros(3, units, dtype=torch.float32))
        self._scaled: tuple[Tensor, Tensor, Tensor] | None = None  # within `scaled_gradient`: t, phi and phi'

    def gammas(self) -> Tensor:
        """gamma at t_min and at t_max, (gamma_0, gamma_1): float64 (2,), on the CPU."""
        sizes = _softplus(self._first_ends + float64(self.ends).cpu())
        return torch.stack([-sizes[0], sizes[1]])

    def fraction(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The shape phi (module docstring) at the times t, and its derivative in t: float64, on the CPU."""
        t = float64(t).cpu()
        if self._scaled is not None and torch.equal(t, self._scaled[0]):
            return self._scaled[1:]
        width = self.t_max - self.t_min
        a, b, c = self._units()
        value, slope = _rise((t - self.t_min) / width, a, b, c)
        return value, slope / width

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        (low, high), (fraction, slope) = self.gammas(), self.fraction(t)
        return -torch.lerp(low, high, fraction), -(high - low) * slope  # exact at both ends

    @torch.no_grad()
    def time(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr`, clamped to [t_min, t_max]; without gradient.

        The root search uses Newton's method, and bisection where a Newton step would leave the bracket or converge
        slowly, as it does near the steep foot of a sigmoid unit.
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
            converged = torch.minimum(excess.abs(), right - left) <= ROUNDING
            newton = -excess / slope
            inside = (u + newton >= left) & (u + newton <= right)
            halved = newton.abs() <= 0.5 * step.abs()
            step = torch.where(inside & (halved | converged), newton, 0.5 * (left + right) - u)
            u = u + step
            if bool(converged.all()):
                break
        return (self.t_min + (self.t_max - self.t_min) * u).clamp(self.t_min, self.t_max).to(log_snr)

    @contextmanager
    def scaled_gradient(self, t: Tensor, factor: Callable[[], Tensor]) -> Iterator[None]:
        """Multiply the gradient of the shape phi, not of the ends, by factor(); see `SDE.scaled_gradient`.

        phi and phi' at the times t are evaluated once and reused within the context.
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
        """1, also when sigma(t_max) is trained: the prior is not trained (2107.00630, section 3.3)."""
        return 1.0

    def _units(self) -> tuple[Tensor, Tensor, Tensor]:
        """The parameters a, b and c of the sigmoid units (module docstring): float64 (K,) each, on the CPU."""
        a, b, c = self._first_shape + float64(self.shape).cpu()
        return _softplus(a), _softplus(b), c

    def extra_repr(self) -> str:
        if self.ends.is_meta:
            return f"t_min={self.t_min:g}, t_max={self.t_max:g}"
        low, high = self.gammas().tolist()
        ends = f"t_min={self.t_min:g}, t_max={self.t_max:g}"
        return f"gamma_min={low:g}, gamma_max={high:g}, units={self.shape.shape[1]}, {ends}"


def _rise(u: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return phi and phi' of the module docstring at u (*), for the parameters a, b, c (K,) of the sigmoid units."""
    at = torch.cat([u.new_ones(1), u.flatten()])[:, None]  # the first entry, u = 1, gives n(1) - n(0)
    exponent = b * (at - c)
    unit, rest = torch.sigmoid(exponent), torch.sigmoid(-exponent)
    # The rise of a unit from 0 to u; the difference of two sigmoids would cancel far from c.
    risen = unit * torch.sigmoid(b * c) * -torch.expm1(-b * at)
    height = at[:, 0] + (a * risen).sum(dim=1)
    slope = 1 + (a * b * unit * rest).sum(dim=1)
    phi = height[1:] / height[0]
    phi = phi + torch.where(at[1:, 0] == 1, 1 - phi, 0).detach()  # exactly 1 at u = 1, in spite of rounding
    return phi.reshape(u.shape), (slope[1:] / height[0]).reshape(u.shape)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact beyond x = 20, where PyTorch by default drops a term of up to 2e-9."""
    return softplus(x, threshold=40)


def _softplus_inverse(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))
