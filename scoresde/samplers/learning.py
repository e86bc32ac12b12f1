r"""Learn the coefficients and times of a few-step solver for a model (S4S, 2502.17423; LD3, 2405.15506).

The samples of a solver with n evaluations should be those of the probability flow from the same starts x_T. With Phi
the solver with parameters theta (a, b and t of `samplers.learned`), Psi an accurate solve, d the dimensions, and q the
squared distance |Phi(x_T) - Psi(x_T)|^2 / d, the parameters minimise

    E[ c (c^2 + q)^(1/2) - c^2 ],        c the root mean square distance of the formula that learning begins with.

This is about q/2 for small q and c q^(1/2) for large q: a few starts between two modes of the data are drawn to the
wrong one by any solver, and their squared distance alone would decide the gradient. The gradient goes through the
network at every evaluation. With `radius` > 0 the starts may move, each within a ball around x_T, towards states from
which the solver does reach Psi(x_T) (the relaxed objective of LD3, section 3.3).

theta has very unequal sensitivities. Adam therefore works on phi in theta = theta_0 + L phi, with L L^T the inverse of
the Gauss-Newton matrix E[J^T J] at the formula, J = d Phi / d theta. A matrix J^T J needs one product with J a probe,
as E[J^T z z^T J] = J^T J for random signs z (Hutchinson). Then a step of phi changes all samples about equally, and
hundreds of steps do what needs thousands on theta itself.

Starts cost nothing but their accurate solves. All starts of a step are drawn from a pool; other starts, which are never
learned from, choose the best of several iterates, and the formula itself is one of them.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scoresde.arguments import CountOrZero, Few, NonNegative, Positive, checked
from scoresde.probability_flow import frozen
from scoresde.progress import progress_bar
from scoresde.protocols import Condition, Model, expand, select
from scoresde.samplers.deis import AngularAdams
from scoresde.samplers.dpm_solver import DPMSolverPP
from scoresde.samplers.grids import GRIDS, Angle, Grid, resolve_grid, transitions
from scoresde.samplers.learned import LearnedSolver, Table
from scoresde.samplers.linear import Linear
from scoresde.samplers.predictor_corrector import ProbabilityFlow
from scoresde.score import BaseModel, device_of
from scoresde.sdes import SDE
from scoresde.solvers import Adams
from scoresde.tensors import broadcast, double
from scoresde.wrappers import as_model, for_inference

FORMULAS: dict[str, Callable[[], Linear]] = {
    "DPMSolverPP(2)": lambda: DPMSolverPP(2),
    "DPMSolverPP(3, final=1)": lambda: DPMSolverPP(3, final=1),
    "AngularAdams(2, 2)": lambda: AngularAdams(2, 2),
    "AngularAdams(3, 2)": lambda: AngularAdams(3, 2),
}
FORMULA_GRIDS = ("quadratic", "angle", "uniform_angle", "bounded_karras", "bounded_log_snr")
TRIED = 64  # held-out starts on which the formula is chosen
CHECKS = 8  # iterates that are compared on the held-out starts
WARMUP = 20  # steps in which the learning rate grows
PROBES, WHITENED = 2, 256  # probes z for each start, and starts, for the Gauss-Newton matrix
NODES = 4096  # of the table that maps the coordinate of a grid to times


@checked
@dataclass(frozen=True)
class Learning:
    """How a solver is learned; letters as in the module docstring.

    Args:
        steps: steps of Adam; 0 keeps the formula.
        batch_size: starts of a step.
        pool: starts to learn from.
        held_out: starts that choose the best iterate.
        target_steps: steps of the accurate solver (Adams); its error should be far below that of the learned solver.
        rate: the first learning rate of phi, in units of c/n; it falls to 0 along a cosine.
        ridge: added to the Gauss-Newton matrix, as a fraction of its diagonal.
        radius: how far starts may move, as a fraction of their norm; 0 keeps them.
        denoise_final: if True, the samples are E[x_0 | x] at t_min, and the evaluation there is the last of the n.
        checkpointing: recompute the network in the backward pass, which then needs the memory of one evaluation.
    """

    steps: CountOrZero = 300
    batch_size: Few = 64
    pool: Few = 2048
    held_out: Few = 256
    target_steps: Few = 40
    rate: Positive = 0.03
    ridge: Positive = 0.01
    radius: NonNegative = 0.0
    denoise_final: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class Starts:
    """Starts x (n, *) at t_max, the samples `target` (n, *) of the accurate flow from them, and their conditions."""

    x: Tensor
    target: Tensor
    cond: Condition = None

    def given(self, model: BaseModel, rows: Tensor | slice) -> BaseModel:
        """Return the model with the conditions of these rows."""
        return model.given(select(self.cond, rows, len(self.x)))

    def batches(self, size: int, count: int | None = None) -> Iterator[slice]:
        """Yield the slices of consecutive batches of the first `count` starts, by default all."""
        end = len(self.x) if count is None else min(count, len(self.x))
        return (slice(i, min(i + size, end)) for i in range(0, end, size))


@dataclass(frozen=True)
class Distance:
    """The distance of samples to those of the accurate flow: root mean square and median over starts, and the loss."""

    rms: float
    median: float
    loss: float


class Learner:
    """The model and the starts for learning solvers with any number of evaluations.

    Args:
        model: in eval mode, of any kind; it is not changed.
        shape: the shape of a state, without B; default: that which the network declares as `shape`.
        cond: conditions to draw from, with one leading dimension; None without. Start i has condition i mod M.
        settings: see `Learning`.
        seed: the seed of all random draws.
        progress: show progress bars.

    Raises:
        ValueError: the shape is unknown; see also `Sampler`.
    """

    def __init__(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        cond: Condition = None,
        settings: Learning | None = None,
        seed: int = 0,
        progress: bool = False,
    ):
        self.settings, self.seed, self.progress = settings or Learning(), seed, progress
        self.model = for_inference(as_model(model), None)
        self.shape = tuple(_declared_shape(self.model) if shape is None else shape)
        self.generator = torch.Generator().manual_seed(seed)
        s = self.settings
        self.pool, self.held_out = self._draw(s.pool, cond), self._draw(s.held_out, cond)

    def _draw(self, count: int, cond: Condition) -> Starts:
        sde = self.model.sde
        x = sde.prior_std * torch.randn(count, *self.shape, generator=self.generator)
        starts = Starts(x.to(device_of(self.model) or x.device), x, _repeated(cond, count))
        flow = ProbabilityFlow(Adams(self.settings.target_steps), denoise_final=self.settings.denoise_final)
        shown = progress_bar(
            list(starts.batches(self.settings.batch_size)), title="accurate flow", unit="batch", shown=self.progress
        )
        parts = [flow(starts.given(self.model, rows), x_T=starts.x[rows]).x for rows in shown]
        return replace(starts, target=torch.cat(parts))

    def distance(self, table: Table, scale: float, count: int | None = None) -> Distance:
        """Return the distance of a table's samples to the flow's on the held-out starts (the first `count`).

        scale: c of the module docstring.
        """
        starts, sampler, parts = self.held_out, LearnedSolver(table), []
        for rows in starts.batches(4 * self.settings.batch_size, count):
            try:
                x = sampler(starts.given(self.model, rows), x_T=starts.x[rows]).x
            except RuntimeError:  # samples are not finite
                return Distance(math.inf, math.inf, math.inf)
            parts.append(_squares(x, starts.target[rows]))
        q = torch.cat(parts)
        return Distance(float(q.mean().sqrt()), float(q.median().sqrt()), float(_robust(q, scale).mean()))

    def formula(self, nfe: int) -> tuple[str, Table]:
        """Return the name and the table of the formula with `nfe` evaluations that is nearest to the flow."""
        best, tried = math.inf, {}
        for name, method in FORMULAS.items():
            for grid in FORMULA_GRIDS:
                table = self.table(method(), GRIDS[grid], nfe)
                distance = self.distance(table, math.inf, TRIED).rms
                if distance < best:
                    best, tried = distance, {f"{name}, {grid}": table}
        if not tried:
            raise ValueError(f"a formula must give finite samples to start from; none does with nfe={nfe}: give start=")
        return next(iter(tried.items()))

    def table(self, method: Linear, grid: Grid, nfe: int) -> Table:
        """Return the table of a method on a grid with `nfe` evaluations.

        Raises:
            ValueError: nfe is not an integer >= 1, or >= 2 with `denoise_final`; see also `Table.of`.
        """
        least = 2 if self.settings.denoise_final else 1
        if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < least:
            reason = " (denoise_final takes one of them)" if least == 2 else ""
            raise ValueError(f"nfe must be an integer >= {least}{reason}; got {nfe!r}")
        sde = self.model.sde
        times = grid(sde, nfe - self.settings.denoise_final)
        transitions(times, sde)
        return Table.of(method, sde, times, self.settings.denoise_final)

    def learn(self, nfe: int, start: Linear | None = None, grid: str | Grid | None = None) -> LearnedSolver:
        """Return the learned solver with `nfe` evaluations; arguments as in `learn`."""
        began = time.perf_counter()
        if start is None:
            name, table = self.formula(nfe)
        else:
            name = type(start).__name__
            table = self.table(start, start.grid if grid is None else resolve_grid(grid), nfe)
        scale = self.distance(table, math.inf).rms
        before = self.distance(table, scale)
        best, after = table, before
        for candidate in self._iterates(table, scale) if self.settings.steps else ():
            distance = self.distance(candidate, scale)
            if distance.loss < after.loss:
                best, after = candidate, distance
        notes = {
            "formula": name,
            "formula_rms": before.rms,
            "formula_median": before.median,
            "rms": after.rms,
            "median": after.median,
            "seed": self.seed,
            **asdict(self.settings),
            "seconds": round(time.perf_counter() - began, 1),
        }
        return LearnedSolver(replace(best, notes=notes))

    def _iterates(self, table: Table, scale: float) -> Iterator[Table]:
        """Yield `CHECKS` tables while theta is learned, from `table` on."""
        s, parameters = self.settings, Parameters(table, self.model.sde)
        generator, pool = torch.Generator().manual_seed(self.seed + 1), self.pool
        moved = torch.zeros_like(pool.x) if s.radius else None
        with frozen(self.model):
            whitening = self._whitening(parameters, scale, generator)
            phi = torch.zeros(parameters.count, dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.Adam([phi], betas=(0.9, 0.99))
            title = f"{table.nfe} evaluations"
            for i in progress_bar(range(s.steps), title=title, unit="step", shown=self.progress):
                warm = min(1.0, (i + 1) / min(WARMUP, s.steps))
                decay = 0.5 * (1 + math.cos(math.pi * i / s.steps))
                optimizer.param_groups[0]["lr"] = s.rate / table.nfe * scale * warm * decay
                rows = torch.randint(len(pool.x), (s.batch_size,), generator=generator)
                x = pool.x[rows] if moved is None else (pool.x[rows] + moved[rows]).requires_grad_()
                y = self._solve(parameters, whitening @ phi, x, rows)
                loss = _robust(_squares(y, pool.target[rows]), scale).mean()
                if not bool(torch.isfinite(loss)):
                    raise RuntimeError(f"the loss is {float(loss)} in step {i}: lower rate, or check the model")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if moved is not None and x.grad is not None:
                    moved[rows] = _moved(moved[rows], x.grad, pool.x[rows], s.radius)
                if (i + 1) % max(s.steps // CHECKS, 1) == 0 or i + 1 == s.steps:
                    candidate = parameters.table(whitening @ phi.detach())
                    if candidate is not None:
                        yield candidate

    def _solve(self, parameters: "Parameters", theta: Tensor, x: Tensor, rows: Tensor | slice) -> Tensor:
        """Return the samples y_n (B, *) from the starts x, differentiable in theta (P,) or (B, P) and in x."""
        a, b, t = parameters.coefficients(theta)
        model, view, y = self.pool.given(self.model, rows), parameters.first.view, x
        views: list[Tensor] = []

        def evaluate(y: Tensor, t: Tensor) -> Tensor:
            return getattr(model.predict(y, t), view)

        with torch.enable_grad():
            for k in range(a.shape[-1]):
                keeps = self.settings.checkpointing
                value = checkpoint(evaluate, y, t[..., k], use_reentrant=False) if keeps else evaluate(y, t[..., k])
                views = [value, *views]
                y = broadcast(a[..., k], y) * y
                for j, v in enumerate(views):
                    y = y + broadcast(b[..., k, j], v) * v
        return y

    def _whitening(self, parameters: "Parameters", scale: float, generator: torch.Generator) -> Tensor:
        """Return L of the module docstring, (P, P), at theta = 0; starts count less where the loss is flatter."""
        count, total = parameters.count, 0.0
        size, used = self.settings.batch_size, min(WHITENED, len(self.pool.x))
        gram = torch.zeros(count, count, dtype=torch.float64)
        for rows in self.pool.batches(size, used):
            x, target = self.pool.x[rows], self.pool.target[rows]
            theta = torch.zeros(len(x), count, dtype=torch.float64, requires_grad=True)
            y = self._solve(parameters, theta, x, rows)
            weights = (1 + _squares(y.detach(), target) / scale**2).pow(-0.25).cpu()
            for _ in range(PROBES):
                z = torch.randint(2, y.shape, generator=generator).to(y) * 2 - 1
                (product,) = torch.autograd.grad((z * y).sum(), theta, retain_graph=True)
                product = weights[:, None] * product
                gram += product.mT @ product
            total += len(x) * PROBES * y[0].numel()
        gram /= total
        diagonal = gram.diagonal().clamp_min(1e-9 * float(gram.diagonal().mean()) + 1e-300)
        values, vectors = torch.linalg.eigh(gram + self.settings.ridge * torch.diag(diagonal))
        return vectors * values.rsqrt()


class Parameters:
    """theta (P,): changes of a, of b where j <= k, and of the times after the first, from a first table.

    Times change in the coordinate u of `grids.Angle(15, scale=3)`, which is nearly log(sigma/alpha) and bounded at both
    ends of every path; u is 0 at t_max and 1 at t_min. A time at t_min, the denoising, stays there.
    """

    def __init__(self, first: Table, sde: SDE):
        n = first.nfe
        self.first, self.sde = first, sde
        self.rows, self.columns = torch.tril_indices(n, n)
        self.movable = torch.arange(n)[(first.t < sde.t_max) & (first.t > sde.t_min)]
        self.count = n + len(self.rows) + len(self.movable)
        self.times = Angle(15.0, scale=3.0)(sde, NODES - 1)
        rising = self.times.flip(0)
        above = torch.searchsorted(rising, first.t).clamp(1, NODES - 1)
        share = (first.t - rising[above - 1]) / (rising[above] - rising[above - 1])
        self.u = 1 - (above - 1 + share) / (NODES - 1)

    def coefficients(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a (n,), b (n, n) and t (n,) for theta (P,); each with a leading B for (B, P)."""
        n, first, lead = self.first.nfe, self.first, theta.shape[:-1]
        a, b, t = theta.split([n, len(self.rows), len(self.movable)], dim=-1)
        whole = torch.zeros(*lead, n, n, dtype=torch.float64).index_put(
            (*(torch.arange(size).reshape(-1, 1) for size in lead), self.rows, self.columns), b
        )
        u = self.u[self.movable] + t
        moved = first.t.expand(*lead, n).index_copy(-1, self.movable, self._time(u))
        return first.a + a, first.b + whole, moved

    def _time(self, u: Tensor) -> Tensor:
        """Return the times at u, linear between the nodes; clamped to the range of the path."""
        place = u.clamp(0, 1) * (NODES - 1)
        before = place.detach().floor().clamp(max=NODES - 2).long()
        low, high = self.times[before], self.times[before + 1]
        return (low + (high - low) * (place - before)).clamp(self.sde.t_min, self.sde.t_max)

    def table(self, theta: Tensor) -> Table | None:
        """Return the table at theta; None if its times do not fall."""
        a, b, t = self.coefficients(theta)
        if not bool((t.diff() < 0).all()):
            return None
        return replace(self.first, a=a, b=b, t=t)


