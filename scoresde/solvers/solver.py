"""One interface for the solvers of ordinary differential equations.

A solver carries a state x (B, *) along dx/ds = v(s, x) from `start` to `end`, and integrates along the way whatever
else the field reports, g(s, x) (B, k): estimates of a divergence, their variances. No g ever takes part in error
control: a noisy trace costs no evaluation and moves no step.

An integral along a computed path is a weighted sum of evaluations, sum_i w_i g_i. A solver that knows its weights
returns sum_i w_i^2 g_i as well: where g_i is the variance of an independent error made at evaluation i, that sum is the
variance of the integral.

Every solver says per sample where and how it ended and how many evaluations that took.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from scoresde.tensors import double

Field = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(v (n, *), g (n, k)) at s, () or (n,), and x (n, *); the rows (n,) of the batch that x holds, None for all of it."""


class Status(IntEnum):
    """How the solution of a sample ended."""

    OK = 0
    NONFINITE = 1  # the field gave NaN or infinity; the state is the last finite one
    FAILED = 2  # the steps do not resolve the field: a stiff one, or far too few steps; the state is the last sound one
    BUDGET = 3  # evaluations used up before `end`; the state is the last one reached


@dataclass
class Solution:
    """What a solver returns, per sample.

    x: the state (B, *) at `position` (B,), which is `end` where all went well. integral: of each g along the path,
    (B, k), float64. squared: sum_i w_i^2 g_i, (B, k), float64, or None from a solver that does not know its weights.
    nfe: evaluations (B,). status: a `Status` (B,).
    """

    x: Tensor
    integral: Tensor
    squared: Tensor | None
    position: Tensor
    nfe: Tensor
    status: Tensor


class Solver(Protocol):
    """Anything that integrates a field.

    It may have `finer()`, a solver of a fraction of its error, by which that error is measured; and a `variable`.
    """

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution: ...


def variable(solver: Solver) -> str:
    """The variable in which a solver wants the probability flow, its attribute `variable`: "ratio" unless it says."""
    return getattr(solver, "variable", "ratio")


def finite(*parts: Tensor) -> Tensor:
    """Which samples are finite in every one of the tensors (B, *), (B,)."""
    return torch.stack([torch.isfinite(part).flatten(1).all(dim=1) for part in parts]).all(dim=0)


def per_sample(value: int | float, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The value for every sample of x, (B,)."""
    return torch.full((x.shape[0],), value, dtype=dtype, device=x.device)


def rms(x: Tensor) -> Tensor:
    """Root mean square over each sample, (B, *) -> (B,), as `double`."""
    return x.detach().to(double(x)).square().flatten(1).mean(dim=1).sqrt()
