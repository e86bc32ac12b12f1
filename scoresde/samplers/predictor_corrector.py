"""Predictor-corrector sampling (2011.13456, algorithm 1), and sampling by the probability flow.

    for each transition t -> s:    x <- predictor(x, t, s);    x <- corrector(x, s)

Without a corrector the algorithm is a plain SDE solver; without a predictor it is annealed Langevin dynamics, in which
the state passes unchanged from one noise level to the next.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from scoresde.arguments import Few, checked
from scoresde.probability_flow import carry
from scoresde.random_stream import RandomStream
from scoresde.samplers.correctors import Corrector
from scoresde.samplers.grids import (
    FixedTimes,
    Grid,
    Transition,
    bounded_log_snr,
    resolve_grid,
    segments,
    transitions,
    uniform_time,
)
from scoresde.samplers.sampler import PlainStep, Sampler, Step, StepFunction, as_step
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.solvers import Solver

ORDERS = ("predictor_first", "corrector_first")
STEPS = 1000


class Idle(PlainStep):
    """The predictor of annealed Langevin dynamics: the state passes unchanged from one noise level to the next."""

    grid = bounded_log_snr

    def step(self, model: BaseModel, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream) -> Tensor:
        return x


@checked
class PredictorCorrector(Sampler):
    """Sampling with a predictor, a corrector, or both.

    For each transition from t to s of the grid, x <- predictor(x, t, s), then x <- corrector(x, s) (2011.13456,
    algorithm 1). The predictor may also be a multistep or a deterministic method, such as `UniPC` or `DDIM`.

        sampler = ss.samplers.PredictorCorrector(ss.samplers.ReverseDiffusion(), ss.samplers.Langevin(), steps=500)
        result = sampler(model, shape=(16, 1, 8, 8), seeds=range(16))
        result.x, result.nfe

    Args:
        predictor: the step to the next time, or None; it may be a function (model, x, t_from, t_to, stream) -> x.
        corrector: the Markov chain at a fixed time, or None; a function (model, x, t, stream) -> x.
        steps: number of transitions; default 1,000. Leave it out if `grid` gives the times themselves.
        grid: a name of `samplers.grids` ("uniform_time", "uniform_log_snr", "quadratic", "karras", "uniform_angle",
            "angle", "bounded_karras", "bounded_log_snr"), a function (sde, steps) -> (steps + 1,) times from t_max to
            t_min, or the times themselves, which may rise again in between; default: `predictor.grid`, which suits the
            predictor.
        order: "predictor_first", correcting at the end of a transition (2011.13456, algorithm 1), or "corrector_first",
            correcting at its start and before `denoise_final`, as the published code does.
        denoise_final: if True, replace the last state by E[x_0 | x], which costs one more evaluation.

    Raises:
        TypeError: predictor is not a step, or corrector is not a function.
        ValueError: predictor and corrector are both None, steps < 1, or grid or order is unknown; in a call, a time is
            outside of [t_min, t_max], the first time is not the largest, or the last time is not the smallest.
    """

    def __init__(
        self,
        predictor: Step | StepFunction | None = None,
        corrector: Corrector | None = None,
        steps: Few | None = None,
        grid: str | Grid | Tensor | Sequence[float] | None = None,
        order: str = "predictor_first",
        denoise_final: bool = False,
    ):
        super().__init__(denoise_final)
        if predictor is None and corrector is None:
            raise ValueError("give a predictor, a corrector or both; got neither")
        if corrector is not None and (isinstance(corrector, (type, Step)) or not callable(corrector)):
            raise TypeError(f"a corrector must be a function (model, x, t, stream) -> x; got {corrector!r}")
        self.predictor = Idle() if predictor is None else as_step(predictor)
        self._has_grid = grid is not None
        self.grid = getattr(self.predictor, "grid", uniform_time) if grid is None else resolve_grid(grid)
        default = len(self.grid.times) - 1 if isinstance(self.grid, FixedTimes) else STEPS
        self.steps = default if steps is None else steps
        if isinstance(self.grid, FixedTimes) and self.steps != default:
            raise ValueError(f"a grid of {default + 1} times has {default} steps; got steps={steps}: leave steps out")
        if self.steps < min(default, 1):  # a single time has none
            raise ValueError(f"steps must be at least 1; got {self.steps}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
        self.corrector, self.order = corrector, order

    def transitions(self, sde: SDE) -> list[Transition]:
        """Return the consecutive pairs of times of the grid."""
        return transitions(self.grid(sde, self.steps), sde)

    def transitions_of(self, model: BaseModel) -> list[Transition]:
        """Return the transitions for a model; the default grid of a step with `grid_of` is that of the model."""
        grid_of = getattr(self.predictor, "grid_of", None)
        if grid_of is None or self._has_grid:
            return self.transitions(model.sde)
        return transitions(grid_of(model)(model.sde, self.steps), model.sde)

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> Sequence[Any]:
        """Return one entry for each transition: its two times, and its entry in the plan of the predictor."""
        return list(zip(transitions, self.predictor.plan(sde, transitions), strict=True))

    def advance(self, model: BaseModel, x: Tensor, entry: Any, stream: RandomStream, memory: Any) -> tuple[Tensor, Any]:
        """Return the state at t_to, predicted and corrected in the chosen order, and the predictor's memory."""
        (t_from, t_to), prepared = entry
        if self.corrector is not None and self.order == "corrector_first":
            x = self.corrector(model, x, t_from, stream)
        x, memory = self.predictor.advance(model, x, prepared, stream, memory)
        if self.corrector is not None and self.order == "predictor_first":
            x = self.corrector(model, x, t_to, stream)
        return x, memory

    def denoise(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return E[x_0 | x] of the last state, after one more correction if order="corrector_first"."""
        if self.corrector is not None and self.order == "corrector_first":
            x = self.corrector(model, x, t, stream)
        return super().denoise(model, x, t, stream)


@checked
class ProbabilityFlow(Sampler):
    """Samples by the probability-flow ODE from the prior (2011.13456, section 4.3).

    Args:
        solver: an ODE solver; default `probability_flow.DEFAULT_SOLVER`, of fixed cost. `solvers.AdaptiveAdams()` and
            `solvers.TorchDiffEq()` are adaptive.
        segments: number of transitions, uniform in log-SNR, solved one after the other; more than one is useful with a
            trajectory or a callback.
        denoise_final: if True, replace the last state by E[x_0 | x], which costs one more evaluation.

    Raises:
        ValueError: segments < 1.
        RuntimeError: in a call, the solver did not reach the end of a transition.
    """

    def __init__(self, solver: Solver | None = None, segments: int = 1, denoise_final: bool = False):
        super().__init__(denoise_final)
        if segments < 1:
            raise ValueError(f"segments must be at least 1; got {segments}")
        self.solver, self.segments = solver, segments

    def transitions(self, sde: SDE) -> list[Transition]:
        """Return the pairs (t_from, t_to) of the segments."""
        return segments(sde, self.segments)

    def step(self, model: BaseModel, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream) -> Tensor:
        """Return the state at t_to, integrated by the solver; draws nothing from `stream`."""
        return carry(model, x, float(t_from), float(t_to), solver=self.solver)