def learn(
    model: Model,
    nfe: int,
    shape: Sequence[int] | None = None,
    cond: Condition = None,
    settings: Learning | None = None,
    start: Linear | None = None,
    grid: str | Grid | None = None,
    seed: int = 0,
    progress: bool = False,
) -> LearnedSolver:
    """Learn a sampler with `nfe` evaluations for a model, see the module docstring.

    Args:
        model: in eval mode, of any kind (guided, conditional); it is not changed.
        nfe: evaluations of the model for each sample.
        shape: the shape of a state, without B; default: that which the network declares as `shape`.
        cond: conditions (M, *) that the starts take in turn; None without.
        settings: see `Learning`.
        start, grid: the formula that learning begins with, and its grid (default: the method's own); by default the
            best of `FORMULAS` on `FORMULA_GRIDS`.
        seed: the seed of all random draws.
        progress: show progress bars.

    Returns:
        A sampler; `table.notes` has the distances to the flow on held-out starts, before and after.

    Raises:
        ValueError: nfe is not an integer >= 1 (2 with `denoise_final`), the shape is unknown, or `start` draws noise or
            has several evaluations a step.
        RuntimeError: the model gives samples, or a loss, that are not finite.
    """
    return Learner(model, shape, cond, settings, seed, progress).learn(nfe, start, grid)


