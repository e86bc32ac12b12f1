"""Learned solvers: the formula that learning begins with, and solvers of the likelihood.

    python benchmarks/learned_solvers.py --starts 10
    python benchmarks/learned_solvers.py --variants 10
    python benchmarks/learned_solvers.py --likelihood 8 12 16
    python benchmarks/learned_solvers.py --likelihood 8 12 16 --checkpoint digits_vp.pth --fit 192 --test 96

--starts learns a sampler for the mixture of `samplers.py --mixture` from the best formula of each grid, and prints the
distances of formula and solver to the converged flow on other starts, with the number of starts that end in another
mode (a distance above 0.3 per dimension).

--variants learns it from AngularAdams(3, 2) on uniform_angle with other settings, and on the learned times of a solver
with 7 evaluations, interpolated.

--likelihood learns the grid and weights of the likelihood's solver (`ss.learn_adams`), for the same mixture or for a
checkpoint of score_sde_pytorch trained on the digits. It prints the errors of log p in bits per dimension on other
data, beside those of `Adams` with as many steps: root mean square with a 95% bootstrap interval, mean, and median of
the absolute value, over the data for which both solve the flow. Truth is `Adams` with --reference steps and the same
kept probe.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import samplers
import torch
from torch import Tensor

import scoresde as ss
from scoresde.adams_learning import AdamsLearner
from scoresde.samplers import AngularAdams
from scoresde.samplers.grids import GRIDS, Grid
from scoresde.samplers.learned_solver import LearnedSolver, SolverTable
from scoresde.samplers.learning import FORMULA_GRIDS, FORMULAS, Learner
from scoresde.samplers.linear import Linear
from scoresde.samplers.solver_fit import Learning, Parameters
from scoresde.solvers.learned_adams import table_file
from scoresde.tensors import dimensions

FLIPPED, SEED = 0.3, 7
Data = Callable[[str, int], Tensor]  # (split, count) -> states


VARIANTS: dict[str, dict[str, float]] = {
    "as it is": {},
    "pool=2048": {"pool": 2048},
    "pool=32768": {"pool": 32768},
    "steps=400": {"steps": 400},
    "rate=0.01": {"rate": 0.01},
    "rate=0.1": {"rate": 0.1},
    "robust=inf": {"robust": math.inf},
    "radius=0.01": {"radius": 0.01},
    "on the times of 7 evaluations": {},
}


class Samplers:
    """Learns samplers for the mixture of `samplers.exact_case`, and measures them on other starts."""

    def __init__(self, options: argparse.Namespace):
        self.case = samplers.exact_case((1, 4, 4))
        self.x = self.case.start(options.test, 1)
        self.truth = samplers.converged(self.case.model, self.x, options.reference)

    def learner(self, **settings: Any) -> Learner:
        """Return a learner with other settings."""
        given = {"steps": 150, "batch_size": 128, "pool": 8192, "held_out": 1024, **settings}
        return Learner(self.case.model, (1, 4, 4), settings=Learning(denoise_final=True, **given), seed=SEED)

    def errors(self, table: SolverTable) -> np.ndarray:
        """Return the distance of each sample to the converged flow."""
        return samplers.distance(LearnedSolver(table)(self.case.model, x_T=self.x).x, self.truth).numpy()

    def print(self, title: str, learner: Learner, nfe: int, start: Linear, grid: Grid) -> SolverTable:
        """Learn from a formula, print a row, and return the table."""
        began = time.perf_counter()
        table = learner.learn(nfe, start, grid).table
        took, formula = time.perf_counter() - began, self.errors(learner.table(start, grid, nfe))
        found = self.errors(table)
        low, high = samplers.interval(samplers.rms, found)
        cells = f"{samplers.rms(formula):.4f} | {(formula > FLIPPED).sum()} | {samplers.rms(found):.4f} "
        cells += f"[{low:.4f}, {high:.4f}] | {np.median(found):.4f} | {(found > FLIPPED).sum()} | {took:.0f}"
        print(f"| {nfe} | {title} | {cells} |", flush=True)
        return table


HEAD = (
    "| evaluations | {} | formula, rms | other mode | learned, rms [95%] | median | other mode | s |\n" + "| --- " * 8
)


def starts(options: argparse.Namespace) -> None:
    """Print the solvers learned from the best formula of each grid."""
    trial = Samplers(options)
    learner = trial.learner()
    print(HEAD.format("begins with") + "|")
    for nfe in options.starts:
        for grid in FORMULA_GRIDS:
            tables = {name: learner.table(method(), GRIDS[grid], nfe) for name, method in FORMULAS.items()}
            name = min(tables, key=lambda name: learner.distance(tables[name], math.inf, learner.pool).rms)
            trial.print(f"{name}, {grid}", learner, nfe, FORMULAS[name](), GRIDS[grid])


def variants(options: argparse.Namespace) -> None:
    """Print the solvers learned with other settings."""
    trial = Samplers(options)
    print(HEAD.format("settings") + "|")
    for nfe in options.variants:
        for title, settings in VARIANTS.items():
            learner, grid = trial.learner(**settings), GRIDS["uniform_angle"]
            if "times" in title:
                grid = refined(learner.learn(7, AngularAdams(), grid).table)
            trial.print(title, learner, nfe, AngularAdams(), grid)


def refined(table: SolverTable) -> Grid:
    """Return the grid whose times interpolate those of a table."""

    def grid(sde: ss.SDE, steps: int) -> Tensor:
        u = Parameters(table, sde)
        places = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, table.nfe), u.u.numpy())
        times = u.times[(torch.as_tensor(places) * (len(u.times) - 1)).round().long()]
        return torch.cat([times.new_tensor([sde.t_max]), times[1:-1], times.new_tensor([sde.t_min])])

    return grid


def digits(checkpoint: str) -> tuple[ss.ScoreModel, Data]:
    """Return a checkpoint that was trained on the digits, and its data, dequantised uniformly."""
    run = ss.convert.score_sde(checkpoint)

    def data(split: str, count: int) -> Tensor:
        levels = ss.data.Digits(split).images.double()[:count]
        return ss.data.Levels(17)(levels + torch.rand(levels.shape, generator=samplers.seeded(SEED)).double())

    return run.model.eval(), data


def mixture() -> tuple[ss.ScoreModel, Data]:
    """Return the mixture of `samplers.exact_case` over 16 dimensions, under VP down to its default t_min, and draws."""
    oracle = samplers.exact_mixture((1, 4, 4))
    return oracle.score_model(ss.VP()), lambda split, count: oracle.sample(
        count, generator=samplers.seeded({"fit": 1, "test": 2}[split])
    )


def likelihood(options: argparse.Namespace) -> None:
    """Print the errors of learned solvers of the likelihood and of `Adams` on test data."""
    model, data = digits(options.checkpoint) if options.checkpoint else mixture()
    x, settings = data("test", options.test), ss.AdamsLearning(iterations=options.iterations, modes=options.modes)
    began = time.perf_counter()
    learner = AdamsLearner(model, data("fit", options.fit), settings=settings)
    print(f"{len(learner.x)} data to learn from, accurate values in {time.perf_counter() - began:.0f} s\n", flush=True)

    def values(solver: ss.solvers.Solver) -> np.ndarray:
        seeds, unit = range(10**6, 10**6 + len(x)), dimensions(x) * math.log(2)
        parts = zip(x.split(256), torch.arange(len(x)).split(256), strict=True)
        trace = ss.Hutchinson(resample=False)
        found = [ss.log_prob(model, a, trace=trace, solver=solver, seeds=[seeds[i] for i in b]).value for a, b in parts]
        return torch.cat(found).numpy() / unit

    formula = ss.solvers.Adams(data_scale=learner.data_scale)
    truth = values(replace(formula, steps=options.reference))
    print(
        "| steps | solver | failed | rms error [95%] | mean | median | ratio of rms [95%] | s |\n" + "| --- " * 8 + "|"
    )
    for steps in options.likelihood:
        began = time.perf_counter()
        learned = learner.learn(steps)
        took = time.perf_counter() - began
        if options.store:
            learned.table.save(table_file(options.store, steps))
        pairs = {"Adams": values(replace(formula, steps=steps)) - truth, "learned": values(learned) - truth}
        solved = np.isfinite(pairs["Adams"]) & np.isfinite(pairs["learned"])
        mine, theirs = (pairs[name][solved] for name in ("learned", "Adams"))
        low, high = samplers.interval(lambda a, b: samplers.rms(a) / samplers.rms(b), mine, theirs)
        ratio = f"{samplers.rms(mine) / samplers.rms(theirs):.2f} [{low:.2f}, {high:.2f}]"
        for name, last in (("Adams", "1 |"), ("learned", f"{ratio} | {took:.0f}")):
            errors, failed = pairs[name][solved], (~np.isfinite(pairs[name])).sum()
            low, high = samplers.interval(samplers.rms, errors)
            cells = f"{failed} | {samplers.rms(errors):.4f} [{low:.4f}, {high:.4f}] | {errors.mean():+.4f}"
            print(f"| {steps} | {name} | {cells} | {np.median(abs(errors)):.4f} | {last} |", flush=True)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--starts", type=int, nargs="+", help="numbers of evaluations of a sampler")
    what.add_argument("--variants", type=int, nargs="+", help="numbers of evaluations of a sampler")
    what.add_argument("--likelihood", type=int, nargs="+", help="numbers of steps of a likelihood's solver")
    parser.add_argument("--checkpoint", help="VP checkpoint of score_sde_pytorch, trained on the digits")
    parser.add_argument("--store", type=Path, help="directory for the learned solvers of the likelihood")
    parser.add_argument("--fit", type=int, default=768, help="data to learn from and to hold out")
    parser.add_argument("--test", type=int, default=4096, help="starts, or data, for the errors")
    parser.add_argument("--reference", type=int, default=160, help="steps of the converged flow")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--modes", type=int, default=6)
    return parser.parse_args()


def main() -> None:
    """Print the selected tables."""
    options = arguments()
    print(samplers.machine("cpu") + "\n")
    chosen = starts if options.starts else variants if options.variants else likelihood
    chosen(options)


if __name__ == "__main__":
    main()
