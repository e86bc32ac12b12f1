"""Predictor-corrector sampling (2011.13456, algorithm 1), and sampling by the probability flow.

    for each transition t -> s:    x <- predictor(x, t, s);    x <- corrector(x, s)

Without a corrector it is a plain SDE solver, without a predictor annealed Langevin dynamics: the state is then handed
from one noise level to the next as it is.
"""

from torch import Tensor

from scoresde.flow import carry
from scoresde.protocols import Condition, ScoreModel
from scoresde.samplers.base import Grid, Sampler, Step, Transition, resolve_grid, transitions, uniform_log_snr
from scoresde.samplers.correctors import Corrector
from scoresde.sdes import SDE
from scoresde.solvers import Solver
from scoresde.tensors import Noise

ORDERS = ("predictor_first", "corrector_first")


class PredictorCorrector(Sampler):
    """A predictor, a corrector, or both.

    Args:
        predictor: the step to the next time, or None.
        corrector: the chain at a time, or None.
        steps: number of transitions.
        grid: "uniform_time", "uniform_log_snr", or a function (sde, steps) -> (steps + 1,) times from t_max to t_min.
        order: "predictor_first", correcting at the time arrived at (2011.13456, algorithm 1), or "corrector_first",
            correcting at the time left, as the published code does.
        denoise_final: replace the last state by E[x_0 | x], one more evaluation.

    Raises:
        ValueError: neither predictor nor corrector, fewer than one step, an unknown grid or order.
    """

    def __init__(
        self,
        predictor: Step | None = None,
        corrector: Corrector | None = None,
        steps: int = 1000,
        grid: str | Grid = "uniform_time",
        order: str = "predictor_first",
        denoise_final: bool = False,
    ):
        super().__init__(denoise_final)
        if predictor is None and corrector is None:
            raise ValueError("a predictor, a corrector or both expected; got neither")
        if steps < 1:
            raise ValueError(f"one step or more expected; got steps={steps}")
        if order not in ORDERS:
            raise ValueError(f"order among {', '.join(ORDERS)} expected; got {order!r}")
        self.predictor, self.corrector, self.steps, self.order = predictor, corrector, steps, order
        self.grid = resolve_grid(grid)

    def transitions(self, sde: SDE) -> list[Transition]:
        """The consecutive pairs of the grid."""
        return transitions(self.grid(sde, self.steps))

    def step(
        self, model: ScoreModel, x: Tensor, t_from: Tensor, t_to: Tensor, noise: Noise, cond: Condition = None
    ) -> Tensor:
        """The state at t_to, predicted and corrected in the chosen order."""
        if self.corrector is not None and self.order == "corrector_first":
            x = self.corrector(model, x, t_from, noise, cond)
        if self.predictor is not None:
            x = self.predictor(model, x, t_from, t_to, noise, cond)
        if self.corrector is not None and self.order == "predictor_first":
            x = self.corrector(model, x, t_to, noise, cond)
        return x


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
        return transitions(uniform_log_snr(sde, self.segments))

    def step(
        self, model: ScoreModel, x: Tensor, t_from: Tensor, t_to: Tensor, noise: Noise, cond: Condition = None
    ) -> Tensor:
        """The state at t_to, carried there by the solver; draws nothing from `noise`."""
        return carry(model, x, float(t_from), float(t_to), cond, self.solver)