def _declared_shape(model: Any) -> Sequence[int]:
    """Return the `shape` of a model's network; raise ValueError if there is none."""
    shape = getattr(getattr(model, "network", None), "shape", None)
    if shape is None:
        raise ValueError("shape must be given, as the network declares no shape; got None: give shape=(1, 8, 8)")
    return shape


def _repeated(cond: Condition, count: int) -> Condition:
    """Return conditions (count, *) that repeat the given ones (M, *) in turn."""
    if cond is None:
        return None
    parts = cond if isinstance(cond, dict) else {"": cond}
    taken = {name: part[torch.arange(count) % len(part)] for name, part in parts.items()}
    return expand(taken if isinstance(cond, dict) else taken[""], count)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference of each sample over the dimensions, (B,), float64."""
    return (x - y).to(double(x)).flatten(1).square().mean(dim=1)


def _robust(q: Tensor, scale: float) -> Tensor:
    """Return the loss of the module docstring, of squared distances q (B,); q/2 for an infinite scale."""
    return q / 2 if math.isinf(scale) else scale * (scale**2 + q).sqrt() - scale**2


def _moved(moved: Tensor, gradient: Tensor, x: Tensor, radius: float) -> Tensor:
    """Return displacements (B, *) after a step against the gradient, kept within the ball of `radius` |x|."""
    norm = x.flatten(1).norm(dim=1)
    unit = broadcast(1 / gradient.flatten(1).norm(dim=1).clamp_min(1e-30), x) * gradient
    moved = moved - broadcast(0.2 * radius * norm, x) * unit
    excess = (radius * norm / moved.flatten(1).norm(dim=1).clamp_min(1e-30)).clamp(max=1)
    return broadcast(excess, x) * moved
