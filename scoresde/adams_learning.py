r"""Learn the grid and the weights of a likelihood's solver for a model.

With few steps, most of a log-likelihood's error is the same for all data: the integral of the divergence over a coarse
grid. So n steps have one grid and one set of quadrature weights, `solvers.AdamsTable`, that bring log p nearest to its
converged value. The residual of a sample x is the error of log p(x) per dimension,

    r(x) = (log p_n(x) - log p_N(x)) / d,        N steps of `Adams`, both with the same kept probes,

so that the probes' noise cancels. The parameters are the factors f_i = 1 + o_i of the weights W_i, and c_k, k <= m, in

    u_(i+1) - u_i  ~  exp(sum_k c_k cos(pi k (i + 1/2) / n)),

a smooth density of the nodes u_i (`solvers.learned_adams`): the output of a network is rough in time, and single nodes
would fit its roughness. They minimise the robust loss of `samplers.solver_fit`, s (s^2 + r^2)^(1/2) - s^2, where s is
the root mean square of r, by Gauss-Newton steps with a Gaussian prior around `Adams`, shortened until the loss falls.
The derivatives in o are the terms W_i g_i of the integral, with g_i the divergence at node i, which a solve computes
anyway; those in c are finite differences between solves. No derivative of the network is needed beyond the divergence.
The method works for any model and any trace.

A part of the data is held out. The result is the table with the smallest loss on it, among `Adams` and the tables of
all Gauss-Newton steps.
"""

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from scoresde.arguments import Count, Few, Positive, Range, checked
from scoresde.divergence import Hutchinson, Trace
from scoresde.likelihood import log_prob
from scoresde.prior_mismatch import PriorMismatch
from scoresde.probability_flow import Ratio
from scoresde.progress import progress_bar
from scoresde.protocols import Condition, Model
from scoresde.solvers import Adams, AdamsTable, Field, LearnedAdams, Solution, Solver
from scoresde.solvers.adams import grid_weights
from scoresde.solvers.learned_adams import ORDER, SMOOTHING, window
from scoresde.tensors import check_real, dimensions, float64
from scoresde.wrappers import with_density

DIFFERENCE = 0.02  # of c_k, for the derivatives
LONGEST = 0.5  # largest change of the logarithm of a step size in one Gauss-Newton step
SHORTER = (1.0, 0.5, 0.25, 0.125)  # fractions of a Gauss-Newton step that are tried
FAILED = 1.0  # the residual of a sample that the steps do not resolve, nats per dimension


@checked
@dataclass(frozen=True)
class AdamsLearning:
    """Settings of `ss.learn_adams`: how nodes and factors of a likelihood's solver are learned.

    The parameters are o_i of the factors f_i = 1 + o_i, and c_k, k = 1, ..., `modes`, of the spacing of the n steps,

        u_(i+1) - u_i  ~  exp(sum_k c_k cos(pi k (i + 1/2) / n)),

    with a Gaussian prior around `Adams`, where all of them are 0.

    Args:
        iterations: Gauss-Newton steps, at most.
        modes: number of cosines in the spacing.
        held_out: the share of the data that chooses the table, in (0, 1).
        reference_steps: steps of `Adams` whose log p is taken as converged.
        batch_size: samples of a batch.
        grid_spread, factor_spread: standard deviations of the prior of c_k and of o_i.

    Raises:
        ValueError: a setting is out of its range.
    """

    iterations: Few = 5
    modes: Few = 6
    held_out: Annotated[float, Range(0, 1, is_open=True)] = 1 / 3
    reference_steps: Few = 160
    batch_size: Count = 128
    grid_spread: Positive = 0.5
    factor_spread: Positive = 0.2


@dataclass(frozen=True)
class Errors:
    """The errors of log p, nats per dimension: mean, root mean square and median of |r| over samples, and the loss."""

    mean: float
    rms: float
    median: float
    loss: float


