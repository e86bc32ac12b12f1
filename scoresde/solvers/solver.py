"""One interface for the solvers of ordinary differential equations.

A solver carries a state x (B, *) along dx/ds = v(s, x) from `start` to `end`. On the way it integrates the other values
that the field returns, g(s, x) (B, k): estimates of a divergence, their variances. g takes no part in error control, so
a noisy trace costs no evaluation and changes no step (except in `SciPy`, for which likelihoods keep the probes).

An integral along a computed path is a weighted sum of evaluations, sum_i w_i g_i. A solver that knows its weights also
returns sum_i w_i^2 g_i: if g_i is the variance of an independent error made at evaluation i, this sum is the variance
of the integral.

Every solver reports per sample where and how it ended.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from scoresde.tensors import double

Field = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(s, x, rows) -> (v (n, *), g (n, k)) at s, () or (n,), and x (n, *); rows (n,) of the batch in x, None for all."""


class Status(IntEnum):
    """How the solution of a sample ended."""

    OK = 0
    NONFINITE = 1  # the field gave NaN or infinity; the state is the last finite one
    FAILED = 2  # the steps do not resolve the field (stiff, or far too few steps); the state is the last accepted one
    BUDGET = 3  # evaluations used up before `end`; the state is the last one reached


@dataclass
class Solution:
    """The result of a solver, per sample.

    x: the state (B, *) at `position` (B,), which is `end` on success. integral: of each g along the path, (B, k),
    float64. squared: sum_i w_i^2 g_i, (B, k), float64, or None from a solver that does not know its weights. status: a
    `Status` (B,).
    """

    x: Tensor
    integral: Tensor
    squared: Tensor | None
    position: Tensor
    status: Tensor


class Solver(Protocol):
    """Anything that integrates a field.

    It may have `finer()`, a solver of a fraction of its error, by which that error is measured; a `variable`;
    `controls_integrals`, True if its error control includes the integrals; and `data_scale`, see `data_scale`.
    """

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution: ...


def variable(solver: Solver) -> str:
    """The variable in which a solver integrates the probability flow: its attribute `variable`, by default "ratio"."""
    return getattr(solver, "variable", "ratio")


def data_scale(solver: Solver) -> float | None:
    """The scale of the data for the variable "ratio": the attribute `data_scale`, by default None, measured."""
    return getattr(solver, "data_scale", None)


def controls_integrals(solver: Solver) -> bool:
    """Whether the error control of a solver includes the integrals, so that noise in them costs steps."""
    return getattr(solver, "controls_integrals", False)


def check_data_scale(scale: float | None) -> None:
    """Raise ValueError if the scale of the data is neither None nor positive."""
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"data_scale must be positive, or None to measure it; got {scale}")


def finite(*parts: Tensor) -> Tensor:
    """Which samples are finite in all of the tensors (B, *): (B,)."""
    return torch.stack([torch.isfinite(part).flatten(1).all(dim=1) for part in parts]).all(dim=0)


def per_sample(value: int | float, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The value for every sample of x, (B,)."""
    return torch.full((x.shape[0],), value, dtype=dtype, device=x.device)


def choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The samples of `new` (B, *) where the mask (B,) is True, those of `old` elsewhere."""
    return torch.where(mask.to(new.device).reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def rms(x: Tensor) -> Tensor:
    """Root mean square over each sample, (B, *) -> (B,), as `double`."""
    return x.detach().to(double(x)).square().flatten(1).mean(dim=1).sqrt()
