"""One interface for the solvers of ordinary differential equations.

A solver carries a state x (B, *) along dx/ds = v(s, x) from `start` to `end`. The field returns a second value,
g(s, x) (B, k), such as estimates of a divergence and their variances, which the solver integrates along the path. g
takes no part in error control, so noise in g costs no evaluations and changes no step. `SciPy` is the exception: its
error control includes g, so likelihoods use fixed probes with it.

An integral along a computed path is a weighted sum of evaluations, sum_i w_i g_i. A solver that knows its weights also
returns sum_i w_i^2 g_i: if g_i is the variance of an independent error made at evaluation i, this sum is the variance
of the integral.

Every solver reports for each sample the position at which its integration ended, and a `Status`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from scoresde.tensors import double

Field = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(s, x, rows) -> (v (n, *), g (n, k)) at s, () or (n,), and x (n, *).

rows (n,) holds the indices in the batch of the samples in x; None if x is the whole batch."""


class Status(IntEnum):
    """How the solution of a sample ended.

    OK: it reached the end. NONFINITE: the field gave NaN or infinity; the state is the last finite one. FAILED: the
    steps do not resolve the field (stiff, or far too few steps); the state is the last accepted one. BUDGET: the
    evaluations were used up before the end; the state is the last one reached.
    """

    OK = 0
    NONFINITE = 1
    FAILED = 2
    BUDGET = 3


@dataclass
class Solution:
    """The result of a solver, per sample.

    x: the state (B, *) at `position` (B,), which is `end` on success. integral: the integral of each component of g
    along the path, sum_i w_i g(x_i, s_i) over the evaluations i with the solver's weights w_i, float64 (B, k). squared:
    the same sum with the squared weights w_i^2, or None from a solver that does not know them. status: a `Status` for
    each sample (B,).
    """

    x: Tensor
    integral: Tensor
    squared: Tensor | None
    position: Tensor
    status: Tensor


class Solver(Protocol):
    """A callable that integrates a field from `start` to `end`.

    Optional attributes: `finer()` returns a more accurate solver, to measure the error of this one; `variable`,
    `controls_integrals` and `data_scale` are explained at the functions of these names. A method that integrates no
    field, such as the jumps of a flow map, has `carry(model, x, t_from, t_to, trace, differentiable)`, which
    `probability_flow.integrate` calls instead, and `trace`, which replaces the trace of the caller.
    """

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution: ...


class StepSolver(Solver, Protocol):
    """A solver with a given number of steps, a dataclass."""

    steps: int


def with_steps(solver: Any, steps: int) -> StepSolver:
    """Return a copy of a `StepSolver` with another number of steps."""
    return replace(solver, steps=steps)


def variable(solver: Solver) -> str:
    """Return the name of the flow that a solver integrates, see `probability_flow`: "ratio" (default) or "time"."""
    return getattr(solver, "variable", "ratio")


def data_scale(solver: Solver) -> float | None:
    """Return `solver.data_scale`, the scale S of `probability_flow`; None (default) if S is to be measured."""
    return getattr(solver, "data_scale", None)


def controls_integrals(solver: Solver) -> bool:
    """Return whether the solver's error control includes the integrals, so that noise in them costs steps."""
    return getattr(solver, "controls_integrals", False)


def check_data_scale(scale: float | None) -> None:
    """Raise ValueError unless the scale of the data is None, or positive and finite."""
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"data_scale must be positive and finite, or None to measure it; got {scale}")


def finite(*parts: Tensor) -> Tensor:
    """Return the mask (B,) of the samples that are finite in all of the tensors (B, *)."""
    return torch.stack([torch.isfinite(part).flatten(1).all(dim=1) for part in parts]).all(dim=0)


def per_sample(value: int | float, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor (B,) filled with the value, one entry for each sample of x."""
    return torch.full((x.shape[0],), value, dtype=dtype, device=x.device)


def choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return the samples of `new` (B, *) where the mask (B,) is True, those of `old` elsewhere."""
    return torch.where(mask.to(new.device).reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def rms(x: Tensor) -> Tensor:
    """Return the root mean square over the dimensions of each sample, (B, *) -> (B,), in float64 if possible."""
    return x.detach().to(double(x)).square().flatten(1).mean(dim=1).sqrt()
