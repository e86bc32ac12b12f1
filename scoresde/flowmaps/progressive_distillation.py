"""Progressive distillation (2202.00512) of a flow map: a jump equals two jumps of half the angle.

The paper trains a new student for every halving of the number of steps. Here one map learns the jumps of all lengths
together, as in 2410.12557: its jumps of one length give the targets of twice that length.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from scoresde.arguments import NonNegative, Range, Share, checked
from scoresde.flowmaps.flow_map_objective import SAME, Flow, FlowMapObjective, Target, composed
from scoresde.losses import Drawn
from scoresde.protocols import Model
from scoresde.solvers.solver import choose

QUARTER = torch.pi / 2


@checked
class ProgressiveDistillation(FlowMapObjective):
    """Train a `FlowMap` by progressive distillation (2202.00512; 2410.12557): a jump equals two of half the angle.

    With u at the middle angle between t and s, the targets are those of the present map, composed,

        F* = (map(map(y_t, t, u), u, s) - cos(d) y_t) / sin(d),        d = phi_s - phi_t,
        D* = D(y_t, t, u) + D(y_u, u, s),        D = h (l_s - l_t), the log-determinant per dimension,

    without gradient. Where a half is at most `finest` of a quarter turn, the two halves are DDIM steps of the teacher
    (2202.00512, appendix D).

    Args:
        teacher: the model whose flow the map learns, with the same SDE; None to train from data, where all halves are
            jumps of the map.
        finest: length of the steps of the teacher, as a fraction of a quarter turn.
        diagonal: probability of s = t, where F learns the velocity of the flow.
        ends: probability that s is t_min or t_max; otherwise s is uniform in the clock l between the ends.
        adaptive: power p of the weight 1 / (|F - F*|^2 / d_x + 1e-3)^p of a pair; 0 for the plain squared error.
        divergence_weight: weight of the squared error of the average divergence h beside that of F.

    Raises:
        TypeError: the teacher is not a model; in a call, the model is not a flow map.
        ValueError: finest is not in (0, 1), diagonal + ends is more than 1, or another argument is out of its range; in
            a call, the teacher has another SDE than the flow map.
    """

    def __init__(
        self,
        teacher: Model | None = None,
        finest: Annotated[float, Range(0, 1, is_open=True)] = 1 / 64,
        diagonal: Share = 0.25,
        ends: Share = 0.25,
        adaptive: NonNegative = 0.0,
        divergence_weight: NonNegative = 1.0,
    ):
        super().__init__(teacher, diagonal, ends, adaptive, divergence_weight)
        self.finest = finest

    @torch.no_grad()
    def target(self, model: Any, drawn: Drawn, x: Tensor, s: Tensor) -> Target:
        path, t = model.path, drawn.t
        first, last = path.angle(t), path.angle(s)
        u = torch.where((last - first).abs() < SAME, t, path.time_of_angle((first + last) / 2))
        is_taught = self.teacher(x, model) is not None
        is_short = ((last - first).abs() / 2 <= self.finest * QUARTER) & is_taught
        flow = self.flow(model, drawn, x, t)
        parts = [self._half(model, x, t, u, flow, is_short)]
        between = model.moved(x, parts[0].F, t, u)
        second = self.flow(model, drawn, between, u) if is_taught else flow  # unused without a teacher
        parts.append(self._half(model, between, u, s, second, is_short))
        return composed(path, x, model.moved(between, parts[1].F, u, s), (t, u, s), parts, flow)

    def _half(self, model: Any, x: Tensor, t: Tensor, s: Tensor, flow: Flow, is_short: Tensor) -> Target:
        """Return F and h of the jump from t to s: those of a DDIM step where `is_short`, else those of the model."""
        F, h = model.average(x, t, s)
        F = choose(is_short, flow.v.to(F), F)
        if h is None or flow.divergence is None:
            return Target(F, h)
        rate = model.path.clock_rate(t).to(flow.divergence)
        return Target(F, choose(is_short, flow.divergence / rate, h.to(flow.divergence)))
