r"""MeanFlow (2505.13447) in the angle of `flowmaps.angle`: the map does not change along the flow.

The end of the jump, X(t) = cos(d) y_t + sin(d) F(y_t, t, s), is constant as the start moves along the flow. With the
total derivative d/dphi_t = v d/dy + d/dphi (one forward-mode product),

    dX/dphi_t = cos(d) (v - F) + sin(d) (y_t + dF/dphi_t) = 0.

MeanFlow regresses the average velocity u = (X - y_t)/d on u* = v + d du/dphi_t, which in terms of F is

    F* = F + (d / sin d) dX/dphi_t.

At s = t it is F* = v. In the same way, the log-determinant d_x h (l_s - l_t) decreases along the flow by the divergence
of v, so that, with v' the divergence per dimension and l' = dl/dphi_t,

    h* = h + [v' + (l_s - l_t) dh/dphi_t - l' h] / l'.
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
    """The objective of the module docstring, from a teacher or from data; arguments as for `FlowMapObjective`."""

    def target(self, model: Any, drawn: Drawn, x: Tensor, s: Tensor) -> Target:
        flow = self.flow(model, drawn, x, drawn.t)
        jump = moving(model, x, drawn.t, s, flow.v)
        gain = 1 / torch.sinc(jump.d / torch.pi)
        F = jump.F + broadcast(gain, jump.F) * jump.X
        return Target(F, divergence_target(model.path, jump, flow, drawn.t, s))
