"""Jumps of a flow map as a step of a sampler (`Jump`), and as the solver of a likelihood (`Jumps`)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from scoresde.arguments import Few, NonNegative, checked
from scoresde.counting import counting
from scoresde.divergence import Hutchinson, Trace
from scoresde.flowmaps.self_guidance import guided_noise
from scoresde.probability_flow import DEFAULT_SOLVER, Carried
from scoresde.random_stream import RandomStream
from scoresde.samplers.grids import Angle, uniform_angle
from scoresde.samplers.sampler import PlainStep
from scoresde.solvers import Solver, Status
from scoresde.solvers.solver import finite
from scoresde.tensors import broadcast, check_integer, float64


def check_steps(steps: int) -> int:
    """Return the number of jumps; raise TypeError or ValueError unless it is an integer of at least 1."""
    check_integer("steps", steps, 1)
    return steps


def jumping(model: Any) -> Any:
    """Return the model if it is a flow map. A wrapper (guidance, thresholding) is refused: jumps would ignore it.

    Raises:
        TypeError: the model is not a flow map.
    """
    if not callable(getattr(type(model), "jump", None)):
        raise TypeError(
            f"jumps need a flow map; got {type(model).__name__}: distil it into one (`scoresde distill`), or choose "
            "another sampler or solver"
        )
    return model


@checked
class Jump(PlainStep):
    """The step x_s = map(x_t, t, s) of a flow map.

    A map that was trained for s = t_min only (targets="data") jumps there, and returns to s with fresh noise
    (2303.01469, algorithm 1). The default grid of a sampler with this step is `grid_of(model)`; `grid` is that for data
    of scale 1.

    Args:
        guidance: strength w of the self-guidance by likelihood of the states at t_max, see `flowmaps.self_guidance`; it
            costs one evaluation and one backward pass. 0 leaves them unchanged.

    Raises:
        ValueError: guidance is negative; in a call with guidance, the map has no divergence.
    """

    default_steps = 4
    grid = uniform_angle

    def __init__(self, guidance: NonNegative = 0.0):
        self.guidance = guidance

    def grid_of(self, model: Any) -> Angle:
        """Return the grid for a flow map: equal steps of the angle for its `data_scale`, as the objectives train it.

        Raises:
            TypeError: the model is not a flow map.
        """
        return Angle(1.0, scale=jumping(model).data_scale)

    def step(self, model: Any, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream) -> Tensor:
        model, clean = jumping(model), float64(model.sde.t_min)
        if self.guidance and t_from >= model.sde.t_max:
            x = guided_noise(model, x, self.guidance)
        if model.targets != "data":
            return model.map(x, t_from, t_to)
        x = model.map(x, t_from, clean)
        if t_to <= clean:
            return x
        r, v = model.sde.transition(clean, t_to)
        return broadcast(r, x) * x + broadcast(v.sqrt(), x) * stream.normal(x)


class LearnedTrace(Hutchinson):
    """The trace that a flow map has learned. The solver `Jumps.finer()` takes one fixed Hutchinson probe instead."""

    def __init__(self) -> None:
        super().__init__(resample=False)

    def kept(self) -> "LearnedTrace":
        """Return self: the jumps draw no probes, and the probe of other solvers is fixed."""
        return self

    def __str__(self) -> str:
        return "learned with the map: approximate"


@checked
@dataclass(frozen=True)
class Jumps:
    """Jumps of a flow map with equal steps of the angle, in place of a solver: approximate likelihoods and latents.

    `conventions` of a likelihood say that it is approximate. `finer()` is the default solver, for the flow of the map's
    diagonal: `scoresde bpd` reports the difference of the two likelihoods as the discretisation error.

    Args:
        steps: number of jumps, each one evaluation.

    Raises:
        ValueError: steps < 1.
    """

    steps: Few = 4
    trace: ClassVar[Any] = LearnedTrace()

    def finer(self) -> Solver:
        """Return the default solver of the probability flow."""
        return DEFAULT_SOLVER

    def __str__(self) -> str:
        return f"Jumps(steps={self.steps}): approximate, by a learned map"

    def __call__(self, field: Any, x: Tensor, start: float, end: float) -> NoReturn:
        """Raise TypeError: `Jumps` cannot integrate a velocity field; `carry` has the jumps."""
        raise TypeError("Jumps needs a flow map; got a velocity field to integrate: choose another solver")

    def carry(
        self, model: Any, x: Tensor, t_from: float, t_to: float, trace: Trace | None, differentiable: bool = False
    ) -> Carried:
        """Return the states at t_to and, with a trace, the log-determinants; see `probability_flow.integrate`.

        Raises:
            TypeError: the model is not a flow map.
        """
        model, path = jumping(model), model.path
        first, last = path.angle(float64([t_from, t_to]))
        phi = first + torch.linspace(0, 1, self.steps + 1, dtype=torch.float64) * (last - first)
        times = [float64(t_from), *path.time_of_angle(phi[1:-1]).unbind(), float64(t_to)]
        total = torch.zeros(len(x), 0 if trace is None else 1, dtype=torch.float64, device=x.device)
        with counting() as counts, torch.set_grad_enabled(differentiable):
            for t, s in pairwise(times):
                if trace is None:
                    x = model.map(x, t, s)
                else:
                    x, log_det = model.jump(x, t, s)
                    total = total + log_det[:, None]
        status = torch.where(finite(x, total), Status.OK, Status.NONFINITE)
        nfe, backward = (torch.full((len(x),), n, device=x.device) for n in (counts.forward, counts.backward))
        return Carried(x, float64(t_to).expand(len(x)), total, None, nfe, backward, status)
