r"""Linear steps: the core of every sampler whose new state is a linear combination of states, views and noise.

With V(y, t) one view of the model (E[x_0 | y], E[eps | y] or E[v | y]) and z ~ N(0, I), drawn once a transition, the
state at the end of the transition from t to s is computed in stages, each with one evaluation,

    y_0 = x,        V_k = V(y_k, t_k),        y_(k+1) = a_k x + sum_j b_kj V_j + c_k z,        x(s) = y_K,

where the sum runs over the views of this transition and of earlier ones, the newest first. One stage without earlier
views is DDIM or an ancestral sampler; one stage with earlier views is a linear multistep method; two stages without
earlier views are Heun's method. A method is given by its coefficients a, b and c. They depend only on the times and are
computed in float64 before the loop, which evaluates the network and multiplies by them.

A transition may go up, to more noise (RePaint, 2201.09865). A method that draws noise then draws from the forward
kernel q(x_s | x_t), without an evaluation; a deterministic method follows the flow back. Both keep the marginal.

A method may have a corrector. The first evaluation of a transition takes place where the previous transition ended.
The corrector repeats the previous transition with the view of this evaluation added, without a further evaluation (PEC
mode; "UniC" of 2302.04867). It is skipped if a constraint, or the corrector of `PredictorCorrector`, has changed the
state in between.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.random_stream import RandomStream
from scoresde.samplers.grids import Grid, Transition, angle
from scoresde.samplers.sampler import CallableStep
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.sdes.transitions import Point, points, transition


def check_signal(sde: SDE, here: Point, method: object) -> None:
    """Raise ValueError where alpha = 0: the drift and sigma/alpha are infinite there."""
    if here.alpha == 0:
        raise ValueError(
            f"{type(method).__name__} needs alpha > 0 where it starts, but alpha({float(here.t):g}) = 0 for "
            f"{type(sde).__name__}: lower t_max, or use DDIM, DPMSolverPP, UniPC, AngularAdams or Ancestral"
        )


@dataclass(frozen=True)
class Stage:
    """An evaluation at time t, and the next state a x + sum_j b_j V_j + c z; letters as in the module docstring.

    learned: None, or (log v_0, log v_1) if the network sets the variance of the noise, between v_0 and v_1; the square
    root of this variance then replaces c.
    """

    t: Tensor
    a: float
    b: tuple[float, ...]
    c: float = 0.0
    learned: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """The coefficients of a transition; letters as in the module docstring.

    kick: None, or (p, q) if x is first replaced by p x + q z' with new noise z'. stages: the stages; empty if the
    transition consists of the kick alone. correct: the coefficients b with which the corrector repeats the previous
    transition, starting with the b of the view at the end of that transition; empty for no correction.
    """

    stages: tuple[Stage, ...]
    kick: tuple[float, float] | None = None
    correct: tuple[float, ...] = ()


class Memory(NamedTuple):
    """Values that a transition passes to the next one; letters as in the module docstring.

    predicted: the state at the end of the transition; the corrector acts only if the next transition starts from this
    very tensor. anchor: a x + c z of the last stage of the transition, to which the corrector adds the views. views:
    the last `Linear.past` views, the newest first.
    """

    predicted: Tensor | None = None
    anchor: Tensor | None = None
    views: tuple[Tensor, ...] = ()


def combine(base: Tensor, weights: Sequence[float], views: Sequence[Tensor]) -> Tensor:
    """Return base + sum_j weights_j views_j, over as many views as there are weights."""
    for weight, view in zip(weights, views, strict=False):
        if weight != 0:
            base = torch.add(base, view, alpha=weight)
    return base


class Linear(CallableStep):
    """Base class of methods that combine states, views and noise linearly. A subclass defines `row`.

    With V one view of the model and z ~ N(0, I), drawn once a transition, the transition from t to s has K stages, each
    with one evaluation,

        y_0 = x,        V_k = V(y_k, t_k),        y_(k+1) = a_k x + sum_j b_kj V_j + c_k z,        x(s) = y_K,

    where the sum runs over the views of this transition and of earlier ones, the newest first. `row` returns the
    coefficients a, b, c, which depend only on the times. `DDIM`, `Ancestral`, `Heun`, `DPMSolverPP`, `UniPC`, ... are
    such methods; pass an instance to `PredictorCorrector`, or call it.

    Attributes:
        view: the view V: "denoised", "noise" or "v".
        past: the largest number of views that it combines, the one at the current state included.
        stochastic: True if the method draws noise.
        grid: the default grid of times of `PredictorCorrector` with this method.
        default_steps: number of transitions if the method itself is called.
    """

    default_steps = 50
    grid: Grid = angle
    view = "denoised"
    past = 1
    stochastic = False

    def row(self, sde: SDE, nodes: Sequence[Point], target: Point, left: int) -> Row:
        """Return the coefficients of the transition from nodes[0] to `target`.

        Args:
            sde: the path.
            nodes: the points at which the combined views are evaluated, at most `past`: the point at t_from, then the
                starts of earlier transitions, the newest first.
            target: the point at t_to.
            left: number of transitions left, this one included.
        """
        raise NotImplementedError(f"{type(self).__name__} must define row(sde, nodes, target, left)")

    def correction(self, nodes: Sequence[Point], target: Point, left: int) -> tuple[float, ...]:
        """Return `Row.correct` for repeating the step from nodes[0] to `target`; () without a corrector."""
        return ()

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> list[Row]:
        """Return the coefficients of every transition.

        A transition uses earlier views only if it starts where the previous one ended, and if the previous one went to
        less noise.
        """
        starts, targets = (points(sde, times) for times in zip(*transitions, strict=True))
        rows: list[Row] = []
        nodes: list[Point] = []
        before = math.inf  # the time at which the previous transition ended
        for here, target, left in zip(starts, targets, range(len(starts), 0, -1), strict=True):
            follows = float(here.t) == before and float(nodes[0].t) > before
            correct = self.correction(nodes, here, left + 1) if follows else ()
            nodes = [here, *(node for node in nodes if follows and math.isfinite(node.lam))][: self.past]
            if self.stochastic and target.lam < here.lam:
                rows.append(upward(here, target))
            else:
                row = self.row(sde, nodes, target, left)
                rows.append(Row(row.stages, row.kick, correct))
            before = float(target.t)
        return rows

    def advance(
        self, model: BaseModel, x: Tensor, row: Row, stream: RandomStream, memory: Memory | None
    ) -> tuple[Tensor, Memory]:
        """Return the state at the end of a transition, and the memory for the next one."""
        memory = memory or Memory()
        views, anchor, y = memory.views, x, x
        if row.kick is not None:
            p, q = row.kick
            x = y = torch.add(p * x, stream.normal(x), alpha=q)
        z = stream.normal(x) if any(stage.c or stage.learned for stage in row.stages) else None
        for stage in row.stages:
            predicted = model.predict(y, stage.t)
            views = (getattr(predicted, self.view), *views)
            if row.correct and memory.anchor is not None and memory.predicted is y:
                x = combine(memory.anchor, row.correct, views)
            anchor = stage.a * x
            if z is not None:
                anchor = anchor + spread(stage, predicted.variance if stage.learned else None) * z
            y = combine(anchor, stage.b, views)
        return y, Memory(y, anchor, views[: self.past])


def upward(here: Point, target: Point) -> Row:
    """Return the transition to more noise, a draw from the forward kernel."""
    ratio, variance = transition(here, target)
    return Row((), kick=(ratio, math.sqrt(variance)))


def spread(stage: Stage, fraction: Tensor | None) -> float | Tensor:
    """Return the standard deviation of the noise: c of the stage, or that of the learned variance.

    The learned variance is exp((1 - nu) log v_0 + nu log v_1), with v_0 and v_1 from `Stage.learned`, and with
    nu = `fraction` from the network.
    """
    if stage.learned is None:
        return stage.c
    if fraction is None:
        raise ValueError(
            "variance='learned' needs a model with a learned variance, and this one has none: build it with "
            "ScoreModel(..., learned_variance=True), or choose 'posterior' or 'forward'"
        )
    low, high = stage.learned
    return torch.exp(0.5 * (low + (high - low) * fraction))
