r"""Optimal transport between samples: exact Wasserstein distances on the line, and their mean over directions.

W_p = (int_0^1 |F_x^-1(q) - F_y^-1(q)|^p dq)^(1/p)
SW_p = (mean over unit vectors u of W_p(u x, u y)^p)^(1/p)                       (Rabin et al. 2011)

with F_x^-1 the quantile function of the sample x, and u x the projections of its states on u.
"""

import numpy as np
import torch
from torch import Tensor

from scoresde.configured import Configured
from scoresde.metrics.samples import flatten_pair, refuse_nonfinite
from scoresde.tensors import float64


def wasserstein(x: Tensor, y: Tensor, order: float = 2) -> Tensor:
    r"""Return the exact W_p of samples on the line: (\int_0^1 |F_x^-1(q) - F_y^-1(q)|^p dq)^(1/p).

    Args:
        x, y: values (..., N) and (..., M), in any order.
        order: p >= 1.

    Returns:
        (...), float64.

    Raises:
        ValueError: order < 1, the leading dimensions differ, or a value is not finite.
    """
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"x and y must have the same leading dimensions; got {tuple(x.shape)} and {tuple(y.shape)}")
    for name, values in (("x", x), ("y", y)):
        refuse_nonfinite(values.reshape(-1, 1), name)
    return _transport(float64(x).sort(dim=-1).values, float64(y).sort(dim=-1).values, order) ** (1 / order)


def _transport(x: Tensor, y: Tensor, order: float) -> Tensor:
    """Return W_p^p, p = `order`, of sorted values x (..., n) and y (..., m).

    It is the integral of a step function that jumps at the multiples of 1/n and of 1/m.
    """
    if not order >= 1:
        raise ValueError(f"expected order >= 1; got {order}")
    n, m = x.shape[-1], y.shape[-1]
    if n == m:
        return (x - y).abs().pow(order).mean(dim=-1)
    jumps = [torch.arange(1, count + 1, device=x.device) * other for count, other in ((n, m), (m, n))]
    ends = torch.cat(jumps).unique()  # in units of 1/(n m): integers, so that equal ends of x and y merge exactly
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    gaps = (x[..., (ends - 1) // m] - y[..., (ends - 1) // n]).abs().pow(order)
    return gaps @ lengths.double() / (n * m)


def directions(size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw unit vectors (count, size), uniform on the sphere; in one dimension return the single direction (1, 1)."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if count < 1:
        raise ValueError(f"expected at least 1 projection; got {count}")
    drawn = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


class SlicedWasserstein(Configured):
    """The sliced Wasserstein distance of order p between subsets of x and y.

    A call with indices i of x and j of y, without repetitions, returns a scalar `()`. The attribute `all` is the pair
    of the indices of every sample.

    The projections are sorted once, since the order within a subset follows from the order of all samples. They are
    kept on the CPU, whichever device the samples are on.

    Args:
        x, y: samples (N, *) and (M, *).
        projections: number of directions, or the directions themselves, (P, D).
        order: p >= 1.
        generator: generator that draws the directions.

    Raises:
        ValueError: shapes of samples or directions do not match, or order < 1.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        projections: int | Tensor = 128,
        order: float = 2,
        generator: torch.Generator | None = None,
    ):
        x, y = flatten_pair(x, y)
        u = float64(projections) if isinstance(projections, Tensor) else directions(x.shape[1], projections, generator)
        if u.ndim != 2 or u.shape[1] != x.shape[1]:
            raise ValueError(f"expected directions of shape (P, {x.shape[1]}); got {tuple(u.shape)}")
        self.order = order
        self._x, self._y = ((u.to(part.device) @ part.mT).cpu().sort(dim=1) for part in (x, y))
        self.all = torch.arange(len(x)), torch.arange(len(y))

    def __call__(self, i: Tensor, j: Tensor) -> Tensor:
        x, y = self._select(self._x, i), self._select(self._y, j)
        return _transport(x, y, self.order).mean() ** (1 / self.order)

    @staticmethod
    def _select(projected: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        """Return the sorted projections (P, n) of the n states at the indices `rows`.

        `projected` has the sorted projections (P, N) of all states, and the indices (P, N) that sort them.
        """
        values, order = projected
        is_selected = torch.zeros(values.shape[1], dtype=torch.bool)
        is_selected[rows] = True
        positions = np.flatnonzero(is_selected.index_select(0, order.flatten()).numpy())
        return values.flatten()[torch.from_numpy(positions)].reshape(len(values), -1)  # faster than a boolean index


def sliced_wasserstein(
    x: Tensor, y: Tensor, projections: int | Tensor = 128, order: float = 2, generator: torch.Generator | None = None
) -> Tensor:
    """Return (mean over directions u of W_p(u x, u y)^p)^(1/p), with W_p exact for any N and M, in units of the state.

    For two Gaussians of covariance s^2 I with means a distance |m| apart, SW_2 = |m| / D^(1/2).

    Args and errors: see `SlicedWasserstein`.

    Returns:
        (), float64.
    """
    statistic = SlicedWasserstein(x, y, projections, order, generator)
    return statistic(*statistic.all)
