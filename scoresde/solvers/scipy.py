"""SciPy's solvers in the convention of score_sde, for comparison with published likelihoods."""

from dataclasses import dataclass, replace

import numpy as np
import scipy  # its subpackages are imported where they are first used
import torch
from torch import Tensor

from scoresde.solvers.solver import Field, Solution, Status, per_sample
from scoresde.tensors import double

METHODS = ("RK45", "RK23", "DOP853", "LSODA", "Radau", "BDF")


@dataclass(frozen=True)
class SciPy:
    """A solver of `scipy.integrate` on the whole batch as one vector, in the time t of the SDE.

    So the published likelihoods of 2011.13456 were computed (section D.2: RK45 at tolerances of 1e-5): one step size
    for the batch, and the divergence inside of the error norm. A result depends on its batch, and a noisy trace costs
    steps; give it `Hutchinson(resample=False)`.

    Args:
        method: "RK45", "RK23", "DOP853", "LSODA", "Radau" or "BDF".
        rtol, atol: relative and absolute tolerance of a step.
        max_evaluations: after which it is stopped.

    Raises:
        ValueError: an unknown method, or a tolerance or budget that is not positive.
    """

    method: str = "RK45"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_evaluations: int = 100_000
    variable = "time"

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method among {', '.join(METHODS)} expected; got {self.method!r}")
        if min(self.rtol, self.atol, self.max_evaluations) <= 0:
            raise ValueError(f"positive tolerances and max_evaluations expected; got {self}")

    def finer(self) -> "SciPy":
        """The method at a tenth of the tolerances."""
        return replace(self, rtol=self.rtol / 10, atol=self.atol / 10)

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution:
        """Integrate from start to end; see `scoresde.solvers.solver`."""
        flat = _Flattened(field, x)
        vector, position, ended = flat.first(start), start, Status.OK
        try:
            method = getattr(scipy.integrate, self.method)
            stepper = method(flat, start, vector, end, rtol=self.rtol, atol=self.atol)
            while stepper.status == "running" and flat.nfe < self.max_evaluations:
                stepper.step()
                vector, position = stepper.y, float(stepper.t)
            ended = {"finished": Status.OK, "failed": Status.FAILED, "running": Status.BUDGET}[stepper.status]
        except _NonFinite:
            ended = Status.NONFINITE
        state, integral = flat.unpack(vector)
        status, nfe = per_sample(ended, x, torch.int64), per_sample(flat.nfe, x, torch.int64)
        return Solution(state, integral, None, per_sample(position, x, double(x)), nfe, status)


class _NonFinite(Exception):
    """The field gave NaN or infinity for some sample: one vector cannot go on without it."""


class _Flattened:
    """A field on the vector of a whole batch and its integrals; counts its evaluations."""

    def __init__(self, field: Field, x: Tensor):
        self.field, self.x, self.nfe, self.columns = field, x, 0, 0

    def first(self, start: float) -> np.ndarray:
        """The vector at the start; asks the field once, for the number of its integrals."""
        _, g = self._ask(start, self.x)
        self.columns = g.shape[1]
        return self._pack(self.x, torch.zeros_like(g))

    def __call__(self, s: float, vector: np.ndarray) -> np.ndarray:
        slope = self._pack(*self._ask(s, self.unpack(vector)[0]))
        if not np.isfinite(slope).all():
            raise _NonFinite
        return slope

    def _ask(self, s: float, x: Tensor) -> tuple[Tensor, Tensor]:
        self.nfe += 1
        return self.field(torch.tensor(s, dtype=torch.float64), x, None)

    @staticmethod
    def _pack(x: Tensor, g: Tensor) -> np.ndarray:
        return torch.cat([x.detach().double().cpu().flatten(), g.detach().double().cpu().flatten()]).numpy()

    def unpack(self, vector: np.ndarray) -> tuple[Tensor, Tensor]:
        """(x, integrals) of a vector."""
        values = torch.from_numpy(np.array(vector)).to(self.x.device, double(self.x))
        x, g = values[: self.x.numel()], values[self.x.numel() :]
        return x.reshape(self.x.shape).to(self.x.dtype), g.reshape(len(self.x), self.columns)
