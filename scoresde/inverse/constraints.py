r"""Replacement: the part of the state that the measurement fixes is overwritten during sampling.

For a linear operator A with pseudo-inverse A^+, P = A^+ A projects a state on the part that is measured, and A^+ y is
this part of x_0. After each transition it is replaced by a fresh perturbation of the known data (2011.13456, appendix
I.2),

    x <- x + P (q - x),        q = alpha A^+ y + sigma z,        z ~ N(0, I).

For `Inpainting` these are the known pixels, for `Grey` the first channel of an orthogonal colour space. y is taken as
exact: the samples satisfy A x = y, noise of the measurement included.

Replacement draws the known part without regard to the rest of the state, so that the two do not fit, and the samples do
not follow p(x_0 | y). RePaint (2201.09865, algorithm 1) therefore goes back to more noise with the forward kernel, and
down again, several times at each noise level: with many repetitions the two parts come into equilibrium. `Resampled`
makes any grid do so, and `RePaint` is the sampler of the paper.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.arguments import Few, checked
from scoresde.configured import Configured
from scoresde.inverse.operators import as_operator, check_linear
from scoresde.inverse.twists import measured
from scoresde.random_stream import RandomStream
from scoresde.samplers.correctors import Corrector
from scoresde.samplers.grids import Grid, resolve_grid, uniform_time
from scoresde.samplers.predictor_corrector import PredictorCorrector
from scoresde.samplers.predictors import Ancestral
from scoresde.samplers.sampler import StateConstraint, Step, StepFunction
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.tensors import broadcast, check_real, float64


class Replacement(StateConstraint):
    """Replacement of the measured part of the state after each transition to less noise (2011.13456, appendix I.2).

        x <- x + A^+ A (q - x),        q = alpha A^+ y + sigma z,        z ~ N(0, I)

    The samples satisfy A x = y to rounding. To replace after each corrector as well, use `corrected`.

    Args:
        operator: a linear `Operator` with a pseudo-inverse, or a linear physics object of `deepinv`.
        y: one measurement (*m), used for all samples, or one for each (B, *m).
        published: if True, follow the code of 2011.13456 (controllable_generation.py of score_sde): the first state has
            the known data without noise, a perturbation is at the noise level of the *start* of its transition, and the
            known part of the result is alpha y at the last time. The published sampler is then
            `PredictorCorrector(predictor, corrected(corrector, constraint), order="corrector_first",
            denoise_final=True)`, except that its result keeps the noise of the last step in the unknown part.

    Raises:
        TypeError: the operator is not linear; in a call, its pseudo-inverse is not known.
        ValueError: in a call, y does not fit.
    """

    def __init__(self, operator: Any, y: Tensor, published: bool = False):
        check_real("y", y)
        self.operator, self.y, self.published = as_operator(operator), y, published
        check_linear(self.operator, "Replacement")

    def __call__(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return x + P (q - x) with a perturbation q at t."""
        return self._replaced(x, model.sde.perturb(self._known(x), t, stream.normal(x)))

    def start(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return the first state, pure noise x except in its measured part."""
        return self._replaced(x, self._known(x)) if self.published else self(model, x, t, stream)

    def time(self, t_from: Tensor, t_to: Tensor) -> Tensor | None:
        """Return t_to, or t_from if `published`; None after a transition to more noise, as in RePaint's algorithm 1."""
        if t_to > t_from:
            return None
        return t_from if self.published else t_to

    def finish(self, model: BaseModel, x: Tensor, t: Tensor) -> Tensor:
        """Return the sample with its measured part equal to the known data."""
        known = self._known(x)
        return self._replaced(x, broadcast(model.sde.alpha(t), x) * known if self.published else known)

    def _known(self, x: Tensor) -> Tensor:
        """Return A^+ y for each of the states x (B, *)."""
        return self.operator.pseudo_inverse(measured(self.operator, self.y, x))

    def _replaced(self, x: Tensor, other: Tensor) -> Tensor:
        """Return x with its measured part replaced by that of `other`."""
        return x + self.operator.pseudo_inverse(self.operator(other - x))


def corrected(corrector: Corrector, constraint: StateConstraint) -> Corrector:
    """Return the corrector followed by the constraint at the same time, as in the code of 2011.13456.

    Args:
        corrector: a corrector of `PredictorCorrector`, (model, x, t, stream) -> x.
        constraint: such as `Replacement(operator, y)`.
    """

    def constrained(model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        return constraint(model, corrector(model, x, t, stream), t, stream)

    return constrained


@checked
class Resampled(Configured):
    """A grid that goes over each part of another grid several times (2201.09865, section 4.2 and appendix B).

    The nodes are numbered from 0 at t_min. After reaching each of the nodes 1, 1 + jump, 1 + 2 jump, ... up to
    steps - jump, the grid goes up by `jump` nodes in one transition and down again, repeats - 1 times. The paper goes
    up one node at a time, which has the same law, as forward kernels compose.

    Args:
        jump: number of nodes of a jump; 10 in the paper.
        repeats: number of times that each part is passed ("resampling steps"); 10 in the paper, 1 for the inner grid.
        grid: the inner grid, see `PredictorCorrector`; default: uniform in t.

    Raises:
        ValueError: jump or repeats is less than 1, or grid is unknown.
    """

    def __init__(self, jump: Few = 10, repeats: Few = 10, grid: str | Grid | Tensor | Sequence[float] = uniform_time):
        self.jump, self.repeats, self.grid = jump, repeats, resolve_grid(grid)

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        """Return the times, with those that rise again."""
        times = float64(self.grid(sde, steps)).flip(0)
        last = len(times) - 1
        left = dict.fromkeys(range(1, last - self.jump + 1, self.jump), self.repeats - 1)
        nodes = [last]
        while nodes[-1]:
            nodes.append(nodes[-1] - 1)
            if left.get(nodes[-1]):
                left[nodes[-1]] -= 1
                nodes.append(nodes[-1] + self.jump)
        return times[torch.tensor(nodes)]


@checked
class RePaint(PredictorCorrector):
    """The sampler of RePaint (2201.09865), for use with the constraint `Replacement`.

        RePaint(steps=250)(model, shape=(n, 3, 64, 64), constraint=Replacement(Inpainting(mask), y))

    It costs about `repeats` times as many evaluations as `steps`: 2,410 with the settings of the paper.

    Args:
        steps: number of steps of the inner grid.
        jump: number of nodes of the inner grid by which a resampling goes up.
        repeats: number of times that each part is passed; 1 for the inner grid.
        predictor: the step, default `Ancestral()`; transitions to more noise must be draws from the forward kernel, as
            they are for every linear method that draws noise.
        corrector: the Markov chain at a fixed time, a function (model, x, t, stream) -> x; None for none.
        order: "predictor_first" or "corrector_first".
        denoise_final: if True, replace the last state by E[x_0 | x], which costs one more evaluation.
        grid: the inner grid; default: uniform in t.

    Raises:
        ValueError: see `Resampled` and `PredictorCorrector`.
    """

    def __init__(
        self,
        steps: Few = 250,
        jump: Few = 10,
        repeats: Few = 10,
        predictor: Step | StepFunction | None = None,
        corrector: Corrector | None = None,
        grid: str | Grid | Tensor | Sequence[float] = uniform_time,
        order: str = "predictor_first",
        denoise_final: bool = False,
    ):
        predictor = Ancestral() if predictor is None else predictor
        super().__init__(predictor, corrector, steps, Resampled(jump, repeats, grid), order, denoise_final)
