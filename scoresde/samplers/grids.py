"""Grids of times: the times between which a sampler steps from the prior to the data.

A grid is either a function (sde, steps) -> times, with `steps` + 1 float64 times that decrease from t_max to t_min, or
the times themselves. With lambda = log(alpha/sigma), half the log-SNR, and r = sigma/alpha:

| name              | equal steps in                     | source                                   |
|-------------------|------------------------------------|------------------------------------------|
| `uniform_time`    | t                                  | 2011.13456, appendix D                   |
| `uniform_log_snr` | lambda                             | 2206.00927, section 3.4                  |
| `quadratic`       | t^(1/2): denser at the data        | 2010.02502, appendix D.2                 |
| `uniform_angle`   | phi = atan(sigma/alpha)            | 2202.00512, appendix D                   |
| `angle`           | phi^(1/2): denser at the data      |                                          |
| `karras`          | r^(1/rho), rho = 7                 | 2206.00364, eq. 5                        |
| `bounded_karras`  | psi^(1/5), psi = atan(r/10)        | finite where alpha = 0 or sigma = 0      |
| `bounded_log_snr` | psi^(1/15), psi = atan(r/3)        | also finite; nearly uniform in lambda    |
| `Indices`         | the nodes of a discrete model      | 2305.08891, table 2: leading, trailing   |

`PredictorCorrector` uses the attribute `grid` of its predictor unless it is given a grid. A method with a polynomial in
lambda needs steps whose lengths in lambda are similar; a polynomial in phi or in r needs steps that shrink towards the
data. On other grids, a few steps extrapolate far beyond the known values, and the samples spread without bound.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from scoresde.arguments import checked
from scoresde.sdes import SDE
from scoresde.tensors import float64, listed

Grid = Callable[[SDE, int], Tensor]
Transition = tuple[Tensor, Tensor]


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive; got {value}")


def _ends(sde: SDE) -> Tensor:
    """Return (t_max, t_min), float64 (2,)."""
    return torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)


def _roots(high: float, low: float, power: float, steps: int) -> Tensor:
    """Return steps + 1 values from high^(1/power) to low^(1/power), in equal steps."""
    return torch.linspace(high ** (1 / power), low ** (1 / power), steps + 1, dtype=torch.float64)


def _times(sde: SDE, log_snr: Tensor, from_start: bool = True, to_end: bool = True) -> Tensor:
    """Return the times of these log-SNRs; if from_start, the first is exactly t_max; if to_end, the last is t_min."""
    times = sde.time(log_snr)
    if from_start:
        times[0] = sde.t_max
    if to_end:
        times[-1] = sde.t_min
    return times


@checked
@dataclass(frozen=True)
class Power:
    """Times with equal steps in t^(1/power): 1 is uniform, 2 quadratic.

    Args:
        power: positive; larger values place more times near the data.
        end: the last time; default t_min. 2011.13456 samples its VP models down to 1e-3 (appendix C).

    Raises:
        ValueError: power is not positive; in a call, end is outside of [t_min, t_max).
    """

    power: float = 1.0
    end: float | None = None

    def __post_init__(self):
        _check_positive("power", self.power)

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        end = sde.t_min if self.end is None else self.end
        if not sde.t_min <= end < sde.t_max:
            raise ValueError(f"end must be in [{sde.t_min:g}, {sde.t_max:g}); got {end:g}")
        times = _roots(sde.t_max, end, self.power, steps) ** self.power
        times[0], times[-1] = sde.t_max, end
        return times


uniform_time = Power(1.0)
quadratic = Power(2.0)


def uniform_log_snr(sde: SDE, steps: int) -> Tensor:
    """Return times with equal steps in log-SNR; those of `bounded_log_snr` if the log-SNR is infinite at an end.

    Args:
        sde: the path.
        steps: number of steps.

    Returns:
        steps + 1 times from t_max to t_min, float64.
    """
    ends = sde.log_snr(_ends(sde))
    if not bool(torch.isfinite(ends).all()):
        return bounded_log_snr(sde, steps)
    high, low = ends.tolist()
    return _times(sde, torch.linspace(high, low, steps + 1, dtype=torch.float64))


@checked
@dataclass(frozen=True)
class KarrasGrid:
    """Times with equal steps in r^(1/rho), r = sigma/alpha (2206.00364, eq. 5).

    If r is infinite at the start, the steps are equal in atan(r/10)^(1/rho). If r is 0 at the end, the last step goes
    from r = 0.002 to 0.

    Args:
        rho: default 7, as in the paper; 1 is uniform in r, and large values approach `uniform_log_snr`.
        low, high: r at the end and at the start; default: those of the path (0.002 and 80 in the paper).

    Raises:
        ValueError: rho is not positive; in a call, low >= high, or one of them is not a value of r on the path.
    """

    rho: float = 7.0
    low: float | None = None
    high: float | None = None

    def __post_init__(self):
        _check_positive("rho", self.rho)

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        ends = _ends(sde)
        most, least = torch.exp(-0.5 * sde.log_snr(ends)).tolist()
        low = least if self.low is None else self.low
        high = most if self.high is None else self.high
        if not least * (1 - 1e-9) <= low < high <= most * (1 + 1e-9):
            raise ValueError(
                f"low and high must satisfy low < high within [{least:g}, {most:g}], the range of sigma/alpha on the "
                f"path; got low={low:g}, high={high:g}"
            )
        if low == 0 and steps > 1:
            return torch.cat([replace(self, low=LOWEST)(sde, steps - 1), ends[1:]])
        if math.isinf(high):
            return Angle(self.rho, self.low, BOUND)(sde, steps)
        log_snr = -2 * self.rho * _roots(high, low, self.rho, steps).log()
        return _times(sde, log_snr, self.high is None, self.low is None)


karras = KarrasGrid()
BOUND = 10.0  # the r beyond which the steps of `bounded_karras` grow, to reach r = infinity
LOWEST = 0.002  # the r from which a few steps reach r = 0: the smallest sigma of 2206.00364
CLEAN = LOWEST / 10  # the r below which almost no noise is left


@checked
@dataclass(frozen=True)
class Angle:
    """Times with equal steps in psi^(1/power), psi = atan(r/scale) from 0 (data) to pi/2 (noise), r = sigma/alpha.

    Where r is less than `scale`, the steps are those of `KarrasGrid`, nearly uniform in log r for a large power. Where
    r is larger, the steps grow, so that a few of them reach r = infinity, where no signal is left.

    Args:
        power: 1 is uniform in psi; larger values place more times near the data.
        scale: 1 makes psi the angle atan(sigma/alpha); larger values place more times near the noise.
        low: r at the end; default: that of t_min. On a path that ends with almost no noise (sub-VP: 1e-6), few steps
            are better spent at larger r: choose a low of 0.002 to 0.02, and `denoise_final`.

    Raises:
        ValueError: power or scale is not positive; in a call, low is outside of the values of r on the path.
    """

    power: float = 2.0
    low: float | None = None
    scale: float = 1.0

    def __post_init__(self):
        _check_positive("power", self.power)
        _check_positive("scale", self.scale)

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        ends = _ends(sde)
        most, least = torch.atan2(sde.sigma(ends), self.scale * sde.alpha(ends)).tolist()
        low = least if self.low is None else math.atan(self.low / self.scale)
        if not least <= low < most:
            raise ValueError(
                f"low must be in [{self.scale * math.tan(least):g}, {self.scale * math.tan(most):g}), the range of "
                f"sigma/alpha on the path; got {self.low}"
            )
        ratios = self.scale * _roots(most, low, self.power, steps).pow(self.power).tan()
        times = _times(sde, -2 * ratios.log())
        if self.low is not None:
            times[-1] = sde.time(float64(-2 * math.log(self.low)))
        return times


uniform_angle = Angle(1.0)
angle = Angle(2.0)


@dataclass(frozen=True)
class Bounded:
    """The grid `Angle(power, scale=scale)`, but with one long last step if the path ends with almost no noise.

    The last step depends on r = sigma/alpha at t_min. If r is 0 there, the last step goes from r = 0.002 to 0. If r is
    between 0 and 0.0002 (sub-VP: 1e-6), the steps before the last one go down to r = 0.002, or further as long as none
    of them exceeds `longest` in log r; the last step goes from there to t_min. If this last step would be shorter than
    `longest`, or if r is at least 0.0002 at t_min, the grid is `Angle(power, scale=scale)`.

    Args:
        power, scale: see `Angle`.
        longest: largest step in log r near the data, apart from the last one; default: no limit.
    """

    power: float
    scale: float
    longest: float = math.inf

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        ends = _ends(sde)
        most, least = torch.exp(-0.5 * sde.log_snr(ends)).tolist()
        low, longest = max(least or LOWEST, self._reached(most, steps - 1)), min(self.longest, 700.0)
        if steps == 1 or least >= CLEAN or low < least * math.exp(longest):
            return Angle(self.power, scale=self.scale)(sde, steps)
        return torch.cat([Angle(self.power, min(low, LOWEST), self.scale)(sde, steps - 1), ends[1:]])

    def _reached(self, high: float, steps: int) -> float:
        """Return the lowest r that `steps` steps from r = `high` reach if none is longer than `longest` in log r."""
        root = math.atan(high / self.scale) ** (1 / self.power)
        root /= 1 + steps * math.expm1(min(self.longest, 700.0) / self.power)
        return self.scale * math.tan(root**self.power)


bounded_karras = Bounded(5.0, BOUND)
bounded_log_snr = Bounded(15.0, 3.0, longest=1.0)


@checked
@dataclass(frozen=True)
class Indices:
    """Times of `steps` nodes, chosen from the `count` nodes of a discrete model.

    Node k has time k / (count - 1) (`Tabulated`). `steps` nodes have steps - 1 transitions between them.
    `denoise_final=True` adds the evaluation at the last node, as in the samplers of diffusers, whose last step goes to
    sigma = 0. With steps=1 this is the only evaluation, and has to be at the noisiest node; of the three spacings, only
    "trailing" selects that node.

    Args:
        spacing: "leading", k = 0, n, 2n, ... with n = count // steps; "trailing", from count - 1 down in steps of
            count / steps; or "linspace", both ends included (2305.08891, table 2).
        count: number of nodes of the model.
        offset: added to the indices k of "leading".

    Raises:
        ValueError: spacing is unknown, or count < 2; in a call, steps is not from 1 to count, or is 1 with a spacing
            other than "trailing".
    """

    spacing: str = "trailing"
    count: int = 1000
    offset: int = 0

    def __post_init__(self):
        if self.spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"spacing must be 'leading', 'trailing' or 'linspace'; got {self.spacing!r}")
        if self.count < 2:
            raise ValueError(f"count must be at least 2 nodes; got {self.count}")

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        fewest = 1 if self.spacing == "trailing" else 2
        if not fewest <= steps <= self.count:
            raise ValueError(f"steps must be from {fewest} to {self.count} with spacing={self.spacing!r}; got {steps}")
        each = torch.arange(steps, dtype=torch.float64)
        if self.spacing == "leading":
            indices = (each.flip(0) * (self.count // steps) + self.offset).clamp(max=self.count - 1)
        elif self.spacing == "trailing":
            indices = (self.count - each * self.count / steps).round() - 1
        else:
            indices = (each.flip(0) * (self.count - 1) / (steps - 1)).round()
        return sde.t_min + (sde.t_max - sde.t_min) * indices / (self.count - 1)


GRIDS: dict[str, Grid] = {
    "uniform_time": uniform_time,
    "uniform_log_snr": uniform_log_snr,
    "quadratic": quadratic,
    "karras": karras,
    "uniform_angle": uniform_angle,
    "angle": angle,
    "bounded_karras": bounded_karras,
    "bounded_log_snr": bounded_log_snr,
}


@dataclass(frozen=True)
class FixedTimes:
    """A grid that returns the given times for any number of steps."""

    times: Tensor

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        return self.times


def resolve_grid(grid: str | Grid | Tensor | Sequence[float]) -> Grid:
    """Return the grid with the given name or the given times; return a function unchanged.

    Raises:
        ValueError: the name is unknown, or there are no times.
    """
    if callable(grid):
        return grid
    if not isinstance(grid, str):
        return FixedTimes(_as_times(grid))
    if grid not in GRIDS:
        raise ValueError(
            f"grid must be one of {', '.join(GRIDS)}, a function (sde, steps) -> times, or the times themselves; got "
            f"{grid!r}"
        )
    return GRIDS[grid]


def _as_times(times: Tensor | Sequence[float]) -> Tensor:
    times = float64(times).cpu()
    if times.ndim != 1 or not len(times):
        raise ValueError(f"a grid must be a sequence of times, shape (n,), n >= 1; got shape {tuple(times.shape)}")
    return times


def transitions(times: Tensor, sde: SDE) -> list[Transition]:
    """Return the consecutive pairs of the times of a grid; a single time has none.

    The times may rise again in between (RePaint, 2201.09865).

    Raises:
        ValueError: there are no times, a single time is not t_max, two times in a row are equal, a time is outside of
            [t_min, t_max], the first time is not the largest, or the last time is not the smallest.
    """
    times = _as_times(times)
    if len(times) == 1 and times[0] != sde.t_max:
        raise ValueError(f"a grid with a single time must have the time t_max={sde.t_max:g}; got {float(times[0]):g}")
    falls = times[0] == times.max() and times[-1] == times.min()
    if not (falls and bool((times.diff() != 0).all())) or times[0] > sde.t_max or times[-1] < sde.t_min:
        raise ValueError(
            f"the times of a grid must lie in [{sde.t_min:g}, {sde.t_max:g}], begin with the largest, end with the "
            f"smallest and differ from one to the next; got {listed(times)}"
        )
    return list(pairwise(times))


def segments(sde: SDE, count: int) -> list[Transition]:
    """Return `count` transitions from t_max to t_min, uniform in log-SNR."""
    return transitions(uniform_log_snr(sde, count) if count > 1 else _ends(sde), sde)
