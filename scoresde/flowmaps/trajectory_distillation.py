r"""Distillation from accurate solutions of the teacher's flow: regression on pairs of their nodes.

Each state of a batch starts a solution of the probability flow: at t_min from data, or at t_max from the prior, with
equal probability, so that the map learns from the states that it will meet in a likelihood and in a sampler. A solution
has K + 1 nodes with their velocities, and the divergence integrated from node to node. Every ordered pair of nodes
(t, s) is then a sample of the map,

    F* = (y_s - cos(d) y_t) / sin(d),        h* = int_t^s v' dphi / (l_s - l_t),

and a pair of a node with itself one of the velocity, F* = v and h* = v' / l'(phi), with v' the divergence per dimension
(the letters of `flowmaps.angle`). This is the regression on noise-sample pairs of 2101.02388 for all pairs of times and
both directions, with the accumulated divergence of 2512.02636. One evaluation of the teacher serves many samples of the
student, and the targets have no error of the student in them.

v' is estimated with one Hutchinson probe for each node. The nodes are at equal steps of u, with the clock
l = l_0 + (l_1 - l_0) (u + a sin(2 pi u) / 2 pi), and a uniform in [-0.7, 0.7] for each state, so that all times occur.
The solver is `solvers.Adams`, and the divergence is integrated by the cubic through four neighbouring nodes.
"""

import math
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from scoresde.arguments import Count, NonNegative, Range, Share, checked
from scoresde.flowmaps.angle import AnglePath
from scoresde.flowmaps.flow_map_objective import FlowMapObjective, Target
from scoresde.losses import Drawn
from scoresde.protocols import Model
from scoresde.solvers import Adams, Status
from scoresde.tensors import broadcast

WARP = 0.7  # largest |a| of the module docstring


class Trajectories(NamedTuple):
    """Solutions of a flow at K + 1 nodes: times t (K + 1, B), float64; states x and velocities v (K + 1, B, *);
    divergence per dimension v' (K + 1, B), and its integral over phi from the first node (K + 1, B), None without it.

    is_solved: whether the solver succeeded (B,).
    """

    t: Tensor
    x: Tensor
    v: Tensor
    divergence: Tensor | None
    integral: Tensor | None
    is_solved: Tensor


def cumulative(g: Tensor, step: float) -> Tensor:
    """Return the integrals of g (K + 1, B), K >= 3, at nodes with equal distances, from the first node to each node.

    The integral over an interval is that of the cubic through the four nearest nodes: order 4.
    """
    inner = (13 * (g[1:-2] + g[2:-1]) - g[:-3] - g[3:]) / 24
    first = (9 * g[0] + 19 * g[1] - 5 * g[2] + g[3]) / 24
    last = (9 * g[-1] + 19 * g[-2] - 5 * g[-3] + g[-4]) / 24
    parts = step * torch.cat([first[None], inner, last[None]])
    return torch.cat([torch.zeros_like(parts[:1]), parts.cumsum(dim=0)])


