r"""Learn the coefficients and times of a few-step solver for a model (S4S, 2502.17423; LD3, 2405.15506).

The samples of a solver with n evaluations should be those of the probability flow from the same starts x_T. The only
cost of a start is its accurate solve. A pool of starts is learned from (`samplers.solver_fit`). Other starts are held
out: of several tables from the course of the fit, the one with the smallest loss on them is chosen. The initial formula
is one of these tables, so a learned solver never has a larger loss on the held-out starts. Because of this choice, its
distance there is a little smaller than on new starts.

The formula decides more than any setting, because learning moves its times little: the rms distance of a learned solver
is mostly that of a few starts between two modes of the data, and their number depends on the times at which the modes
separate. A few starts cannot rank formulas by this distance, so all are compared on the whole pool. A few starts decide
their order: the likely best comes first, and another one stops once its sum of squares is larger.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from scoresde.progress import progress_bar
from scoresde.protocols import Condition, Model, expand
from scoresde.samplers.deis import IPNDM, AngularAdams
from scoresde.samplers.dpm_solver import DPMSolverPP
from scoresde.samplers.grids import GRIDS, Grid, resolve_grid, transitions
from scoresde.samplers.learned_solver import LearnedSolver, SolverTable
from scoresde.samplers.linear import Linear
from scoresde.samplers.predictor_corrector import ProbabilityFlow
from scoresde.samplers.solver_fit import Learning, Starts, iterates, robust, squares
from scoresde.samplers.unipc import UniPC
from scoresde.score import device_of
from scoresde.solvers import Adams
from scoresde.wrappers import as_model, for_inference

FORMULAS: dict[str, Callable[[], Linear]] = {
    "DPMSolverPP(2)": lambda: DPMSolverPP(2),
    "DPMSolverPP(3, final=1)": lambda: DPMSolverPP(3, final=1),
    "UniPC(2)": lambda: UniPC(2),
    "AngularAdams(2, 1)": lambda: AngularAdams(2, 1),
    "AngularAdams(2, 2)": lambda: AngularAdams(2, 2),
    "AngularAdams(3, 2)": lambda: AngularAdams(3, 2),
    "AngularAdams(4, 3)": lambda: AngularAdams(4, 3),
    "IPNDM(3)": lambda: IPNDM(3),
}
FORMULA_GRIDS = ("quadratic", "angle", "uniform_angle", "bounded_karras", "bounded_log_snr")
FEW = 64  # starts that decide the order in which formulas are compared


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
        starts = Starts(x.to(device_of(self.model) or x.device), x, repeated(cond, count))
        flow = ProbabilityFlow(Adams(self.settings.target_steps), denoise_final=self.settings.denoise_final)
        shown = progress_bar(
            list(starts.batches(self.settings.batch_size)), title="accurate flow", unit="batch", shown=self.progress
        )
        parts = [flow(starts.given(self.model, rows), x_T=starts.x[rows]).x for rows in shown]
        return replace(starts, target=torch.cat(parts))

    def distance(
        self, table: SolverTable, scale: float, starts: Starts | None = None, limit: float = math.inf
    ) -> Distance:
        """Return the distance of a table's samples to the flow's.

        Args:
            table: the solver.
            scale: c of `samplers.solver_fit`.
            starts: default: those held out.
            limit: stop, with infinite distances, once the root mean square is known to be larger.
        """
        starts, sampler, parts, total = starts or self.held_out, LearnedSolver(table), [], 0.0
        for rows in starts.batches(4 * self.settings.batch_size):
            try:
                x = sampler(starts.given(self.model, rows), x_T=starts.x[rows]).x
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # samples are not finite
                return Distance(math.inf, math.inf, math.inf)
            parts.append(squares(x, starts.target[rows]))
            total += float(parts[-1].sum())
            if total > limit**2 * len(starts.x):
                return Distance(math.inf, math.inf, math.inf)
        q = torch.cat(parts)
        return Distance(float(q.mean().sqrt()), float(q.median().sqrt()), float(robust(q, scale).mean()))

    def formula(self, nfe: int) -> tuple[str, SolverTable]:
        """Return the name and the table of the formula with `nfe` evaluations that is nearest to the flow."""
        check_nfe(nfe, self.settings)
        tables = {}
        for name, method in FORMULAS.items():
            for grid in FORMULA_GRIDS:
                with suppress(ValueError):  # a method or a grid that does not suit this path
                    tables[f"{name}, {grid}"] = self.table(method(), GRIDS[grid], nfe)
        few, best, rms = self.pool.first(FEW), "", math.inf
        likely = {name: self.distance(table, math.inf, few).rms for name, table in tables.items()}
        ordered = sorted(likely, key=lambda name: likely[name])
        for name in progress_bar(ordered, title="formulas", unit="formula", shown=self.progress):
            distance = self.distance(tables[name], math.inf, self.pool, limit=rms).rms
            if distance < rms:
                best, rms = name, distance
        if not best:
            raise RuntimeError(
                f"no formula gives finite samples with nfe={nfe}: check the model, or give a formula as start"
            )
        return best, tables[best]

    def table(self, method: Linear, grid: Grid, nfe: int) -> SolverTable:
        """Return the table of a method on a grid with `nfe` evaluations.

        Raises:
            ValueError: nfe is not an integer >= 1, or >= 2 with `denoise_final`; see also `SolverTable.of`.
        """
        check_nfe(nfe, self.settings)
        sde = self.model.sde
        times = grid(sde, nfe - self.settings.denoise_final)
        transitions(times, sde)
        return SolverTable.of(method, sde, times, self.settings.denoise_final)

    def learn(self, nfe: int, start: Linear | None = None, grid: str | Grid | None = None) -> LearnedSolver:
        """Return the learned solver with `nfe` evaluations; arguments and errors as in `learn`."""
        check_start(start, grid)
        began = time.perf_counter()
        if start is None:
            name, table = self.formula(nfe)
        else:
            name = type(start).__name__
            table = self.table(start, start.grid if grid is None else resolve_grid(grid), nfe)
        rms = self.distance(table, math.inf).rms
        before = after = self.distance(table, self.settings.robust * rms)
        best = table
        seed, is_learned = self.seed + 1, self.settings.steps > 0 and 0 < rms < math.inf
        fitted = iterates(self.model, table, self.pool, self.settings, rms, seed, self.progress)
        for candidate in fitted if is_learned else ():
            distance = self.distance(candidate, self.settings.robust * rms)
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
    """Learn the coefficients and times of a sampler with `nfe` evaluations (S4S, 2502.17423; LD3, 2405.15506).

    From starts x_T of the prior, the samples Phi(x_T) of the learned solver approach the samples Psi(x_T) of an
    accurate solve of the probability flow: with q = |Phi(x_T) - Psi(x_T)|^2 / d for d dimensions, learning minimises
    E[c (c^2 + q)^(1/2) - c^2], about q/2 for small q. The result is the table with the smallest loss on held-out
    starts, among the initial formula and tables from the course of the fit.

        sampler = ss.samplers.learn(model, nfe=5)
        sampler.table.save("solver.safetensors")

    Args:
        model: in eval mode, of any kind (guided, conditional); it is not changed.
        nfe: evaluations of the model for each sample.
        shape: the shape `*` of a state, without B; default: that which the network declares as `shape`.
        cond: conditions (M, *) that the starts take in turn; None without.
        settings: numbers of starts and steps, learning rate, ..., see `Learning`.
        start, grid: the formula that learning begins with, such as `DPMSolverPP(2)`, and its grid (default: the
            method's own); without a start, the best of `FORMULAS` on `FORMULA_GRIDS`.
        seed: the seed of all random draws.
        progress: show progress bars.

    Returns:
        A sampler; `table.notes` has the distances to the flow on the held-out starts, before and after.

    Raises:
        ValueError: nfe is not an integer >= 1 (2 with `denoise_final`), the shape is unknown, there is a grid without a
            start, or `start` draws noise or has several evaluations a step.
        RuntimeError: the model gives samples, or a loss, that are not finite.
    """
    check_nfe(nfe, settings or Learning())
    check_start(start, grid)
    return Learner(model, shape, cond, settings, seed, progress).learn(nfe, start, grid)


def check_nfe(nfe: int, settings: Learning) -> None:
    """Raise ValueError unless a solver can have `nfe` evaluations."""
    least = 2 if settings.denoise_final else 1
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < least:
        reason = " (denoise_final takes one of them)" if least == 2 else ""
        raise ValueError(f"nfe must be an integer >= {least}{reason}; got {nfe!r}")


def check_start(start: Linear | None, grid: str | Grid | None) -> None:
    """Raise ValueError for a grid without a formula, which would not be used."""
    if start is None and grid is not None:
        raise ValueError(f"grid must come with start, the formula to begin with; got grid={grid!r}: give start=DDIM()")


def _declared_shape(model: Any) -> Sequence[int]:
    """Return the `shape` of a model's network; raise ValueError if there is none."""
    shape = getattr(getattr(model, "network", None), "shape", None)
    if shape is None:
        raise ValueError("shape must be given, as the network declares no shape; got None: give one, e.g. (1, 8, 8)")
    return shape


def repeated(cond: Condition, count: int) -> Condition:
    """Return conditions (count, *) that repeat the given ones (M, *) in turn."""
    if cond is None:
        return None
    parts = cond if isinstance(cond, dict) else {"": cond}
    taken = {name: part[torch.arange(count) % len(part)] for name, part in parts.items()}
    return expand(taken if isinstance(cond, dict) else taken[""], count)
