"""SciPy's solvers, used as score_sde uses them, for comparison with published likelihoods."""

from dataclasses import dataclass, replace

import numpy as np
import scipy  # its subpackages are imported where they are first used
import torch
from torch import Tensor

from scoresde.arguments import checked
from scoresde.solvers.solver import Field, Solution, Status, per_sample
from scoresde.tensors import double

METHODS = ("RK45", "RK23", "DOP853", "LSODA", "Radau", "BDF")


@checked
@dataclass(frozen=True)
class SciPy:
    """A solver of `scipy.integrate` that takes the whole batch as one vector, in the time t of the SDE.

    The published likelihoods of 2011.13456 were computed in this way (section D.2: RK45 at tolerances of 1e-5): one
    step size for the batch, with the divergence in the error norm. A sample therefore depends on the others in its
    batch. New random probes at each evaluation would make the solver shrink its steps without end, so likelihoods use
    fixed probes with this solver (`Hutchinson(resample=False)`).

    Args:
        method: "RK45", "RK23", "DOP853", "LSODA", "Radau" or "BDF".
        rtol, atol: relative and absolute tolerance of a step.
        max_evaluations: number of evaluations of the field after which the solver stops.

    Raises:
        ValueError: method is unknown, or a tolerance or max_evaluations is not positive.
    """

    method: str = "RK45"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_evaluations: int = 100_000
    variable = "time"
    controls_integrals = True

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if min(self.rtol, self.atol, self.max_evaluations) <= 0:
            raise ValueError(f"rtol, atol and max_evaluations must be positive; got {self}")

    def finer(self) -> "SciPy":
        """Return this solver with a tenth of the tolerances."""
        return replace(self, rtol=self.rtol / 10, atol=self.atol / 10)

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution:
        """Integrate from start to end; see `scoresde.solvers.solver`."""
        flat = _Flattened(field, x)
        vector, position, ended = flat.first(start), start, Status.OK
        try:
            method = getattr(scipy.integrate, self.method)
            stepper = method(flat, start, vector, end, rtol=self.rtol, atol=self.atol)
            while stepper.status == "running" and flat.evaluations < self.max_evaluations:
                stepper.step()
                vector, position = stepper.y, float(stepper.t)
            ended = {"finished": Status.OK, "failed": Status.FAILED, "running": Status.BUDGET}[stepper.status]
        except _NonFinite:
            ended = Status.NONFINITE
        state, integral = flat.unpack(vector)
        status = per_sample(ended, x, torch.int64)
        return Solution(state, integral, None, per_sample(position, x, double(x)), status)


class _NonFinite(Exception):
    """The field returned NaN or infinity for a sample, which stops the solver for the whole batch."""


class _Flattened:
    """A field as a function of one vector with the states and integrals of a whole batch; counts evaluations."""

    def __init__(self, field: Field, x: Tensor):
        self.field, self.x, self.evaluations, self.columns = field, x, 0, 0

    def first(self, start: float) -> np.ndarray:
        """Return the vector at `start`, with integrals 0; evaluates the field once, to count the integrals."""
        _, g = self._evaluate(start, self.x)
        self.columns = g.shape[1]
        return self._pack(self.x, torch.zeros_like(g))

    def __call__(self, s: float, vector: np.ndarray) -> np.ndarray:
        slope = self._pack(*self._evaluate(s, self.unpack(vector)[0]))
        if not np.isfinite(slope).all():
            raise _NonFinite
        return slope

    def _evaluate(self, s: float, x: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        return self.field(torch.tensor(s, dtype=torch.float64), x, None)

    @staticmethod
    def _pack(x: Tensor, g: Tensor) -> np.ndarray:
        return torch.cat([part.detach().double().cpu().flatten() for part in (x, g)]).numpy()

    def unpack(self, vector: np.ndarray) -> tuple[Tensor, Tensor]:
        """Split a vector into the states (B, *) and the integrals (B, k)."""
        values = torch.from_numpy(np.array(vector)).to(self.x.device, double(self.x))
        x, g = values[: self.x.numel()], values[self.x.numel() :]
        return x.reshape(self.x.shape).to(self.x.dtype), g.reshape(len(self.x), self.columns)