@checked
class TrajectoryDistillation(FlowMapObjective):
    """The objective of the module docstring.

    Args:
        teacher: the model whose flow the map learns.
        steps: number K of steps of a solution; it costs K + 1 evaluations of the teacher for each state of a batch.
        pairs: number of pairs of nodes for each state of a batch; each costs one evaluation of the flow map.
        diagonal: probability that a pair is a node with itself.
        ends: probability that a pair ends at t_min or t_max.
        adaptive, divergence_weight: see `FlowMapObjective`.

    Raises:
        TypeError: the teacher is not a model.
    """

    def __init__(
        self,
        teacher: Model,
        steps: Annotated[int, Range(3, 10_000)] = 16,
        pairs: Count = 8,
        diagonal: Share = 0.1,
        ends: Share = 0.4,
        adaptive: NonNegative = 0.0,
        divergence_weight: NonNegative = 1.0,
    ):
        super().__init__(teacher, diagonal, ends, adaptive, divergence_weight)
        self.steps, self.pairs = steps, pairs

    def value(self, model: Any, drawn: Drawn, weight: Tensor) -> Tensor:
        solved, count = self.solve(model, drawn), len(drawn.t)
        i, j = self.draw_pairs(model, solved.t, drawn)
        rows = torch.arange(count).expand_as(i).flatten()
        target = self.target_of(model.path, solved, i.flatten(), j.flatten(), rows)
        t, s = solved.t[i.flatten(), rows], solved.t[j.flatten(), rows]
        x = solved.x[i.flatten(), rows].to(drawn.x0)
        values = self.errors(model.rows(rows, count).average(x, t, s), target, self.scale(model, t, s))
        return torch.where(solved.is_solved, values.reshape(i.shape).mean(dim=0), 0.0)

    @torch.no_grad()
    def solve(self, model: Any, drawn: Drawn) -> Trajectories:
        """Return solutions of the teacher's flow from the states of a batch."""
        path: AnglePath = model.path
        is_noise, a = drawn.stream.uniform(torch.empty(len(drawn.t), 2, dtype=torch.float64)).unbind(dim=1)
        low, high = path.ends()
        first, last = torch.where(is_noise < 0.5, high, low), torch.where(is_noise < 0.5, low, high)
        clock, span, a = path.clock(first), path.clock(last) - path.clock(first), WARP * (2 * a - 1)
        x = torch.where(
            broadcast((is_noise < 0.5).double(), drawn.x0) > 0,
            model.sde.prior_std * drawn.noise,
            model.sde.perturb(drawn.x0, low, drawn.noise),
        )
        nodes: list[tuple[Tensor, ...]] = []

        def field(u: Tensor, y: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            t = path.time(clock + span * (u + a * torch.sin(2 * math.pi * u) / (2 * math.pi)))
            t = torch.where(u <= 0, first, torch.where(u >= 1, last, t))
            pace = span * (1 + a * torch.cos(2 * math.pi * u)) / path.clock_rate(t)  # dphi/du
            state = path.to_state(y, t)
            flow = self.flow(model, drawn, state, t)
            divergence = y.new_zeros(len(y)) if flow.divergence is None else flow.divergence
            nodes.append((t, state, flow.v, divergence, pace))
            return broadcast(pace, y) * flow.v, y.new_zeros(len(y), 0)

        solution = Adams(self.steps)(field, x.double() / broadcast(path.size(first), x.double()), 0.0, 1.0)
        t, states, v, divergence, pace = (torch.stack(column) for column in zip(*nodes, strict=True))
        ok = solution.status == Status.OK
        if not model.divergence:
            return Trajectories(t, states, v, None, None, ok)
        return Trajectories(t, states, v, divergence, cumulative(pace.to(divergence) * divergence, 1 / self.steps), ok)

    def draw_pairs(self, model: Any, t: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Draw the nodes i and j of the pairs from t_i to t_j, (pairs, B) each; the map may jump from t_i to t_j."""
        last, count = len(t) - 1, t.shape[1]
        u = drawn.stream.uniform(torch.empty(count, 4 * self.pairs, dtype=torch.float64))
        u = u.T.reshape(4, self.pairs, count)
        i, j = (u[:2] * (last + 1)).long().clamp(max=last)
        j = torch.where(u[2] < self.ends, torch.where(u[3] < 0.5, 0, last), j)
        if model.targets != "all":
            clean = torch.where(t[0] < t[-1], 0, last).expand_as(i)
            if model.targets == "data":
                j = clean
            times = t.gather(0, i), t.gather(0, j)
            i, j = torch.where(times[0] >= times[1], i, j), torch.where(times[0] >= times[1], j, i)
        return i, torch.where(u[2] > 1 - self.diagonal, i, j)

    def target_of(self, path: AnglePath, solved: Trajectories, i: Tensor, j: Tensor, rows: Tensor) -> Target:
        """Return the targets of the jumps from the nodes i to the nodes j of the solutions `rows`, (n,) each."""
        t, s, same = solved.t[i, rows], solved.t[j, rows], i == j
        y, end = (x / broadcast(path.size(at), x) for x, at in ((solved.x[i, rows], t), (solved.x[j, rows], s)))
        d = path.angle(s) - path.angle(t)
        safe = torch.where(same, 1.0, d)
        F = (end - broadcast(safe.cos(), y) * y) / broadcast(safe.sin(), y)
        F = torch.where(broadcast(same.double(), y) > 0, solved.v[i, rows].to(F), F)
        if solved.divergence is None or solved.integral is None:
            return Target(F, None)
        clock = torch.where(same, 1.0, path.clock(s) - path.clock(t)).to(solved.integral)
        h = (solved.integral[j, rows] - solved.integral[i, rows]) / clock
        return Target(F, torch.where(same, solved.divergence[i, rows] / path.clock_rate(t).to(h), h))
