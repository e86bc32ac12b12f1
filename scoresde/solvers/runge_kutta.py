"""Explicit Runge-Kutta methods on a uniform grid, at a fixed cost; a sample does not depend on the others in its batch.

A step of size h of du/ds = v(s, u) is given by the Butcher tableau (a, b, c) of the method (Hairer, Norsett and Wanner,
Solving Ordinary Differential Equations I, section II.1),

    k_i = v(s + c_i h, u + h sum_j a_ij k_j),        u <- u + h sum_i b_i k_i.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from scoresde.arguments import Few, checked
from scoresde.solvers.solver import Field, Solution, Status, check_data_scale, choose, finite, per_sample
from scoresde.tensors import double


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit method of the given order: nodes c, rows of a below the diagonal, weights b."""

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


TABLEAUX = {
    "euler": Tableau(1, (0,), ((),), (1,)),
    "heun2": Tableau(2, (0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "heun3": Tableau(3, (0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "rk4": Tableau(4, (0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


@checked
@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method with a fixed number of equal steps.

    A sample that turns NaN or infinite stops at its last finite state, and the others go on; `Solution` reports the
    position and status of each. The error is not measured: if the steps are too long, the state is wrong although the
    status is OK.

    Args:
        method: "euler" (order 1), "heun2", "heun3" or "rk4" (order 4).
        steps: number of steps; the cost is steps times the number of stages.
        data_scale: scale of the data in model space, to within a factor of three; None (default) measures it with
            three to ten evaluations.

    Raises:
        ValueError: method is unknown, steps < 1, or data_scale is not positive.
    """

    method: str = "rk4"
    steps: Few = 32
    data_scale: float | None = None

    def __post_init__(self):
        if self.method not in TABLEAUX:
            raise ValueError(f"method must be one of {', '.join(TABLEAUX)}; got {self.method!r}")
        check_data_scale(self.data_scale)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")

    def finer(self) -> "RungeKutta":
        """Return this solver with four times the steps."""
        return replace(self, steps=4 * self.steps)

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution:
        """Integrate from start to end; see `scoresde.solvers.solver`."""
        tableau, grid = TABLEAUX[self.method], torch.linspace(start, end, self.steps + 1, dtype=torch.float64)
        status = per_sample(Status.OK, x, torch.int64)
        position, integral, squared = per_sample(start, x, double(x)), torch.zeros(()), torch.zeros(())
        for s, s_next in pairwise(grid):
            h = s_next - s
            slopes: list[Tensor] = []
            reported: list[Tensor] = []
            for c, row in zip(tableau.c, tableau.a, strict=True):
                v, g = field(s + c * h, _advance(x, h, row, slopes), None)
                slopes.append(v)
                reported.append(g)
            proposed, weights = _advance(x, h, tableau.b, slopes), [float(h) * w for w in tableau.b]
            running = status == Status.OK
            good = running & finite(proposed, *reported)
            x = choose(good, proposed, x)
            grown = integral + sum(w * g for w, g in zip(weights, reported, strict=True))
            integral = choose(good, grown, integral)
            grown = squared + sum(w**2 * g for w, g in zip(weights, reported, strict=True))
            squared = choose(good, grown, squared)
            position = torch.where(good, s_next.to(position), position)
            status = torch.where(running & ~good, Status.NONFINITE, status)
        return Solution(x, integral, squared, position, status)


def _advance(x: Tensor, h: Tensor, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """Return x + h sum_i weights_i slopes_i, skipping zero weights."""
    return x + sum(float(h) * w * slope for w, slope in zip(weights, slopes, strict=True) if w)
