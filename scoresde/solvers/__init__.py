"""Solvers of ordinary differential equations on any state, behind one interface."""

from scoresde.solvers.base import Solution, Solver, Status
from scoresde.solvers.runge_kutta import RungeKutta
from scoresde.solvers.torchdiffeq import TorchDiffEq

__all__ = ["RungeKutta", "Solution", "Solver", "Status", "TorchDiffEq"]
