r"""The angle of a Gaussian path, in which the probability flow of every SDE is the same ordinary differential equation.

With S the scale of the data, let phi = atan2(sigma, alpha S), which rises from data (0) to noise (pi/2). The states

    y = x / n,      n = (alpha^2 S^2 + sigma^2)^(1/2),      y = cos(phi) x_0/S + sin(phi) eps

rotate: along the probability flow (2410.11081, section 2; 2206.00364, table 1 for the scaling)

    dy/dphi = v(y, phi) = cos(phi) E[eps | x] - sin(phi) E[x_0 | x]/S.

v is constant along straight rotations: a DDIM step from t to s (2010.02502) is y_s = cos(d) y_t + sin(d) v(y_t, t) with
d = phi_s - phi_t, for every SDE.

Near the data, structure of relative size c matters at angles of about c. Quantities that change on the scale of phi
itself are therefore smooth in the clock l(phi) = log(1 + phi/c), with c = 0.02; it is linear in phi below c, and
logarithmic above.
"""

import math

import torch
from torch import Tensor

from scoresde.arguments import Positive, checked
from scoresde.configured import Configured
from scoresde.losses import TimeDensity
from scoresde.sdes import SDE
from scoresde.tensors import broadcast, float64
from scoresde.views import Views

FINEST = 0.02  # c of the module docstring


class AnglePath(Configured):
    """The angle phi = atan2(sigma, alpha S) along the path of an SDE, and functions of it.

    phi rises from data (0) to noise (pi/2). The states y = x / n with n = (alpha^2 S^2 + sigma^2)^(1/2) follow the flow
    dy/dphi = cos(phi) E[eps | x] - sin(phi) E[x_0 | x]/S (2410.11081, section 2), and l = log(1 + phi/0.02) is the
    clock of flow maps. Times and values are float64, () or (B,).

    Args:
        sde: the diffusion.
        data_scale: S, about the standard deviation of the data in model space.
    """

    def __init__(self, sde: SDE, data_scale: float):
        self.sde, self.data_scale = sde, data_scale

    def angle(self, t: Tensor) -> Tensor:
        """Return phi(t)."""
        return torch.atan2(self.sde.sigma(t), self.data_scale * self.sde.alpha(t))

    def size(self, t: Tensor) -> Tensor:
        """Return n(t), the ratio of x to y."""
        return torch.hypot(self.data_scale * self.sde.alpha(t), self.sde.sigma(t))

    def rate(self, t: Tensor) -> Tensor:
        """Return dphi/dt = S (sigma' alpha - sigma alpha') / n^2."""
        sde = self.sde
        rotation = sde.sigma_dot(t) * sde.alpha(t) - sde.sigma(t) * sde.alpha_dot(t)
        return self.data_scale * rotation / self.size(t).square()

    def velocity(self, views: Views) -> Tensor:
        """Return v = dy/dphi (B, *) from the views of a model, or of a known pair (x_0, eps), at time views.t."""
        phi = self.angle(views.t)
        return views.combine(-phi.sin() / self.data_scale, phi.cos())

    def rotation(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, b) with x_s = a x_t + b F for y_s = cos(d) y_t + sin(d) F, d = phi(s) - phi(t)."""
        d = self.angle(s) - self.angle(t)
        return d.cos() * self.size(s) / self.size(t), d.sin() * self.size(s)

    def clock(self, t: Tensor) -> Tensor:
        """Return l(phi(t)) of the module docstring."""
        return torch.log1p(self.angle(t) / FINEST)

    def fraction(self, t: Tensor) -> Tensor:
        """Return the clock divided by that of pure noise, in [0, 1]."""
        return self.clock(t) / math.log1p(math.pi / 2 / FINEST)

    def clock_rate(self, t: Tensor) -> Tensor:
        """Return dl/dphi = 1 / (c + phi), the rate of the clock at the angle phi."""
        return 1 / (FINEST + self.angle(t))

    def time(self, clock: Tensor) -> Tensor:
        """Return the time at which the clock has this value, clamped to [t_min, t_max]."""
        return self.time_of_angle(FINEST * torch.expm1(clock))

    def time_of_angle(self, phi: Tensor) -> Tensor:
        """Return the time with the angle phi, clamped to [t_min, t_max]."""
        ratio = self.data_scale * phi.clamp(min=0, max=math.pi / 2).tan()
        return self.sde.time(-2 * ratio.log())

    def ends(self) -> Tensor:
        """Return [t_min, t_max], float64."""
        return float64([self.sde.t_min, self.sde.t_max])

    def between(self, u: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the times at the fractions u of the clock from the time `low` to the time `high`; all () or (B,)."""
        first, last = self.clock(low), self.clock(high)
        return self.time(first + u * (last - first))

    def to_state(self, y: Tensor, t: Tensor) -> Tensor:
        """Return x = n(t) y."""
        return broadcast(self.size(t), y) * y


@checked
class UniformClock(TimeDensity):
    """Training times whose clock l = log(1 + phi/0.02) is uniform, with the angle phi = atan2(sigma, alpha S).

    Small angles, which are near the data, thus get as many times as large ones. It is the default of the objectives of
    flow maps.

    Args:
        data_scale: S, about the standard deviation of the data in model space.

    Raises:
        ValueError: data_scale is not positive and finite.
    """

    def __init__(self, data_scale: Positive = 1.0):
        self.data_scale = data_scale

    def quantile(self, sde: SDE, u: Tensor) -> Tensor:
        path = AnglePath(sde, self.data_scale)
        return path.between(u, *path.ends().unbind())

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        path = AnglePath(sde, self.data_scale)
        first, last = path.clock(path.ends())
        return path.clock_rate(t) * path.rate(t) / (last - first)
