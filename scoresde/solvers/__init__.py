"""Solvers of ordinary differential equations for states (B, *), with the interface of `solvers.solver`."""

from scoresde.solvers.adams import Adams, AdaptiveAdams
from scoresde.solvers.learned_adams import AdamsTable, LearnedAdams, StoredAdams
from scoresde.solvers.runge_kutta import RungeKutta
from scoresde.solvers.scipy import SciPy
from scoresde.solvers.solver import Field, Solution, Solver, Status
from scoresde.solvers.torchdiffeq import TorchDiffEq

__all__ = [
    "Adams",
    "AdamsTable",
    "AdaptiveAdams",
    "Field",
    "LearnedAdams",
    "RungeKutta",
    "SciPy",
    "Solution",
    "Solver",
    "Status",
    "StoredAdams",
    "TorchDiffEq",
]
