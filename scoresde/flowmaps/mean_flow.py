"""MeanFlow (2505.13447) in the angle of `flowmaps.angle`: the map does not change along the flow.

The end of the jump, X(t) = cos(d) y_t + sin(d) F(y_t, t, s), is constant as the start moves along the flow. With the
total derivative d/dphi_t = v d/dy + d/dphi (one forward-mode product),

    dX/dphi_t = cos(d) (v - F) + sin(d) (y_t + dF/dphi_t) = 0.

MeanFlow regresses the average velocity u = (X - y_t)/d on u* = v + d du/dphi_t, which in terms of F is the F* of the
class. In the same way, the log-determinant d_x h (l_s - l_t) decreases along the flow by the divergence of v, which
gives h*.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.flowmaps.angle import AnglePath
from scoresde.flowmaps.flow_map_objective import Flow, FlowMapObjective, Target
from scoresde.losses import Drawn
from scoresde.tensors import broadcast


class Moving(NamedTuple):
    """A jump and its derivatives with respect to phi_t along the flow.

    F: (B, *). X: dX/dphi_t (B, *). h, h_dot: h and dh/dphi_t, (B,) each; 0 without a divergence. d: phi_s - phi_t (B,).
    """

    F: Tensor
    X: Tensor
    h: Tensor
    h_dot: Tensor
    d: Tensor


@torch.no_grad()
def moving(model: Any, x: Tensor, t: Tensor, s: Tensor, v: Tensor) -> Moving:
    """Return the jump from x (B, *) at t (B,) to s (B,) and its derivatives along the flow with velocity v (B, *)."""
    path: AnglePath = model.path
    y, d = x / broadcast(path.size(t), x), path.angle(s) - path.angle(t)

    def average(y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        F, h = model.average(path.to_state(y, t), t, s)
        return F, F.new_zeros(len(F)) if h is None else h

    derivative: Any = torch.func.jvp(average, (y, t), (v.to(y), 1 / path.rate(t)))
    (F, h), (F_dot, h_dot) = derivative
    X = broadcast(d.cos(), F) * (v - F) + broadcast(d.sin(), F) * (y + F_dot)
    return Moving(F, X, h, h_dot, d)


def divergence_target(path: AnglePath, jump: Moving, flow: Flow, t: Tensor, s: Tensor) -> Tensor | None:
    """Return h* of the module docstring, (B,); None without a divergence."""
    if flow.divergence is None:
        return None
    rate, left = (values.to(jump.h) for values in (path.clock_rate(t), path.clock(s) - path.clock(t)))
    return (flow.divergence + left * jump.h_dot) / rate


class MeanFlow(FlowMapObjective):
    """Train a `FlowMap` by MeanFlow (2505.13447, eq. 6), in the angle phi: from a teacher or from data.

    A jump ends at X = cos(d) y_t + sin(d) F(y_t, t, s), d = phi_s - phi_t, wherever it starts on a trajectory of the
    flow. With total derivatives along the flow, v its velocity and v' the divergence of v per dimension, the targets
    are

        F* = F + (d / sin d) dX/dphi_t,        h* = h + [v' + (l_s - l_t) dh/dphi_t - l' h] / l',    l' = dl/dphi_t,

    without gradient; at s = t, F* = v. The loss of a pair (t, s) is |F - F*|^2 / d_x + divergence_weight (h - h*)^2. A
    pair costs one evaluation with its forward derivative.

        loss = ss.flowmaps.MeanFlow(teacher)  # or MeanFlow(), from data
        run = ss.fit(flow_map, data, loss=loss)

    Args:
        teacher: the model whose flow the map learns, with the same SDE; None to train from data.
        diagonal: probability of s = t, where F learns the velocity of the flow.
        ends: probability that s is t_min or t_max; otherwise s is uniform in the clock l between the ends.
        adaptive: power p of the weight 1 / (|F - F*|^2 / d_x + 1e-3)^p of a pair; 0 for the plain squared error.
        divergence_weight: weight of the squared error of the average divergence h.
        times: density of t; default: `UniformClock()`.
        stratified: draw the times of a batch as a lattice with a random offset, for less variance.

    Raises:
        TypeError: the teacher is not a model; in a call, the model is not a flow map.
        ValueError: diagonal + ends is more than 1, or another argument is out of its range; in a call, the teacher has
            another SDE than the flow map.
    """

    def target(self, model: Any, drawn: Drawn, x: Tensor, s: Tensor) -> Target:
        flow = self.flow(model, drawn, x, drawn.t)
        jump = moving(model, x, drawn.t, s, flow.v)
        gain = 1 / torch.sinc(jump.d / torch.pi)
        F = jump.F + broadcast(gain, jump.F) * jump.X
        return Target(F, divergence_target(model.path, jump, flow, drawn.t, s))
