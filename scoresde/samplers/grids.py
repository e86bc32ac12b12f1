"""Grids of times: where a sampler stops on its way from the prior to the data.

A grid is a function (sde, steps) -> times, float64, decreasing from t_max to t_min with `steps` transitions between
them, or the times themselves. With lambda = log(alpha/sigma), half the log-SNR, and r = sigma/alpha:

| name              | equal steps in                     | source                                   |
|-------------------|------------------------------------|------------------------------------------|
| `uniform_time`    | t                                  | 2011.13456, appendix D                   |
| `uniform_log_snr` | lambda                             | 2206.00927, section 3.4                  |
| `quadratic`       | t^(1/2): denser at the data        | 2010.02502, appendix D.2                 |
| `uniform_angle`   | phi = atan(sigma/alpha)            | 2202.00512, appendix D                   |
| `angle`           | phi^(1/2): denser at the data      |                                          |
| `karras`          | r^(1/rho), rho = 7                 | 2206.00364, eq. 5                        |
| `Indices`         | the nodes of a discrete model      | 2305.08891, table 2: leading, trailing   |
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from scoresde.sdes import SDE
from scoresde.tensors import float64

Grid = Callable[[SDE, int], Tensor]
Transition = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Power:
    """Times with equal steps in t^(1/power): 1 is uniform, 2 quadratic.

    Args:
        power: positive.
        end: the last time, t_min unless given. The VP models of 2011.13456 are sampled down to 1e-3 (appendix C).

    Raises:
        ValueError: a power that is not positive; in a call, an end outside of the SDE's range.
    """

    power: float = 1.0
    end: float | None = None

    def __post_init__(self):
        if not self.power > 0:
            raise ValueError(f"a positive power expected; got {self.power}")

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        end = sde.t_min if self.end is None else self.end
        if not sde.t_min <= end < sde.t_max:
            raise ValueError(f"an end in [{sde.t_min:g}, {sde.t_max:g}) expected; got {end:g}")
        high, low = (value ** (1 / self.power) for value in (sde.t_max, end))
        times = torch.linspace(high, low, steps + 1, dtype=torch.float64) ** self.power
        times[0], times[-1] = sde.t_max, end
        return times


uniform_time = Power(1.0)
quadratic = Power(2.0)


def uniform_log_snr(sde: SDE, steps: int) -> Tensor:
    """steps + 1 times from t_max to t_min, uniform in log-SNR, float64."""
    ends = _log_snr(sde)
    return _at(sde, torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64))


@dataclass(frozen=True)
class KarrasGrid:
    """Times with equal steps in r^(1/rho), r = sigma/alpha (2206.00364, eq. 5).

    Args:
        rho: 7 there; 1 is uniform in r, and large ones come near `uniform_log_snr`.
        low, high: r at both ends; those of the path unless given (0.002 and 80 there).

    Raises:
        ValueError: a rho that is not positive; in a call, ends that the path does not reach.
    """

    rho: float = 7.0
    low: float | None = None
    high: float | None = None

    def __post_init__(self):
        if not self.rho > 0:
            raise ValueError(f"a positive rho expected; got {self.rho}")

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        least, most = reversed(torch.exp(-0.5 * _log_snr(sde)).tolist())
        low = least if self.low is None else self.low
        high = most if self.high is None else self.high
        if not least * (1 - 1e-9) <= low < high <= most * (1 + 1e-9):
            raise ValueError(
                f"low < high within [{least:g}, {most:g}], the sigma/alpha of the path, expected; got {self}"
            )
        roots = torch.linspace(high ** (1 / self.rho), low ** (1 / self.rho), steps + 1, dtype=torch.float64)
        times = sde.time(-2 * self.rho * roots.log())
        for index, given, end in ((0, self.high, sde.t_max), (-1, self.low, sde.t_min)):
            if given is None:
                times[index] = end
        return times


karras = KarrasGrid()


@dataclass(frozen=True)
class Angle:
    """Times with equal steps in phi^(1/power), phi = atan(sigma/alpha) from 0 (data) to pi/2 (noise).

    Args:
        power: 1 is uniform in the angle, larger ones are denser at the data.
        low: sigma/alpha at the end; that of t_min unless given. With few steps to a path that ends in next to no noise
            (sub-VP: 5e-5), the last of them are better spent before: 0.002 to 0.02, and `denoise_final`.

    Raises:
        ValueError: a power that is not positive; in a call, an end that the path does not reach.
    """

    power: float = 2.0
    low: float | None = None

    def __post_init__(self):
        if not self.power > 0:
            raise ValueError(f"a positive power expected; got {self.power}")

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
        most, least = sde.at(ends).angle.tolist()
        low = least if self.low is None else math.atan(self.low)
        if not least <= low < most:
            raise ValueError(
                f"low in [{math.tan(least):g}, {math.tan(most):g}), sigma/alpha of the path; got {self.low}"
            )
        roots = torch.linspace(most ** (1 / self.power), low ** (1 / self.power), steps + 1, dtype=torch.float64)
        times = _at(sde, -2 * roots.pow(self.power).tan().log())
        if self.low is not None:
            times[-1] = sde.time(float64(-2 * math.log(self.low)))
        return times


uniform_angle, angle = Angle(1.0), Angle(2.0)


@dataclass(frozen=True)
class Indices:
    """Some of the nodes of a model with `count` discrete steps, times k / (count - 1) of `Tabulated`: one a step.

    There are steps transitions less one between them; the last evaluation is that of `denoise_final=True`, as in
    the samplers of diffusers, whose last step goes to sigma = 0.

    Args:
        spacing: "leading", k = 0, n, 2n, ... with n = count // steps; "trailing", from count - 1 down in steps of
            count / steps; or "linspace", both ends (2305.08891, table 2).
        count: nodes of the model.
        offset: added to the indices of "leading".

    Raises:
        ValueError: another spacing; in a call, a number of steps not in 2, ..., count.
    """

    spacing: str = "trailing"
    count: int = 1000
    offset: int = 0

    def __post_init__(self):
        if self.spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"spacing 'leading', 'trailing' or 'linspace' expected; got {self.spacing!r}")
        if self.count < 2:
            raise ValueError(f"two nodes or more expected; got count={self.count}")

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        if not 2 <= steps <= self.count:
            raise ValueError(f"2 to {self.count} steps expected, one for each index; got {steps}")
        each = torch.arange(steps, dtype=torch.float64)
        if self.spacing == "leading":
            indices = (each.flip(0) * (self.count // steps) + self.offset).clamp(max=self.count - 1)
        elif self.spacing == "trailing":
            indices = (self.count - each * self.count / steps).round() - 1
        else:
            indices = (each.flip(0) * (self.count - 1) / (steps - 1)).round()
        return sde.t_min + (sde.t_max - sde.t_min) * indices / (self.count - 1)


def _log_snr(sde: SDE) -> Tensor:
    """log-SNR at t_max and t_min; a ValueError if infinite."""
    ends = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64))
    if not bool(torch.isfinite(ends).all()):
        raise ValueError(
            f"a finite log-SNR at both ends expected; {type(sde).__name__} has {ends.tolist()}: lower t_max or raise "
            "t_min a little, or take a grid in the angle"
        )
    return ends


def _at(sde: SDE, log_snr: Tensor) -> Tensor:
    """The times of these log-SNRs, the first of them t_max and the last t_min."""
    times = sde.time(log_snr)
    times[0], times[-1] = sde.t_max, sde.t_min
    return times


GRIDS: dict[str, Grid] = {
    "uniform_time": uniform_time,
    "uniform_log_snr": uniform_log_snr,
    "quadratic": quadratic,
    "karras": karras,
    "uniform_angle": uniform_angle,
    "angle": angle,
}


@dataclass(frozen=True)
class Given:
    """The user's own times, whatever the number of steps asked for."""

    times: Tensor

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        return self.times


