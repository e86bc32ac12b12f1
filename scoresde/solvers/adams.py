r"""Adams predictor-corrector methods, one evaluation a step: on a fixed grid, or with error control per sample.

A step from s_n to s_(n+1) (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section III.1)

    predict    x*      = x_n + \int p(s) ds,      p a polynomial through the last velocities v_n, v_(n-1), ...
    evaluate   v_(n+1) = v(s_(n+1), x*)
    correct    x_(n+1) = x_n + \int c(s) ds,      c the polynomial through v_(n+1), v_n, ...

with both integrals over the step. The corrected state is not evaluated again (PEC mode), so a step costs one
evaluation. The steps may have any spacing, since the weights are those of polynomials through the actual nodes.

The velocity of a trained network is rough in time: it has an error that changes from one evaluation to the next.
Extrapolation multiplies that error, by 2.4 in root mean square for the classical predictor of order 3. The predictor
of this module fits a polynomial by least squares to `smoothing` velocities more than its degree needs. It has the order
of the classical predictor, but gives each velocity less weight. On a trained network of 2011.13456 this made the error
of a likelihood 1.3 times smaller than the classical method at equal cost (`benchmarks/likelihood.py --study`); where
the velocity is smooth it has no effect. With smoothing=0 the method is the classical one.

The difference between predictor and corrector estimates the error of a step (Milne's device). The integral of g, the
second output of the field (`solvers.solver`), is a sum of g at the evaluated states with the corrector's weights.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.arguments import Few, checked
from scoresde.solvers.solver import Field, Solution, Status, check_data_scale, choose, finite, per_sample, rms
from scoresde.tensors import broadcast, double

UNRESOLVED = 0.5  # a step on the uniform grid is refused if predictor and corrector differ by this much or more
SMALLEST = 1e-12  # the adaptive solver gives up if a step is smaller than this fraction of the interval
SAFETY, SHRINK, GROW = 0.9, 0.2, 2.0  # adaptive step size: safety factor, smallest and largest change per step
FIRST = 4  # the first adaptive step is the largest one divided by this


def integration_weights(nodes: Tensor, used: Tensor, low: Tensor, high: Tensor, degree: int) -> Tensor:
    """Return weights w (B, p): sum_j w_j v_j is the integral of the least-squares polynomial for values v_j at nodes.

    Args:
        nodes: (B, p), float64, distinct.
        used: (B, p), the mask of the nodes to use; the degree is at most their number minus one.
        low, high: the limits of the integral (B,), float64.
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


