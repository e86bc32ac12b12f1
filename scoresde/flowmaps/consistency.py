"""Consistency (2303.01469; 2410.11081): the end of a jump does not change as its start moves along the flow.

`Consistency` has the formulas. The error of the discrete target is of the order of the step. In the continuous
objective, F* = v on the diagonal s = t: normalised errors of noisy targets do not have the mean 0 at F = E[v | x_t].
For the same reason the normalisation leaves an error in training from data, which falls with the number of dimensions;
a teacher's v has no noise.

The divergence of the continuous objective is that of `flowmaps.mean_flow`. That of the discrete one is D* =
D(y_t, t, u) + D(y_u, u, s) for D = h (l_s - l_t), where the first term is the divergence at t times the step.
"""

from typing import Any

import torch
from torch import Tensor

from scoresde.arguments import Few, NonNegative, Share, checked
from scoresde.flowmaps.flow_map_objective import SAME, FlowMapObjective, Target, composed
from scoresde.flowmaps.mean_flow import divergence_target, moving
from scoresde.losses import Drawn
from scoresde.protocols import Model
from scoresde.solvers.solver import choose
from scoresde.tensors import broadcast

OFFSET = 0.1  # of the normalisation of the derivative (2410.11081, section 4.1)


@checked
class Consistency(FlowMapObjective):
    """Train a `FlowMap` by consistency: the end X of a jump does not change as its start moves along the flow.

    Discrete, with `steps` equal steps of the angle phi between data and noise: u is the time one step from t towards s.
    The state y_u is that of a DDIM step of the teacher from y_t (consistency distillation, 2303.01469, eq. 7), or has
    the same (x_0, eps) as y_t (consistency training, eq. 9). The target of F is that of the present map from there,

        F* = (map(y_u, u, s) - cos(d) y_t) / sin(d),        loss |X - X*|^2 = sin(d)^2 |F - F*|^2,    d = phi_s - phi_t.

    Continuous (`steps=None`, sCM, 2410.11081): the limit of small steps, with the normalised derivative along the flow,

        F* = F + g / (|g| / d_x^(1/2) + 0.1),        g = dX/dphi_t,    d_x dimensions.

    The papers train for s = t_min only: use a flow map with targets="data". With other targets it is the consistency
    trajectory of 2310.02279, without its adversarial loss.

    Args:
        teacher: the model whose flow the map learns, with the same SDE; None to train from data.
        steps: number of steps of the angle between data and noise; None for the continuous objective.
        diagonal: probability of s = t, where F learns the velocity of the flow.
        ends: probability that s is t_min or t_max; otherwise s is uniform in the clock between the ends.
        adaptive: power p of the weight 1 / (|F - F*|^2 / d_x + 1e-3)^p of a pair; 0 for the plain squared error.
        divergence_weight: weight of the squared error of the average divergence h beside that of F.

    Raises:
        TypeError: the teacher is not a model; in a call, the model is not a flow map.
        ValueError: diagonal + ends is more than 1, or another argument is out of its range; in a call, the teacher has
            another SDE than the flow map.
    """

    def __init__(
        self,
        teacher: Model | None = None,
        steps: Few | None = None,
        diagonal: Share = 0.25,
        ends: Share = 0.25,
        adaptive: NonNegative = 0.0,
        divergence_weight: NonNegative = 1.0,
    ):
        super().__init__(teacher, diagonal, ends, adaptive, divergence_weight)
        self.steps = steps

    def target(self, model: Any, drawn: Drawn, x: Tensor, s: Tensor) -> Target:
        return self._continuous(model, drawn, x, s) if self.steps is None else self._discrete(model, drawn, x, s)

    def _continuous(self, model: Any, drawn: Drawn, x: Tensor, s: Tensor) -> Target:
        flow = self.flow(model, drawn, x, drawn.t)
        jump = moving(model, x, drawn.t, s, flow.v)
        size = jump.X.square().flatten(1).mean(dim=1).sqrt()
        F = jump.F + broadcast(1 / (size + OFFSET), jump.X) * jump.X
        F = choose(jump.d.abs() < SAME, flow.v.to(F), F)
        return Target(F, divergence_target(model.path, jump, flow, drawn.t, s))

    @torch.no_grad()
    def _discrete(self, model: Any, drawn: Drawn, x: Tensor, s: Tensor) -> Target:
        path, t = model.path, drawn.t
        first, last = path.angle(path.ends())
        d, step = path.angle(s) - path.angle(t), (last - first) / self.steps
        u = path.time_of_angle(path.angle(t) + d.clamp(-step, step))
        u = torch.where(d.abs() <= step, s, u)
        flow = self.flow(model, drawn, x, t)
        if self.teacher(x, model) is None:
            between = model.sde.perturb(drawn.x0, u, drawn.noise)
        else:
            between = model.moved(x, flow.v, t, u)
        second = Target(*model.average(between, u, s))
        end = model.moved(between, second.F, u, s)
        rate = path.clock_rate(t)
        near = None if flow.divergence is None else flow.divergence / rate.to(flow.divergence)
        return composed(path, x, end, (t, u, s), (Target(flow.v, near), second), flow)

    def scale(self, model: Any, t: Tensor, s: Tensor) -> Tensor:
        """Return sin(d) for the discrete objective where s is not t, and 1 otherwise."""
        d = model.path.angle(s) - model.path.angle(t)
        return torch.ones_like(d) if self.steps is None else torch.where(d.abs() < SAME, 1.0, d.sin())
