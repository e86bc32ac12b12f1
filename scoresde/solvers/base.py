"""One interface for the solvers of ordinary differential equations.

A solver carries a state, a tuple of tensors with leading batch dimension B, along du/ds = field(s, u) from `start` to
`end`. The first tensor is the state proper; the others (a running integral of the divergence) are linear in it and
take no part in error control. Every solver says per sample how it ended, and how many evaluations it took.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Field = Callable[[Tensor, State], State]


class Status(IntEnum):
    """How the solution of a sample ended."""

    OK = 0
    NONFINITE = 1  # a NaN or an infinity appeared; the state is the last finite one
    FAILED = 2  # the solver gave up before `end`; the state is the last one it reached


@dataclass
class Solution:
    """The state at `position` (B,), evaluations `nfe` (B,) and `status` (B,) of each sample."""

    state: State
    position: Tensor
    nfe: Tensor
    status: Tensor


class Solver(Protocol):
    """Anything that integrates a field."""

    def __call__(self, field: Field, state: State, start: float, end: float) -> Solution: ...


def finite(state: State) -> Tensor:
    """Which samples are finite in every part of the state, (B,)."""
    return torch.stack([torch.isfinite(part).flatten(1).all(dim=1) for part in state]).all(dim=0)


def per_sample(value: int | float, state: State, dtype: torch.dtype) -> Tensor:
    """The value for every sample of the state, (B,)."""
    return torch.full((state[0].shape[0],), value, dtype=dtype, device=state[0].device)