class AdamsLearner:
    """The model and the data for learning solvers with any number of steps.

    Args:
        model: in eval mode; it is not changed.
        x: data in model space (B, *), as `log_prob` takes them; two at least to learn from and two held out.
        cond: conditions with leading dimension B; None without.
        trace: default: one probe for each sample, kept along the path.
        settings: see `AdamsLearning`.
        seed: determines the probes.
        progress: show a progress bar.

    Raises:
        ValueError: there are too few data, all of them are 0, one is not finite, or the accurate solver fails for all;
            see also `log_prob`.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        cond: Condition = None,
        trace: Trace | None = None,
        settings: AdamsLearning | None = None,
        seed: int = 0,
        progress: bool = False,
    ):
        check_real("x", x)
        self.model, self.x, self.settings = with_density(model, cond), x, settings or AdamsLearning()
        self.trace, self.seed, self.progress = (trace or Hutchinson()).kept(), seed, progress
        self.learned_from = len(x) - round(self.settings.held_out * len(x))
        if not 2 <= self.learned_from <= len(x) - 2:
            raise ValueError(f"x must have at least 2 samples to learn from and 2 held out; got {len(x)} samples")
        self.data_scale = float(float64(x).square().mean().sqrt())
        if not 0 < self.data_scale < math.inf:
            raise ValueError(f"x must hold finite numbers that are not all 0; got a root mean square {self.data_scale}")
        flow = Ratio(self.model.sde, self.data_scale)
        self.interval = flow.of_time(self.model.sde.t_min), flow.of_time(self.model.sde.t_max)
        solver = Adams(self.settings.reference_steps, ORDER, SMOOTHING, self.data_scale)
        self.target = torch.cat(list(self._values(solver, 0, len(x), "accurate values")))
        if bool(self.target[: self.learned_from].isnan().all()) or bool(self.target[self.learned_from :].isnan().all()):
            raise ValueError(
                f"reference_steps must resolve the flow of the data; got {self.settings.reference_steps}, with which "
                "the accurate solver fails: choose more steps"
            )

    def learn(self, steps: int) -> LearnedAdams:
        """Return the learned solver; `table.notes` has the errors on the held-out data, of `Adams` and its own."""
        began = time.perf_counter()
        first = AdamsTable.uniform(steps, self.interval, self.data_scale)
        tables = [first, *self._iterates(first)]
        residuals = [self._residuals(table, self.learned_from, len(self.x))[0] for table in tables]
        scale = _scale(residuals[0])
        errors = [_errors(r, scale) for r in residuals]
        best = min(range(len(tables)), key=lambda i: errors[i].loss)
        notes = {
            **{f"adams_{name}": value for name, value in asdict(errors[0]).items() if name != "loss"},
            **{name: value for name, value in asdict(errors[best]).items() if name != "loss"},
            "iteration": best,
            "samples": len(self.x),
            "seed": self.seed,
            "trace": str(self.trace),
            **asdict(self.settings),
            "seconds": round(time.perf_counter() - began, 1),
        }
        return LearnedAdams(replace(tables[best], notes=notes))

    def _iterates(self, first: AdamsTable) -> Iterator[AdamsTable]:
        """Yield the table after each Gauss-Newton step."""
        s, steps = self.settings, first.steps
        theta = torch.zeros(s.modes + steps + 1, dtype=torch.float64)
        prior = torch.cat([theta.new_full((s.modes,), s.grid_spread), theta.new_full((steps + 1,), s.factor_spread)])
        r, terms = self._residuals(first, 0, self.learned_from)
        for _ in progress_bar(range(s.iterations), title=f"{steps} steps", unit="iteration", shown=self.progress):
            scale = _scale(r)
            shifts = DIFFERENCE * torch.eye(s.modes, len(theta), dtype=torch.float64)
            nearby = [self._residuals(self._table(first, theta + e), 0, self.learned_from)[0] for e in shifts]
            jacobian = torch.cat([(torch.stack(nearby, dim=1) - r[:, None]) / DIFFERENCE, terms], dim=1)
            change = _gauss_newton(r, jacobian, theta, prior, scale)
            change *= min(1.0, LONGEST / max(float((_modes(steps, s.modes) @ change[: s.modes]).abs().max()), 1e-12))
            for fraction in SHORTER:
                table = self._table(first, theta + fraction * change)
                found, found_terms = self._residuals(table, 0, self.learned_from)
                if _errors(found, scale).loss < _errors(r, scale).loss:
                    break
            else:
                return
            theta, r, terms = theta + fraction * change, found, found_terms
            yield table

    def _table(self, first: AdamsTable, theta: Tensor) -> AdamsTable:
        """Return the table at theta = (c, o)."""
        c, o = theta.split([self.settings.modes, first.steps + 1])
        sizes = (_modes(first.steps, self.settings.modes) @ c).exp()
        nodes = torch.cat([sizes.new_zeros(1), (sizes.cumsum(0) / sizes.sum())[:-1], sizes.new_ones(1)])
        return replace(first, nodes=nodes, factors=1 + o)

    def _residuals(self, table: AdamsTable, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return r (B,) of samples start ... end - 1, NaN where a solve fails, and W_i g_i / d, (B, n + 1)."""
        recorded = _Recording(LearnedAdams(table))
        values = torch.cat(list(self._values(recorded, start, end)))
        low, high = table.interval.tolist()
        weights = torch.zeros(table.steps + 1, dtype=torch.float64)
        corrector = grid_weights(low + (high - low) * table.nodes, ORDER, SMOOTHING)[1]
        weights.index_add_(0, window(table.steps).flatten(), corrector.flatten())
        terms = torch.cat([torch.stack(batch, dim=1) for batch in recorded.traces]) * weights / dimensions(self.x)
        return values - self.target[start:end], terms

    def _values(self, solver: Solver, start: int, end: int, title: str = "") -> Iterator[Tensor]:
        """Yield log p / d of batches of the samples start ... end - 1, (B,), float64 on the CPU."""
        batches = torch.arange(start, end).split(self.settings.batch_size)
        for rows in progress_bar(batches, title=title, unit="batch", shown=self.progress and bool(title)):
            part, seeds = self.model.rows(rows, len(self.x)), [self.seed + i for i in rows.tolist()]
            with warnings.catch_warnings(action="ignore", category=PriorMismatch):
                value = log_prob(part, self.x[rows], trace=self.trace, solver=solver, seeds=seeds).value
            yield value.cpu() / dimensions(self.x)


