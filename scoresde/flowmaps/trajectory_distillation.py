"""Distillation from accurate solutions of the teacher's flow: regression on pairs of their states.

`TrajectoryDistillation` has the formulas. It is the regression on pairs of noise and sample of 2101.02388 for all pairs
of times and both directions, with the accumulated divergence of 2512.02636. Each evaluation of the teacher serves
several samples of the student, and the targets do not depend on the student.

The solver is `solvers.Adams` in the variable u of `probability_flow.Ratio`. Its nodes are at equal steps of z, with
u = u_0 + (u_1 - u_0) (z + a sin(2 pi z) / 2 pi), and a uniform in [-0.3, 0.3] for each state. (Equal steps of the clock
would be too long near pure noise, where errors of the teacher are multiplied.) v' is estimated with one Hutchinson
probe at each node. The states and the integral of v' at the nodes are integrals of the cubic through v and
v' at four neighbouring nodes. Between two nodes they are cubic Hermite interpolants, with v and v' as derivatives.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from scoresde.arguments import Count, Distinct, NonNegative, Range, Share, checked
from scoresde.flowmaps.angle import AnglePath
from scoresde.flowmaps.flow_map_objective import SAME, FlowMapObjective, Target, check_shares
from scoresde.losses import Drawn
from scoresde.probability_flow import Ratio
from scoresde.protocols import Model
from scoresde.solvers import Adams, Status
from scoresde.solvers.solver import choose
from scoresde.tensors import broadcast, double

WARP = 0.3  # largest |a| of the module docstring


class Trajectories(NamedTuple):
    """Solutions of a flow at K + 1 nodes; letters as in `TrajectoryDistillation`.

    t: times (K + 1, B), float64. y, v: normalised states and velocities (K + 1, B, *). divergence: v' (K + 1, B), and
    integral: that of v' over phi from the first node (K + 1, B); zeros if the map learns no divergence. is_solved:
    whether the solver succeeded and v' is finite (B,); the values of other solutions are 0.
    """

    t: Tensor
    y: Tensor
    v: Tensor
    divergence: Tensor
    integral: Tensor
    is_solved: Tensor

    def at(self, path: AnglePath, t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (n, *) and the integral (n,) at times t (n,) of the solutions `rows` (n,)."""
        clocks, clock = path.clock(self.t), path.clock(t)
        rising = clocks[-1] > clocks[0]
        below = torch.where(rising, clocks, -clocks).T.contiguous()[rows]
        i = torch.searchsorted(below, torch.where(rising[rows], clock, -clock)[:, None]).squeeze(1)
        i = i.clamp(1, len(clocks) - 1) - 1
        first, last = clocks[i, rows], clocks[i + 1, rows]
        z, width = ((clock - first) / (last - first)).clamp(0, 1), last - first
        weights = (1 + 2 * z) * (1 - z) ** 2, z**2 * (3 - 2 * z), width * z * (1 - z) ** 2, width * z**2 * (z - 1)
        slopes = [1 / path.clock_rate(self.t[k, rows]) for k in (i, i + 1)]  # dphi/dl

        def between(values: Tensor, rates: Tensor) -> Tensor:
            parts = values[i, rows], values[i + 1, rows], rates[i, rows], rates[i + 1, rows]
            factors = weights[0], weights[1], weights[2] * slopes[0], weights[3] * slopes[1]
            terms = [broadcast(factor, part) * part for factor, part in zip(factors, parts, strict=True)]
            return sum(terms[1:], start=terms[0])

        return between(self.y, self.v), between(self.integral, self.divergence)


def cumulative(g: Tensor, step: float) -> Tensor:
    """Return the integrals of g (K + 1, B, *), K >= 3, at nodes with equal distances, from the first node to each node.

    The integral over an interval is that of the cubic through the four nearest nodes: order 4.
    """
    inner = (13 * (g[1:-2] + g[2:-1]) - g[:-3] - g[3:]) / 24
    first = (9 * g[0] + 19 * g[1] - 5 * g[2] + g[3]) / 24
    last = (9 * g[-1] + 19 * g[-2] - 5 * g[-3] + g[-4]) / 24
    parts = step * torch.cat([first[None], inner, last[None]])
    return torch.cat([torch.zeros_like(parts[:1]), parts.cumsum(dim=0)])


