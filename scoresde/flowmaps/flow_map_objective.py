r"""The base class of the objectives of flow maps: pairs of times, the velocity of the flow, and the squared errors.

For a state x_t = alpha x_0 + sigma eps and a pair of times (t, s), an objective gives a target F* of F(x_t, t, s), and
h* of the average divergence, both without gradient. The loss of the pair is

    w |F - F*|^2 / d_x  +  lambda (h - h*)^2,        w = 1 / (|F - F*|^2 / d_x + 1e-3)^p  without gradient

(p: the adaptive weight of 2505.13447, section 4.3). In distillation, v is the velocity of a teacher, any model with the
same SDE. Where v multiplies errors of the predicted noise or data by g > 10, at one end of the path, v and its
divergence are mostly error, and the loss of the pair has the weight (10/g)^2 (`FlowMap.trust`; `TrajectoryDistillation`
has none, as its targets average v over a jump). In training from data, v is the velocity of the pair (x_0, eps), whose
mean given x_t is that of the flow. On the diagonal s = t, F* = v in every objective, so that F(x, t, t) learns the flow
from data too.

| class                     | F* from                                              | source                      |
| ------------------------- | ---------------------------------------------------- | --------------------------- |
| `MeanFlow`                | the derivative of the map along the flow             | 2505.13447                  |
| `Consistency`             | the map from a neighbouring time, or the derivative  | 2303.01469; sCM, 2410.11081 |
| `ProgressiveDistillation` | two maps of half the length                          | 2202.00512; 2410.12557      |
| `TrajectoryDistillation`  | accurate solutions of the teacher's flow             | 2101.02388; 2512.02636      |
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.arguments import NonNegative, Share, checked
from scoresde.divergence import quadratic_forms
from scoresde.flowmaps.angle import AnglePath, UniformClock
from scoresde.flowmaps.jumps import jumping
from scoresde.guidance.blends import check_same_path
from scoresde.losses import Drawn, LossTerms, Objective, TimeDensity
from scoresde.probability_flow import frozen
from scoresde.protocols import Model
from scoresde.score import BaseModel
from scoresde.solvers.solver import choose
from scoresde.tensors import broadcast, check_instance, dimensions, double
from scoresde.views import Pair
from scoresde.wrappers import for_inference

SAME = 1e-6  # angle below which two times count as one
FLOOR = 1e-3  # of the squared error in the adaptive weight


def check_shares(**shares: float) -> None:
    """Raise ValueError if the sum of these probabilities is more than 1."""
    if (total := sum(shares.values())) > 1 + 1e-9:
        raise ValueError(f"{' + '.join(shares)} must be at most 1; got {total:g}: lower one of them")


class Target(NamedTuple):
    """The targets of one jump: F (B, *), and h (B,) or None, as `FlowMap.average` returns them; without gradient."""

    F: Tensor
    h: Tensor | None


class Flow(NamedTuple):
    """The flow at states: v (B, *), and an unbiased estimate of its divergence per dimension (B,) or None."""

    v: Tensor
    divergence: Tensor | None


def composed(
    path: AnglePath, x: Tensor, end: Tensor, times: Sequence[Tensor], parts: Sequence[Target], at: Flow
) -> Target:
    """Return the target of a jump that is made of two, from t to u and from u to s.

    Args:
        path: the angle along the path.
        x, end: the states at t and at s, (B, *).
        times: t, u and s, float64 (B,) each; where s = t, the target is the flow `at` t.
        parts: F and h of the two jumps.
        at: v (B, *) and the divergence (B,) of the flow at x and t.
    """
    t, u, s = times
    same = (path.angle(s) - path.angle(t)).abs() < SAME
    a, b = path.rotation(t, s)
    F = (end - broadcast(a, x) * x) / broadcast(torch.where(same, 1.0, b), x)
    F = choose(same, at.v.to(F), F)
    if at.divergence is None or parts[0].h is None or parts[1].h is None:
        return Target(F, None)
    near = at.divergence / path.clock_rate(t).to(at.divergence)
    clock = path.clock(torch.stack([t, u, s])).to(near)
    whole = parts[0].h * (clock[1] - clock[0]) + parts[1].h * (clock[2] - clock[1])
    return Target(F, choose(same, near, whole.to(near) / choose(same, torch.ones_like(near), clock[2] - clock[0])))


@checked
class FlowMapObjective(Objective):
    """Base class of the objectives of a `FlowMap`: regression of F and h on targets. A subclass defines `target`.

    For a state x_t = alpha x_0 + sigma eps and a pair of times (t, s), the loss is

        w |F - F*|^2 / d_x  +  lambda (h - h*)^2,        w = 1 / (|F - F*|^2 / d_x + 1e-3)^p without gradient,

    with targets F* and h* without gradient and d_x dimensions (p: the adaptive weight of 2505.13447, section 4.3). On
    the diagonal s = t, F* is the velocity v of the flow: that of the teacher, or of the pair (x_0, eps) in training
    from data.

    Args:
        teacher: the model whose flow the map learns, with the same SDE; None to train from data.
        diagonal: probability of s = t.
        ends: probability that s is t_min or t_max, where the map may go there; otherwise s is uniform in the clock of
            `flowmaps.angle` between the ends.
        adaptive: p; 0 for the plain squared error.
        divergence_weight: lambda.
        times: density of t; default: `UniformClock()`, uniform in the clock for data of scale 1.
        stratified: draw the times of a batch as a lattice with a random offset, for less variance.

    Raises:
        TypeError: the teacher is not a model; in a call, the model is not a flow map.
        ValueError: diagonal + ends is more than 1, or another argument is out of its range; in a call, the teacher has
            another SDE than the flow map.
    """

    def __init__(
        self,
        teacher: Model | None = None,
        diagonal: Share = 0.25,
        ends: Share = 0.25,
        adaptive: NonNegative = 0.0,
        divergence_weight: NonNegative = 1.0,
        times: TimeDensity | None = None,
        stratified: bool = True,
    ):
        super().__init__("variance", times or UniformClock(), stratified)
        if teacher is not None:
            check_instance("teacher", teacher, "predict")
        check_shares(diagonal=diagonal, ends=ends)
        self._teacher = (teacher,)  # in a tuple: its parameters are not those of the loss
        self.diagonal, self.ends, self.adaptive, self.divergence_weight = diagonal, ends, adaptive, divergence_weight

    def bind(self, model: Any, cond: Any) -> Any:
        """Return the flow map to train, with the condition of the batch."""
        model, (teacher,) = jumping(model), self._teacher
        if teacher is not None:
            check_same_path(teacher, model)
        return model.given(cond)

    def teacher(self, like: Tensor, model: BaseModel) -> BaseModel | None:
        """Return the teacher on the device of `like`, with the condition of the flow map that is trained."""
        (teacher,) = self._teacher
        return None if teacher is None else for_inference(teacher, getattr(model, "cond", None)).to(like.device)

    def terms(self, model: Any, drawn: Drawn) -> LossTerms:
        one = torch.ones_like(drawn.t)
        return LossTerms(self.value(model, drawn, one), drawn.t, one)

    def clean(self, model: Any, drawn: Drawn) -> Drawn:
        """Return the draws with clean states as x0, for objectives whose batches are not clean states."""
        return drawn

    def value(self, model: Any, drawn: Drawn, weight: Tensor) -> Tensor:
        s = self.draw_targets(model, drawn)
        x = drawn.perturbed(model.sde)
        target = self.target(model, drawn, x, s)
        errors = self.errors(model.average(x, drawn.t, s), target, self.scale(model, drawn.t, s))
        return errors if self.teacher(x, model) is None else model.trust(drawn.t) * errors

    def scale(self, model: Any, t: Tensor, s: Tensor) -> Tensor:
        """Return the factor of F - F* in the loss, float64 (B,)."""
        return torch.ones_like(t)

    def target(self, model: Any, drawn: Drawn, x: Tensor, s: Tensor) -> Target:
        """Return the targets of the jumps from x (B, *) at drawn.t to s (B,)."""
        raise NotImplementedError(f"{type(self).__name__} must define target(model, drawn, x, s)")

    def errors(self, output: tuple[Tensor, Tensor | None], target: Target, scale: Tensor) -> Tensor:
        """Return the loss (B,) of the outputs (F, h) of `FlowMap.average`, with F - F* multiplied by `scale` (B,)."""
        F, h = output
        error = (broadcast(scale, F) * (F - target.F)).square().flatten(1).mean(dim=1)
        loss = error / (error.detach() + FLOOR) ** self.adaptive
        if h is None or target.h is None:
            return loss
        return loss + self.divergence_weight * (h - target.h).square()

    def draw_targets(self, model: Any, drawn: Drawn) -> Tensor:
        """Draw the target time s of each state, float64 (B,); see `diagonal` and `ends`."""
        path, t = model.path, drawn.t
        kind, where = drawn.stream.uniform(torch.empty(len(t), 2, dtype=torch.float64)).unbind(dim=1)
        low, high = (end.expand(len(t)) for end in path.ends())
        end = torch.where(where < 0.5, low, high) if model.targets == "all" else low
        s = low if model.targets == "data" else path.between(where, low, high if model.targets == "all" else t)
        s = torch.where(kind < self.diagonal + self.ends, end, s)
        return torch.where(kind < self.diagonal, t, s)

    @torch.no_grad()
    def flow(self, model: Any, drawn: Drawn, x: Tensor, t: Tensor) -> Flow:
        """Return the velocity of the flow at x (B, *) and t, and its divergence if the model learns that.

        From data, the velocity is that of the pair (x_0, eps), and the divergence that of the model's diagonal.
        """
        path, teacher = model.path, self.teacher(x, model)
        source = model if teacher is None else teacher
        known = None if teacher is not None else path.velocity(Pair(model.sde, t, drawn.x0, drawn.noise))
        if not model.divergence:
            return Flow(path.velocity(source.predict(x, t)) if known is None else known, None)
        y = x / broadcast(path.size(t), x)

        def field(y: Tensor) -> Tensor:
            return path.velocity(source.predict(path.to_state(y, t), t))

        with torch.enable_grad(), frozen(source):
            v, forms, _ = quadratic_forms(field, y, [drawn.stream.rademacher(y)])
        return Flow(v if known is None else known, (forms[:, 0] / dimensions(x)).to(double(x)))
