r"""Optimal transport between samples: Wasserstein distances on the line, exact, and their mean over directions.

W_p = (int_0^1 |F_x^-1(q) - F_y^-1(q)|^p dq)^(1/p)
SW_p = (mean over unit vectors u of W_p(u x, u y)^p)^(1/p)                       (Rabin et al. 2011)
"""

import numpy as np
import torch
from torch import Tensor

from scoresde.metrics.samples import both, everything
from scoresde.tensors import float64


def wasserstein(x: Tensor, y: Tensor, order: float = 2) -> Tensor:
    r"""W_p of samples on the line, exact: (\int_0^1 |F_x^-1(q) - F_y^-1(q)|^p dq)^(1/p).

    Args:
        x, y: values (..., N) and (..., M), sorted or not.
        order: p >= 1.

    Returns:
        (...), float64.

    Raises:
        ValueError: an order below 1.
    """
    return _transport(float64(x).sort(dim=-1).values, float64(y).sort(dim=-1).values, order) ** (1 / order)


def _transport(x: Tensor, y: Tensor, order: float) -> Tensor:
    """W_p^p of sorted values: the quantile functions are steps, and their difference is one between all the ends."""
    if not order >= 1:
        raise ValueError(f"an order of 1 or more expected; got {order}")
    n, m = x.shape[-1], y.shape[-1]
    if n == m:
        return (x - y).abs().pow(order).mean(dim=-1)
    steps = [torch.arange(1, count + 1, device=x.device) * other for count, other in ((n, m), (m, n))]
    ends = torch.cat(steps).unique()  # in units of 1/(n m): whole numbers, so that no end is missed
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    gaps = (x[..., (ends - 1) // m] - y[..., (ends - 1) // n]).abs().pow(order)
    return gaps @ lengths.double() / (n * m)


def directions(size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Unit vectors (count, size), uniform on the sphere; of a line, the one that there is."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if count < 1:
        raise ValueError(f"one projection or more expected; got {count}")
    drawn = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


class SlicedWasserstein:
    """SW_p of some of the samples: a statistic of index sets (i, j), each index at most once, `()`.

    Sorts once, for the order of some of the samples is that of all. On the CPU, wherever the samples are.

    Args:
        x, y: samples (N, *) and (M, *).
        projections: number of directions, or the directions themselves, (P, D).
        order: p.
        generator: of the directions.

    Raises:
        ValueError: samples or directions of shapes that do not fit, an order below 1.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        projections: int | Tensor = 128,
        order: float = 2,
        generator: torch.Generator | None = None,
    ):
        x, y = both(x, y)
        given = isinstance(projections, Tensor)
        u = float64(projections) if given else directions(x.shape[1], int(projections), generator)
        if u.ndim != 2 or u.shape[1] != x.shape[1]:
            raise ValueError(f"directions (P, {x.shape[1]}) expected; got {tuple(u.shape)}")
        self.order = order
        self._x, self._y = ((u.to(part.device) @ part.mT).cpu().sort(dim=1) for part in (x, y))
        self.all = everything(x).cpu(), everything(y).cpu()

    def __call__(self, i: Tensor, j: Tensor) -> Tensor:
        x, y = (self._some(*pair) for pair in ((self._x, i), (self._y, j)))
        return _transport(x, y, self.order).mean() ** (1 / self.order)

    @staticmethod
    def _some(ranked: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        values, order = ranked
        kept = torch.zeros(values.shape[1], dtype=torch.bool)
        kept[rows] = True
        chosen = kept.index_select(0, order.flatten()).numpy()
        places = torch.from_numpy(np.flatnonzero(chosen))  # several times as fast as a boolean index
        return values.flatten()[places].reshape(len(values), -1)


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    projections: int | Tensor = 128,
    order: float = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(mean over directions u of W_p(u x, u y)^p)^(1/p), with W_p exact for any N and M; in the units of the state.

    For two Gaussians of covariance s^2 I whose means are |m| apart, SW_2 = |m| / D^(1/2).

    Args and errors: see `SlicedWasserstein`.

    Returns:
        (), float64.
    """
    statistic = SlicedWasserstein(x, y, projections, order, generator)
    return statistic(*statistic.all)