@checked
class TrajectoryDistillation(FlowMapObjective):
    """Train a `FlowMap` on accurate solutions of a teacher's flow (2101.02388, for all pairs of times; 2512.02636).

    Each state of a batch starts a solution of the probability flow, at t_min from data or at t_max from the prior with
    equal probability. Two times t and s of a solution give the targets of one sample,

        F* = (y_s - cos(d) y_t) / sin(d),        h* = int_t^s v' dphi / (l_s - l_t),        d = phi_s - phi_t,

    and a node of the solution, where s = t, those of F* = v and h* = v' / l'(phi), with v the velocity in the angle
    phi, v' its divergence per dimension and l the clock (see `FlowMap`). The loss of a pair is |F - F*|^2 / d_x +
    divergence_weight (h - h*)^2. A state whose solution fails, or whose divergence is not finite, has the loss 0.

    Args:
        teacher: the model whose flow the map learns, with the same SDE.
        steps: number K of steps of a solution; it costs K + 1 evaluations of the teacher for each state of a batch.
        pairs: number of pairs of times for each state of a batch; each costs one evaluation of the flow map.
        jumps: numbers of steps of `FlowMap.sample` and `Jumps` whose jumps are drawn with probability `few`.
        few: see `jumps`. The times of the other pairs are uniform in the clock.
        diagonal: probability of a node, where s = t.
        adaptive: power p of the weight 1 / (|F - F*|^2 / d_x + 1e-3)^p of a pair; 0 for the plain squared error.
        divergence_weight: weight of the squared error of the average divergence h beside that of F.

    Raises:
        TypeError: the teacher is not a model; in a call, the model is not a flow map.
        ValueError: few + diagonal is more than 1, or another argument is out of its range; in a call, the teacher has
            another SDE than the flow map.
    """

    def __init__(
        self,
        teacher: Model,
        steps: Annotated[int, Range(3, 10_000)] = 16,
        pairs: Count = 8,
        jumps: Annotated[Sequence[Count], Distinct(1)] = (1, 2, 4),
        few: Share = 0.6,
        diagonal: Share = 0.1,
        adaptive: NonNegative = 0.0,
        divergence_weight: NonNegative = 1.0,
    ):
        check_shares(few=few, diagonal=diagonal)
        super().__init__(teacher, diagonal, 0.0, adaptive, divergence_weight)
        self.steps, self.pairs, self.jumps, self.few = steps, pairs, tuple(jumps), few

    def value(self, model: Any, drawn: Drawn, weight: Tensor) -> Tensor:
        solved, count = self.solve(model, drawn), len(drawn.t)
        t, s, node = self.draw_pairs(model, solved.t, drawn)
        rows = torch.arange(count).expand_as(t).flatten()
        x, target = self.samples(model.path, solved, t.flatten(), s.flatten(), node.flatten(), rows)
        output = model.rows(rows, count).average(x.to(drawn.x0), t.flatten(), s.flatten())
        values = self.errors(output, target, torch.ones_like(rows, dtype=torch.float64))
        return torch.where(solved.is_solved, values.reshape(t.shape).mean(dim=0), 0.0)

    @torch.no_grad()
    def solve(self, model: Any, drawn: Drawn) -> Trajectories:
        """Return solutions of the teacher's flow from the states of a batch."""
        path: AnglePath = model.path
        is_noise, a = drawn.stream.uniform(torch.empty(len(drawn.t), 2, dtype=torch.float64)).unbind(dim=1)
        is_noise, a, (low, high) = is_noise < 0.5, WARP * (2 * a - 1), path.ends()
        first, last = torch.where(is_noise, high, low), torch.where(is_noise, low, high)
        ratio = Ratio(model.sde, path.data_scale)
        least, most = (ratio.of_time(float(end)) for end in (low, high))
        begin, span = torch.where(is_noise, most, least), torch.where(is_noise, least - most, most - least)
        clean = model.sde.perturb(drawn.x0, low, drawn.noise)
        x = choose(is_noise, model.sde.prior_std * drawn.noise, clean)
        start = x.to(double(x)) / broadcast(path.size(first), x.to(double(x)))
        nodes: list[tuple[Tensor, ...]] = []

        def field(z: Tensor, y: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            u = begin + span * (z + a * torch.sin(2 * math.pi * z) / (2 * math.pi))
            t = torch.where(z <= 0, first, torch.where(z >= 1, last, ratio.to_time(u)))
            data, noise = ratio.coefficients(u, t)
            pace = span * (1 + a * torch.cos(2 * math.pi * z)) * torch.hypot(path.data_scale * data, noise)  # dphi/dz
            flow = self.flow(model, drawn, path.to_state(y, t), t)
            divergence = y.new_zeros(len(y)) if flow.divergence is None else flow.divergence
            nodes.append((t, flow.v, broadcast(pace, y) * flow.v, divergence, pace.to(y) * divergence))
            return broadcast(pace, y) * flow.v, y.new_zeros(len(y), 0)

        solution = Adams(self.steps)(field, start, 0.0, 1.0)
        t, v, rate, divergence, growth = (torch.stack(column) for column in zip(*nodes, strict=True))
        y, integral = start + cumulative(rate, 1 / self.steps), cumulative(growth, 1 / self.steps)
        is_solved = (solution.status == Status.OK) & integral[-1].isfinite()
        y, v, divergence, integral = (  # without NaN, of which even a weight of 0 leaves a gradient of NaN
            part.masked_fill(~is_solved.reshape(-1, *(1,) * (part.ndim - 2)), 0.0)
            for part in (y, v, divergence, integral)
        )
        return Trajectories(t, y, v, divergence, integral, is_solved)

    def draw_pairs(self, model: Any, nodes: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the pairs of times from t to s, float64 (pairs, B) each, that the map may learn.

        The third result is the index of the node where t = s is one of the nodes (K + 1, B), and -1 elsewhere.
        """
        path, (count, size) = model.path, nodes.shape
        u = drawn.stream.uniform(torch.empty(size, 5 * self.pairs, dtype=torch.float64))
        u = u.T.reshape(5, self.pairs, size)
        low, high = path.ends()
        number = torch.tensor(self.jumps)[(u[1] * len(self.jumps)).long()]
        first, last = path.angle(low), path.angle(high)
        k = (u[2] * number).floor()
        ends = [path.time_of_angle(first + (last - first) * j / number) for j in (k, k + 1)]
        few = [
            torch.where(j == 0, low, torch.where(j == number, high, end))
            for j, end in zip((k, k + 1), ends, strict=True)
        ]
        pair = [
            torch.where(u[0] < self.few, one, path.between(v, low, high)) for one, v in zip(few, u[2:4], strict=True)
        ]
        down = torch.maximum(*pair), torch.minimum(*pair)
        is_down = u[4] < 0.5 if model.targets == "all" else torch.ones_like(k, dtype=torch.bool)
        t, s = torch.where(is_down, *down), torch.where(is_down, *down[::-1])
        s = torch.full_like(s, model.sde.t_min) if model.targets == "data" else s
        node = (u[3] * count).long()
        is_node = u[0] > 1 - self.diagonal
        at = nodes.gather(0, node)
        return torch.where(is_node, at, t), torch.where(is_node, at, s), torch.where(is_node, node, -1)

    def samples(
        self, path: AnglePath, solved: Trajectories, t: Tensor, s: Tensor, node: Tensor, rows: Tensor
    ) -> tuple[Tensor, Target]:
        """Return x_t (n, *) and the target of the jumps from t to s along the solutions `rows`, (n,) each.

        `node` is the index of the node at t = s, and -1 elsewhere.
        """
        (y, before), (end, after) = solved.at(path, t, rows), solved.at(path, s, rows)
        d, is_node = path.angle(s) - path.angle(t), node >= 0
        is_node = is_node | (d.abs() < SAME)
        safe = torch.where(is_node, 1.0, d)
        F = (end - broadcast(safe.cos(), y) * y) / broadcast(safe.sin(), y)
        clock = torch.where(is_node, 1.0, path.clock(s) - path.clock(t)).to(after)
        near = solved.divergence[node, rows] / path.clock_rate(t).to(after)
        h = choose(is_node, near, (after - before) / clock)
        return path.to_state(y, t), Target(choose(is_node, solved.v[node, rows], F), h)