def step_weights(nodes: Tensor, used: Tensor, low: Tensor, high: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Return the weights of the predictor (B, p) and of the corrector (B, p + 1) for steps from low to high (B,).

    The predictor integrates a polynomial of degree `order` - 1 fitted to the p velocities at `nodes` by least squares;
    the corrector the polynomial through the velocity at `high`, its first, and those at the first `order` - 1 nodes.
    """
    predictor = integration_weights(nodes, used, low, high, order - 1)
    nodes, used = torch.cat([high[:, None], nodes], dim=1), torch.cat([torch.ones_like(used[:, :1]), used], dim=1)
    used = used & (torch.arange(nodes.shape[1], device=nodes.device) < order)
    return predictor, integration_weights(nodes, used, low, high, order - 1)


def grid_weights(grid: Tensor, order: int, smoothing: int) -> tuple[Tensor, Tensor]:
    """Return the weights of `step_weights` for each step of a grid (n + 1,): (n, p) and (n, p + 1).

    p is order + smoothing. Column j of the predictor is the weight of the velocity j evaluations before the newest one,
    0 if there is none.
    """
    window = torch.arange(len(grid) - 1)[:, None] - torch.arange(order + smoothing)  # step, evaluations
    return step_weights(grid[window.clamp(min=0)], window >= 0, grid[:-1], grid[1:], order)


class _Path(NamedTuple):
    """The computed path of n samples: the current state, and a window of the last p evaluations, the newest first.

    s, x: the current position (n,) and state (n, *). The window has p slots, one per evaluation: used, False for an
    empty slot; nodes, the position; weights, the weight w_i in the integral of g, all (n, p); v, g, the outputs of the
    field, (n, p, *) and (n, p, k). Each step changes the weights in the window. integral, squared: sum_i w_i g_i and
    sum_i w_i^2 g_i (n, k) over the evaluations that have left the window; `solvers.solver` explains the second sum.
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
        """Return the path at its start s, with v and g at s in the first of the `length` slots of its window."""

        def window(first: Tensor) -> Tensor:
            return torch.cat([first[:, None], first.new_zeros(len(x), length - 1, *first.shape[1:])], dim=1)

        nodes, zero = s[:, None].expand(-1, length), torch.zeros_like(g)
        used = torch.arange(length, device=x.device).expand(len(x), -1) == 0
        return cls(s, x, nodes, used, torch.zeros_like(nodes), window(v), window(g), zero, zero)

    def predict(self, weights: Tensor) -> Tensor:
        """Return the state after the next step, for the predictor's weights of the velocities in the window (n, p)."""
        return self.x + _combine(weights, self.v)

    def correct(self, weights: Tensor, v: Tensor) -> Tensor:
        """Return the state after the next step, for the weights of its velocity v and of those in the window."""
        return self.x + _combine(weights, torch.cat([v[:, None], self.v], dim=1))

    def accepted(self, good: Tensor, s: Tensor, x: Tensor, v: Tensor, g: Tensor, weights: Tensor) -> "_Path":
        """Return the path after the step for the samples where the mask `good` (n,) is True, unchanged for others."""
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
        """Return sum_i w_i g_i and sum_i w_i^2 g_i (n, k) over all evaluations, those in the window included."""
        weights = self.weights[..., None].to(self.g)
        return self.integral + (weights * self.g).sum(dim=1), self.squared + (weights.square() * self.g).sum(dim=1)

    def rows(self, selection: Tensor) -> "_Path":
        """Return the path of some of the samples; `selection` is a mask or indices."""
        return _Path(*(value[selection] for value in self))


def _combine(weights: Tensor, velocities: Tensor) -> Tensor:
    """Return sum_j weights_j velocities_j (n, *), for weights (n, p) and velocities (n, p, *)."""
    pairs = zip(weights.unbind(dim=1), velocities.unbind(dim=1), strict=True)
    return sum((broadcast(w, v) * v for w, v in pairs), start=torch.zeros_like(velocities[:, 0]))


def _difference(predicted: Tensor, corrected: Tensor) -> Tensor:
    """Return rms(corrected - predicted) / max(rms(corrected), 1), (n,), with rms the root mean square of a sample."""
    return rms(corrected - predicted) / rms(corrected).clamp(min=1)


def _check_order(order: int, smoothing: int) -> None:
    if order not in (1, 2, 3) or smoothing < 0:
        raise ValueError(
            f"order must be 1, 2 or 3 and smoothing >= 0; got {order=}, {smoothing=} (a higher order would not help: "
            "the first step, corrected with only two evaluations, limits the order to 3)"
        )


def on_grid(
    field: Field,
    x: Tensor,
    grid: Tensor,
    predictor: Tensor,
    corrector: Tensor,
    quadrature: Tensor,
    unresolved: float = UNRESOLVED,
) -> Solution:
    """Integrate from the first to the last node of a grid (n + 1,), float64; see `Adams` for samples that fail.

    Args:
        predictor: weights (n, p) of the velocities before each step, the newest first.
        corrector: weights (n, p + 1) of the velocity after each step and of those before it.
        quadrature: weights of the integrals, as the corrector's.
        unresolved: the relative difference of predictor and corrector from which on a sample fails.
    """
    nodes, predictor, corrector, quadrature = (
        values.to(x.device, double(x))[:, None].expand(-1, len(x), *values.shape[1:])
        for values in (grid, predictor, corrector, quadrature)
    )
    v, g = field(grid[0], x, None)
    status = torch.where(finite(v, g), Status.OK, Status.NONFINITE)
    path = _Path.begin(nodes[0], x, v, g, predictor.shape[-1])
    for i, s in enumerate(grid[1:]):
        running = status == Status.OK
        predicted = path.predict(predictor[i])
        v, g = field(s, predicted, None)
        corrected = path.correct(corrector[i], v)
        sound = finite(predicted, v, g)
        resolved = _difference(predicted, corrected) < unresolved
        path = path.accepted(running & sound & resolved, nodes[i + 1], corrected, v, g, quadrature[i])
        status = torch.where(running & ~sound, Status.NONFINITE, status)
        status = torch.where(running & sound & ~resolved, Status.FAILED, status)
    return Solution(path.x, *path.integrals(), path.s, status)


@checked
@dataclass(frozen=True)
class Adams:
    """Adams' predictor-corrector on a uniform grid, at a fixed cost; no sample depends on the others in its batch.

    A sample stops at its last accepted state if it turns NaN or infinite, or if predictor and corrector differ by half
    the size of the state or more (by 0.5 for a state smaller than 1); the other samples go on. `Solution` reports the
    position and status of each.

    Args:
        steps: number of steps; the cost is steps + 1 evaluations.
        order: 1, 2 or 3.
        smoothing: number of velocities to which the predictor is fitted, in addition to those that its degree needs.
        data_scale: scale of the data in model space, to within a factor of three; None (default) measures it with
            three to ten evaluations.

    Raises:
        ValueError: order is not 1, 2 or 3, smoothing is negative, steps < 1, or data_scale is not positive.
    """

    steps: Few = 80
    order: int = 3
    smoothing: int = 1
    data_scale: float | None = None

    def __post_init__(self):
        _check_order(self.order, self.smoothing)
        check_data_scale(self.data_scale)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")

    def finer(self) -> "Adams":
        """Return this solver with four times the steps."""
        return replace(self, steps=4 * self.steps)

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution:
        """Integrate from start to end; see `scoresde.solvers.solver`."""
        grid = torch.linspace(start, end, self.steps + 1, dtype=torch.float64)
        predictor, corrector = grid_weights(grid, self.order, self.smoothing)
        return on_grid(field, x, grid, predictor, corrector, corrector)


@checked
@dataclass(frozen=True)
class AdaptiveAdams:
    """The predictor-corrector with a step size for each sample; a sample does not depend on the others in its batch.

    A step is accepted if predictor and corrector differ by at most rtol max(1, |x|), where both the difference and the
    size |x| of the state are root mean squares over its dimensions. The difference also sets the next step. Only
    samples that have not reached the end are evaluated.

    Args:
        rtol: tolerance of a step, relative to a state of at least unit size. The probability flow is solved in units of
            the scale of the data, so structure finer than rtol times that scale needs a smaller rtol.
        max_step: largest step, as a fraction of the interval. It keeps the integrals accurate, which error control
            ignores: near the data the state may be constant while the divergence of the velocity is not.
        order: 1, 2 or 3.
        smoothing: number of velocities to which the predictor is fitted, in addition to those that its degree needs.
        data_scale: scale of the data in model space, to within a factor of three; None (default) measures it.
        max_evaluations: number of evaluations after which a sample stops.

    Raises:
        ValueError: order is not 1, 2 or 3, smoothing is negative, rtol <= 0, max_step is not in (0, 1],
            max_evaluations < 2, or data_scale is not positive.
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
        """Return this solver with a tenth of the tolerance and a quarter of the largest step."""
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
        """Try a step of each sample; return the new path, the next step sizes, and each `Status`, -1 if unfinished."""
        last = (path.s + step - end) * interval > -1e-9 * interval**2
        s_next = torch.where(last, torch.full_like(step, end), path.s + step)
        predictor, corrector = step_weights(path.nodes, path.used, path.s, s_next, self.order)
        predicted = path.predict(predictor)
        v, g = field(s_next, predicted, rows)
        corrected = path.correct(corrector, v)
        sound = finite(predicted, v, g)
        error = torch.where(sound, _difference(predicted, corrected) / self.rtol, torch.inf)
        good = sound & (error <= 1)
        order = path.used.sum(dim=1).clamp(max=self.order)
        factor = (SAFETY * error ** (-1 / (order + 1))).clamp(SHRINK, GROW)
        path = path.accepted(good, s_next, corrected, v, g, corrector)
        step = torch.where(good, step, s_next - path.s) * factor
        step = step.clamp(-self.max_step * abs(interval), self.max_step * abs(interval))
        outcome = torch.full_like(rows, -1)
        tiny = step.abs() < SMALLEST * abs(interval)
        outcome = torch.where(tiny, torch.where(sound, Status.FAILED, Status.NONFINITE), outcome)
        return path, step, torch.where(good & last, Status.OK, outcome)
