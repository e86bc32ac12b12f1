"""The solvers of torchdiffeq, with the interface of `scoresde.solvers.solver`."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde.arguments import checked
from scoresde.solvers.solver import Field, Solution, Status, finite, per_sample
from scoresde.tensors import double

METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


@checked
@dataclass(frozen=True)
class TorchDiffEq:
    """An adaptive solver of torchdiffeq, Dormand-Prince 5(4) by default.

    Error control chooses one step size for the whole batch, from the root mean square error over the batch, so a sample
    depends slightly, within the tolerance, on the others in its batch. Only the state enters that error, not the
    integrals. If torchdiffeq gives up (a step size underflow, NaN in any sample, too many steps), all samples keep the
    state at which the last accepted step began.

    Args:
        method: "dopri5", "dopri8", "bosh3", "fehlberg2" or "adaptive_heun".
        rtol, atol: relative and absolute tolerance of a step.
        max_steps: number of steps after which torchdiffeq gives up.

    Raises:
        ValueError: method is unknown, or a tolerance or max_steps is not positive.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 10_000

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if min(self.rtol, self.atol, self.max_steps) <= 0:
            raise ValueError(f"rtol, atol and max_steps must be positive; got {self}")

    def finer(self) -> "TorchDiffEq":
        """Return this solver with a tenth of the tolerances."""
        return replace(self, rtol=self.rtol / 10, atol=self.atol / 10)

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution:
        """Integrate from start to end; see `scoresde.solvers.solver`."""
        from torchdiffeq import odeint  # here, because it imports SciPy's integrators

        observed = _Observed(field, start)
        interval = torch.tensor([start, end], dtype=double(x), device=x.device)
        # step_t: land on the end; by default torchdiffeq steps past it and interpolates, at a lower order.
        options = {"norm": _state_norm, "max_num_steps": self.max_steps, "step_t": interval[1:]}
        _, g = field(interval[0], x, None)  # to find the number of integrals
        state = (x, torch.zeros_like(g))
        try:
            path = odeint(
                observed, state, interval, rtol=self.rtol, atol=self.atol, method=self.method, options=options
            )
            final, position, ended = tuple(part[-1] for part in path), end, Status.OK
        except AssertionError:  # how torchdiffeq reports underflow in dt and max_num_steps
            final, position, ended = observed.accepted or state, observed.position, Status.FAILED
        status = torch.where(finite(*final), per_sample(ended, x, torch.int64), Status.NONFINITE)
        return Solution(final[0], final[1], None, per_sample(position, x, double(x)), status)


def _state_norm(state: tuple[Tensor, Tensor]) -> Tensor:
    """Return the root mean square of the state without the integrals; 0 for an empty batch."""
    x = state[0]
    return x.square().mean().sqrt() if len(x) else x.new_zeros(())


class _Observed:
    """A field that remembers the last accepted step."""

    def __init__(self, field: Field, start: float):
        self.field, self.position = field, start
        self.accepted: tuple[Tensor, Tensor] | None = None

    def __call__(self, s: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.field(s, state[0], None)

    def callback_accept_step(self, s: Tensor, state: tuple[Tensor, Tensor], step: Tensor) -> None:
        self.accepted, self.position = state, float(s)
