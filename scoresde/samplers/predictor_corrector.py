"""Predictor-corrector sampling (2011.13456, algorithm 1), and sampling by the probability flow.

    for each transition t -> s:    x <- predictor(x, t, s);    x <- corrector(x, s)

Without a corrector it is a plain SDE solver, without a predictor annealed Langevin dynamics: the state is then handed
from one noise level to the next as it is.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from scoresde.flow import carry
from scoresde.random_stream import RandomStream
from scoresde.samplers.correctors import Corrector
from scoresde.samplers.grids import Given, Grid, Transition, resolve_grid, transitions, uniform_log_snr
from scoresde.samplers.sampler import Sampler, Step, StepFunction, as_step
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.solvers import Solver
from scoresde.tensors import float64

ORDERS = ("predictor_first", "corrector_first")
STEPS = 1000


class PredictorCorrector(Sampler):
    """A predictor, a corrector, or both: with a multistep or a deterministic step as predictor, that method.

    Args:
        predictor: the step to the next time, or None; a function (model, x, t_from, t_to, noise) -> x will do.
        corrector: the chain at a time, or None.
        steps: number of transitions, 1,000 unless given; with times as the grid, what they say.
        grid: a name ("uniform_time", "uniform_log_snr", "quadratic", "karras", "uniform_angle", "angle"), a function
            (sde, steps) -> (steps + 1,) times from t_max to t_min, or the times themselves, which may rise again in
            between.
        order: "predictor_first", correcting at the time arrived at (2011.13456, algorithm 1), or "corrector_first",
            correcting at the time left, as the published code does.
        denoise_final: replace the last state by E[x_0 | x], one more evaluation.

    Raises:
        ValueError: neither predictor nor corrector, fewer than one step, an unknown grid or order; in a call, times
            that leave the SDE's range, or whose first is not the largest or last not the smallest.
    """

    def __init__(
        self,
        predictor: Step | StepFunction | None = None,
        corrector: Corrector | None = None,
        steps: int | None = None,
        grid: str | Grid | Tensor | Sequence[float] = "uniform_time",
        order: str = "predictor_first",
        denoise_final: bool = False,
    ):
        super().__init__(denoise_final)
        if predictor is None and corrector is None:
            raise ValueError("a predictor, a corrector or both expected; got neither")
        if corrector is not None and (isinstance(corrector, type) or not callable(corrector)):
            raise TypeError(f"a corrector, or a function (model, x, t, noise) -> x, expected; got {corrector!r}")
        self.grid = resolve_grid(grid)
        given = len(self.grid.times) - 1 if isinstance(self.grid, Given) else None
        if given is not None and steps not in (None, given):
            raise ValueError(f"steps={given}, or none, expected with {given + 1} times as the grid; got steps={steps}")
        self.steps = steps if steps is not None else given if given is not None else STEPS
        if self.steps < 1:
            raise ValueError(f"one step or more expected; got steps={self.steps}")
        if order not in ORDERS:
            raise ValueError(f"order among {', '.join(ORDERS)} expected; got {order!r}")
        self.predictor = None if predictor is None else as_step(predictor)
        self.corrector, self.order = corrector, order

    def transitions(self, sde: SDE) -> list[Transition]:
        """The consecutive pairs of the grid."""
        return transitions(self.grid(sde, self.steps), sde)

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> Sequence[Any]:
        """Of each transition its times, and what the predictor prepared for it."""
        if self.predictor is None:
            return [(pair, None) for pair in transitions]
        return list(zip(transitions, self.predictor.plan(sde, transitions), strict=True))

    def advance(self, model: BaseModel, x: Tensor, entry: Any, stream: RandomStream, memory: Any) -> tuple[Tensor, Any]:
        """The state at t_to, predicted and corrected in the chosen order."""
        (t_from, t_to), prepared = entry
        if self.corrector is not None and self.order == "corrector_first":
            x = self.corrector(model, x, t_from, stream)
        if self.predictor is not None:
            x, memory = self.predictor.advance(model, x, prepared, stream, memory)
        if self.corrector is not None and self.order == "predictor_first":
            x = self.corrector(model, x, t_to, stream)
        return x, memory


class ProbabilityFlow(Sampler):
    """Samples by the probability-flow ODE from the prior (2011.13456, section 4.3).

    Args:
        solver: an ODE solver; `flow.DEFAULT_SOLVER` if not given, of fixed cost; `solvers.AdaptiveAdams()` or
            `solvers.TorchDiffEq()` are adaptive.
        segments: number of transitions, uniform in log-SNR, that the solver goes through one after the other; more
            than one makes sense with a trajectory or a callback.
        denoise_final: replace the last state by E[x_0 | x], one more evaluation.

    Raises:
        ValueError: fewer than one segment.
        RuntimeError: in a call, a solve that did not reach the end of its transition.
    """

    def __init__(self, solver: Solver | None = None, segments: int = 1, denoise_final: bool = False):
        super().__init__(denoise_final)
        if segments < 1:
            raise ValueError(f"one segment or more expected; got segments={segments}")
        self.solver, self.segments = solver, segments

    def transitions(self, sde: SDE) -> list[Transition]:
        """The consecutive pairs of the segments."""
        if self.segments > 1:
            return transitions(uniform_log_snr(sde, self.segments), sde)
        return transitions(float64([sde.t_max, sde.t_min]), sde)

    def step(self, model: BaseModel, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream) -> Tensor:
        """The state at t_to, carried there by the solver; draws nothing from `noise`."""
        return carry(model, x, float(t_from), float(t_to), solver=self.solver)