def resolve_grid(grid: str | Grid | Tensor | Sequence[float]) -> Grid:
    """The grid of that name, of those times, or the function given.

    Raises:
        ValueError: an unknown name.
    """
    if callable(grid):
        return grid
    if not isinstance(grid, str):
        times = float64(grid).cpu()
        _check_length(times)
        return Given(times)
    if grid not in GRIDS:
        raise ValueError(
            f"grid among {', '.join(GRIDS)}, a function (sde, steps) -> times, or the times themselves, expected; "
            f"got {grid!r}"
        )
    return GRIDS[grid]


def _check_length(times: Tensor) -> None:
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"a grid of two times or more, (n,), expected; got shape {tuple(times.shape)}")


def transitions(times: Tensor, sde: SDE) -> list[Transition]:
    """Consecutive pairs of a grid; times may rise again in between (RePaint, 2201.09865).

    Raises:
        ValueError: fewer than two times, two equal ones in a row, times that leave [t_min, t_max], a first one that is
            not the largest, or a last one that is not the smallest.
    """
    times = float64(times).cpu()
    _check_length(times)
    falls = times[0] == times.max() and times[-1] == times.min()
    if not (falls and bool((times.diff() != 0).all())) or times[0] > sde.t_max or times[-1] < sde.t_min:
        raise ValueError(
            f"times within [{sde.t_min:g}, {sde.t_max:g}] expected, from the largest to the smallest, each other than "
            f"the one before; got {times.tolist()}"
        )
    return list(pairwise(times))