class _Recording:
    """A solver that keeps the trace of every evaluation, the mean over probes, in `traces`: one list for each solve."""

    def __init__(self, solver: LearnedAdams):
        self.solver, self.data_scale = solver, solver.data_scale
        self.traces: list[list[Tensor]] = []

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution:
        traces: list[Tensor] = []
        self.traces.append(traces)

        def noted(s: Tensor, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            v, g = field(s, x, rows)
            traces.append(float64(g[:, :-1].mean(dim=1)).cpu())
            return v, g

        return self.solver(noted, x, start, end)


def learn_adams(
    model: Model,
    x: Tensor,
    steps: int,
    cond: Condition = None,
    trace: Trace | None = None,
    settings: AdamsLearning | None = None,
    seed: int = 0,
    progress: bool = False,
) -> LearnedAdams:
    """Learn a solver with `steps` steps for the likelihoods of a model.

    The grid and the quadrature factors of `Adams` (`AdamsTable`) are chosen so that the residuals

        r(x) = (log p_n(x) - log p_N(x)) / d,        n = `steps`, N = `settings.reference_steps`, d dimensions,

    with the same probes in both, have the smallest robust loss E[s (s^2 + r^2)^(1/2) - s^2], s their root mean square
    with `Adams`; by Gauss-Newton steps, without derivatives of the network beyond the divergence. A part of the data is
    held out, and the result is the table with the smallest loss on it, among `Adams` and the tables of all steps.

        solver = ss.learn_adams(model, x, steps=12)
        nats = ss.log_prob(model, x_test, solver=solver).value

    Args:
        model: in eval mode; it is not changed.
        x: data in model space (B, *), as `log_prob` takes them; at least two to learn from and two held out.
        steps: the number of steps; the cost of a solve is steps + 1 evaluations.
        cond: conditions with leading dimension B; None without.
        trace: the trace estimator; default: one probe for each sample, kept along the path.
        settings: see `AdamsLearning`.
        seed: determines the probes.
        progress: show a progress bar.

    Returns:
        A solver for `log_prob` and `bits_per_dim`; `table.notes` has its errors on the held-out data and those of
        `Adams` with as many steps, nats per dimension.

    Raises:
        ValueError: there are too few data, all of them are 0, one is not finite, or the accurate solver fails for all;
            see also `log_prob`.
    """
    return AdamsLearner(model, x, cond, trace, settings, seed, progress).learn(steps)


def _modes(steps: int, count: int) -> Tensor:
    """Return cos(pi k (i + 1/2) / n) for step i and k = 1 ... count, (n, count)."""
    place = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    return torch.cos(math.pi * place[:, None] * torch.arange(1, count + 1))


def _gauss_newton(r: Tensor, jacobian: Tensor, theta: Tensor, spread: Tensor, scale: float) -> Tensor:
    """Return the step of the robust loss with a Gaussian prior around 0; samples that failed are left out."""
    solved = torch.isfinite(r) & torch.isfinite(jacobian).all(dim=1)
    r, jacobian = r[solved], jacobian[solved]
    weights = (1 + (r / scale).square()).rsqrt()
    noise = (weights * r.square()).mean() / spread.square()
    weighted = weights[:, None] * jacobian
    return -torch.linalg.solve(weighted.T @ jacobian + noise.diag(), weighted.T @ r + noise * theta)


def _scale(r: Tensor) -> float:
    """Return s of the module docstring, positive."""
    return max(_errors(r, 1.0).rms, 1e-12)


def _errors(r: Tensor, scale: float) -> Errors:
    """Return the errors of residuals (B,); a failed sample counts as FAILED."""
    r = r.nan_to_num(nan=FAILED)
    loss = scale * torch.hypot(r, torch.full_like(r, scale)) - scale**2
    return Errors(float(r.mean()), float(r.square().mean().sqrt()), float(r.abs().median()), float(loss.mean()))
