r"""Adams predictor-corrector methods, one evaluation a step: on a fixed grid, or with error control per sample.

A step from s_n to s_(n+1) (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section III.1)

    predict    x*      = x_n + \int p(s) ds,      p a polynomial through the last velocities v_n, v_(n-1), ...
    evaluate   v_(n+1) = v(s_(n+1), x*)
    correct    x_(n+1) = x_n + \int c(s) ds,      c the polynomial through v_(n+1), v_n, ...

with both integrals over the step. The corrected state is not evaluated again (PEC mode), so a step costs one
evaluation. The steps may have any spacing, since the weights are those of polynomials through the actual nodes.

The velocity of a trained network is rough in time: it has an error that changes from one evaluation to the next.
Extrapolation multiplies that error, by 2.4 in root mean square for the classical predictor of order 3. The predictor
here is the least-squares polynomial through `smoothing` velocities more than its degree needs. It has the same order,
and each velocity has less weight. On a trained network of 2011.13456 this made the error of a likelihood 1.3 times
smaller at equal cost (`benchmarks/likelihood.py --study`); where the velocity is smooth it has no effect. With
smoothing=0 the method is the classical one.

The difference between predictor and corrector estimates the error of a step (Milne's device). Integrals of g have the
weights of the corrector, at the evaluated states.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.arguments import checked
from scoresde.solvers.solver import Field, Solution, Status, check_data_scale, choose, finite, per_sample, rms
from scoresde.tensors import broadcast, double

UNRESOLVED = 0.5  # difference between predictor and corrector from which on a step is refused
SMALLEST = 1e-12  # step, as a fraction of the interval, below which the adaptive solver gives up
SAFETY, SHRINK, GROW = 0.9, 0.2, 2.0  # of the adaptive step size
FIRST = 4  # the first adaptive step is the largest one divided by this


def integration_weights(nodes: Tensor, used: Tensor, low: Tensor, high: Tensor, degree: int) -> Tensor:
    r"""Weights w (B, p) such that sum_i w_i f(nodes_i) = \int_low^high of the least-squares polynomial through f.

    Args:
        nodes: (B, p), float64, distinct.
        used: (B, p), the mask of the nodes to use; the degree is at most their number minus one.
        low, high: ends of the interval (B,), float64.
        degree: degree of the polynomial.
    """
    width = (high - low)[:, None]
    powers = torch.arange(degree + 1, dtype=nodes.dtype, device=nodes.device)
    count = used.sum(dim=1, keepdim=True)
    fitted = powers < count  # (B, degree + 1): the coefficients that the nodes determine
    basis = ((nodes - low[:, None]) / width)[..., None] ** powers * (used[..., None] & fitted[:, None, :])
    gram = basis.mT @ basis + torch.diag_embed((~fitted).to(basis))
    moments = fitted / (powers + 1)
    return width * (basis @ torch.linalg.solve(gram, moments)[..., None]).squeeze(-1)


class _Path(NamedTuple):
    """The computed path of n samples: its position and state, and its last p evaluations, the newest first.

    s, x: position (n,) and state (n, *). nodes, used, weights: (n, p). v: (n, p, *). g: (n, p, k). The weight of an
    evaluation in the integrals is complete when it leaves this window; `integral` and `squared` (n, k) contain the
    evaluations that have left.
    """

    s: Tensor
    x: Tensor
    nodes: Tensor
    used: Tensor
    weights: Tensor
    v: Tensor
    g: Tensor
    integral: Tensor
    squared: Tensor

    @classmethod
    def begin(cls, s: Tensor, x: Tensor, v: Tensor, g: Tensor, length: int) -> "_Path":
        """A path of one evaluation, with room for `length`."""

        def window(first: Tensor) -> Tensor:
            return torch.cat([first[:, None], first.new_zeros(len(x), length - 1, *first.shape[1:])], dim=1)

        nodes, zero = s[:, None].expand(-1, length), torch.zeros_like(g)
        used = torch.arange(length, device=x.device).expand(len(x), -1) == 0
        return cls(s, x, nodes, used, torch.zeros_like(nodes), window(v), window(g), zero, zero)

    def predict(self, s_next: Tensor, order: int) -> Tensor:
        """The state at s_next by the least-squares polynomial through all evaluations of the window."""
        weights = integration_weights(self.nodes, self.used, self.s, s_next, order - 1)
        return self.x + _combine(weights, self.v)

    def correct(self, s_next: Tensor, v: Tensor, order: int) -> tuple[Tensor, Tensor]:
        """The state at s_next by the polynomial through v there and the last order - 1; its weights (n, 1 + p)."""
        nodes = torch.cat([s_next[:, None], self.nodes], dim=1)
        used = torch.cat([torch.ones_like(self.used[:, :1]), self.used], dim=1)
        used = used & (torch.arange(nodes.shape[1], device=nodes.device) < order)
        weights = integration_weights(nodes, used, self.s, s_next, order - 1)
        return self.x + _combine(weights, torch.cat([v[:, None], self.v], dim=1)), weights

    def accepted(self, good: Tensor, s: Tensor, x: Tensor, v: Tensor, g: Tensor, weights: Tensor) -> "_Path":
        """The path with the step made where it is good (n,)."""
        summed = torch.cat([torch.zeros_like(self.weights[:, :1]), self.weights], dim=1) + weights
        last, leaving = summed[:, -1:].to(g), self.g[:, -1]

        def pushed(first: Tensor, window: Tensor) -> Tensor:
            return torch.cat([first[:, None], window[:, :-1]], dim=1)

        stepped = _Path(
            s,
            x,
            pushed(s, self.nodes),
            pushed(torch.ones_like(good), self.used),
            summed[:, :-1],
            pushed(v, self.v),
            pushed(g, self.g),
            self.integral + last * leaving,
            self.squared + last.square() * leaving,
        )
        return _Path(*(choose(good, new, old) for new, old in zip(stepped, self, strict=True)))

    def integrals(self) -> tuple[Tensor, Tensor]:
        """(sum_i w_i g_i, sum_i w_i^2 g_i) over all evaluations, each (n, k)."""
        weights = self.weights[..., None].to(self.g)
        return self.integral + (weights * self.g).sum(dim=1), self.squared + (weights.square() * self.g).sum(dim=1)

    def rows(self, selection: Tensor) -> "_Path":
        """The path of some of the samples, a mask or indices."""
        return _Path(*(value[selection] for value in self))


def _combine(weights: Tensor, velocities: Tensor) -> Tensor:
    """sum_j weights (n, p)_j velocities (n, p, *)_j."""
    pairs = zip(weights.unbind(dim=1), velocities.unbind(dim=1), strict=True)
    return sum((broadcast(w, v) * v for w, v in pairs), start=torch.zeros_like(velocities[:, 0]))


def _difference(predicted: Tensor, corrected: Tensor) -> Tensor:
    """Root mean square of corrected - predicted over each sample (n,), relative to a state larger than 1."""
    return rms(corrected - predicted) / rms(corrected).clamp(min=1)


def _check_order(order: int, smoothing: int) -> None:
    if order not in (1, 2, 3) or smoothing < 0:
        raise ValueError(
            f"order must be 1, 2 or 3 and smoothing >= 0; got {order=}, {smoothing=} (higher orders have no use: the "
            "error of the first step, from a single evaluation, is of order 3)"
        )


@checked
@dataclass(frozen=True)
class Adams:
    """The predictor-corrector on a uniform grid, at a fixed cost; no result depends on its batch.

    A sample that turns NaN or infinite, or whose predictor and corrector differ by at least half the state (or by 0.5),
    stops at its last accepted state, with its position and status; the others go on.

    Args:
        steps: number of steps; the cost is steps + 1 evaluations.
        order: 1, 2 or 3.
        smoothing: number of velocities that the predictor is fitted to beyond those its degree needs.
        data_scale: scale of the data in model space, to a factor of three; None measures it, by about five evaluations.

    Raises:
        ValueError: another order, a negative smoothing, fewer than one step.
    """

    steps: int = 80
    order: int = 3
    smoothing: int = 1
    data_scale: float | None = None

    def __post_init__(self):
        _check_order(self.order, self.smoothing)
        check_data_scale(self.data_scale)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")

    def finer(self) -> "Adams":
        """The method with four times the steps."""
        return replace(self, steps=4 * self.steps)

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution:
        """Integrate from start to end; see `scoresde.solvers.solver`."""
        grid = torch.linspace(start, end, self.steps + 1, dtype=torch.float64)
        nodes = grid.to(x.device, double(x))[:, None].expand(-1, len(x))
        v, g = field(grid[0], x, None)
        status = torch.where(finite(v, g), Status.OK, Status.NONFINITE)
        path = _Path.begin(nodes[0], x, v, g, self.order + self.smoothing)
        for s_next in range(1, len(grid)):
            running = status == Status.OK
            predicted = path.predict(nodes[s_next], self.order)
            v, g = field(grid[s_next], predicted, None)
            corrected, weights = path.correct(nodes[s_next], v, self.order)
            sound = finite(predicted, v, g)
            resolved = _difference(predicted, corrected) < UNRESOLVED
            path = path.accepted(running & sound & resolved, nodes[s_next], corrected, v, g, weights)
            status = torch.where(running & ~sound, Status.NONFINITE, status)
            status = torch.where(running & sound & ~resolved, Status.FAILED, status)
        return Solution(path.x, *path.integrals(), path.s, status)


@checked
@dataclass(frozen=True)
class AdaptiveAdams:
    """The predictor-corrector with a step size for each sample; no result depends on its batch.

    A step is accepted if predictor and corrector differ by at most rtol times the state (or rtol, if that is more), in
    root mean square over its dimensions. This difference also sets the next step. Only samples that have not reached
    the end are evaluated.

    Args:
        rtol: tolerance of a step, relative to a state of at least unit size; the unit of the probability flow is the
            scale of the data, so structure finer than rtol times that scale needs a smaller rtol.
        max_step: as a fraction of the interval. It resolves the integrals, which take no part in error control: near
            the data the state may be constant while its divergence is not.
        order, smoothing, data_scale: see `Adams`.
        max_evaluations: number of evaluations after which a sample stops.

    Raises:
        ValueError: an order or smoothing as in `Adams`, a tolerance, step or budget out of range.
    """

    rtol: float = 1e-3
    max_step: float = 1 / 32
    order: int = 3
    smoothing: int = 1
    max_evaluations: int = 1000
    data_scale: float | None = None

    def __post_init__(self):
        _check_order(self.order, self.smoothing)
        check_data_scale(self.data_scale)
        if not (self.rtol > 0 and 0 < self.max_step <= 1 and self.max_evaluations >= 2):
            raise ValueError(f"rtol must be > 0, max_step in (0, 1] and max_evaluations >= 2; got {self}")

    def finer(self) -> "AdaptiveAdams":
        """The method at a tenth of the tolerance and a quarter of the largest step."""
        budget = 10 * self.max_evaluations
        return replace(self, rtol=self.rtol / 10, max_step=self.max_step / 4, max_evaluations=budget)

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution:
        """Integrate from start to end; see `scoresde.solvers.solver`."""
        s = per_sample(start, x, double(x))
        v, g = field(s, x, None)
        status, evaluations = torch.where(finite(v, g), -1, Status.NONFINITE), 1
        path = _Path.begin(s, x, v, g, self.order + self.smoothing)
        step = per_sample((end - start) * self.max_step / FIRST, x, double(x))
        rows = torch.arange(len(x), device=x.device)
        ended = []
        while True:
            if bool((over := status[rows] >= 0).any()) or not len(rows):
                ended.append((rows[over], path.rows(over)))
                rows, path, step = rows[~over], path.rows(~over), step[~over]
            if not len(rows):
                break
            path, step, outcome = self._attempt(field, path, step, rows, end, end - start)
            evaluations += 1
            spent = evaluations >= self.max_evaluations
            status[rows] = torch.where(outcome < 0, Status.BUDGET, outcome) if spent else outcome
        order = torch.cat([index for index, _ in ended]).argsort()
        parts = [(part.x, *part.integrals(), part.s) for _, part in ended]
        state, integral, squared, position = (torch.cat(column)[order] for column in zip(*parts, strict=True))
        return Solution(state, integral, squared, position, status)

    def _attempt(
        self, field: Field, path: _Path, step: Tensor, rows: Tensor, end: float, interval: float
    ) -> tuple[_Path, Tensor, Tensor]:
        """Try a step of each sample: the path, the next step, and a `Status` (n,), -1 for samples that go on."""
        last = (path.s + step - end) * interval > -1e-9 * interval**2
        s_next = torch.where(last, torch.full_like(step, end), path.s + step)
        predicted = path.predict(s_next, self.order)
        v, g = field(s_next, predicted, rows)
        corrected, weights = path.correct(s_next, v, self.order)
        sound = finite(predicted, v, g)
        error = torch.where(sound, _difference(predicted, corrected) / self.rtol, torch.inf)
        good = sound & (error <= 1)
        order = path.used.sum(dim=1).clamp(max=self.order)
        factor = (SAFETY * error ** (-1 / (order + 1))).clamp(SHRINK, GROW)
        path = path.accepted(good, s_next, corrected, v, g, weights)
        step = torch.where(good, step, s_next - path.s) * factor
        step = step.clamp(-self.max_step * abs(interval), self.max_step * abs(interval))
        outcome = torch.full_like(rows, -1)
        tiny = step.abs() < SMALLEST * abs(interval)
        outcome = torch.where(tiny, torch.where(sound, Status.FAILED, Status.NONFINITE), outcome)
        return path, step, torch.where(good & last, Status.OK, outcome)
