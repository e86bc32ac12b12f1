"""Posterior samplers compared with the exact posterior of mixtures of Gaussians, and with azula at equal cost.

    pip install --no-deps azula                        # skipped if it is not installed
    python benchmarks/posterior.py --quick             # 2-D and 16-D, two operators, one noise level, VP
    python benchmarks/posterior.py --store cells.jsonl # everything; the same command continues after an interruption
    python benchmarks/posterior.py --evidence          # the particle sampler's log evidence and weights

A problem is a mixture of 8 rotated Gaussians in 2, 16 or 64 dimensions, a linear operator, a noise level and an SDE.
Measurements are drawn from the mixture; the posterior of each is known in closed form. A budget counts forward and
backward passes through the network for each sample, and is counted, not assumed. All samplers end at t_min, where sigma
is 0.01. Where a method has several settings (sampler, grid, scale), the one with the smallest energy distance on other
measurements is used, for each problem and budget; both libraries are treated alike.

For each measurement:

- energy distance (unbiased, 0 for exact draws) and sliced 2-Wasserstein distance to exact draws;
- error of weights: the largest error of the mean component probability p(k | x) over samples;
- coverage: the exact probability of the interval between the 5% and the 95% quantile of the samples, mean over entries.

Tables have means over measurements and problems with 95% bootstrap intervals over measurements; "exact draws" are the
values of as many exact samples. Cells are (problem, budget, method): with --store each is written when it is done.
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from posterior_methods import OPERATORS, OURS, PEER, SDES, SHAPES, Draw, Method, Problem, exact, methods
from samplers import interval, machine, seeded
from torch import Tensor

import scoresde as ss
from scoresde.counting import counting
from scoresde.inverse import TwistedParticles
from scoresde.metrics import energy_distance, sliced_wasserstein
from scoresde.samplers import StochasticHeun

NOISES, BUDGETS = (0.05, 0.2, 0.8), (20, 100, 500)
METRICS = ("energy", "sliced", "weights", "coverage")
TRUTHS = 4  # exact draws for each sample
LIKE = {"DPS": "DPS", "PiGDM": "PGDM", "MMPS(1)": "MMPS(1)", "MMPS(2)": "MMPS(2)", "MMPS(3)": "MMPS(3)"}


# --- errors


def errors(x: Tensor, posterior: ss.GaussianMixture, truth: Tensor) -> list[float]:
    """Return the METRICS of samples x (N, *) of a posterior with exact draws `truth`; infinite if x is not finite."""
    if not bool(torch.isfinite(x).all()):
        return [math.inf] * len(METRICS)
    weights = posterior.log_posterior(x).exp().mean(dim=0)
    return [
        float(energy_distance(x, truth)),
        float(sliced_wasserstein(x, truth, 64, generator=seeded(0))),
        float((weights - posterior.log_weights.exp()).abs().max()),
        coverage(x, posterior),
    ]


def coverage(x: Tensor, posterior: ss.GaussianMixture) -> float:
    """Return the exact probability between the 5% and 95% quantiles of the samples, mean over entries of the state."""
    ends = torch.quantile(x.flatten(1), torch.tensor([0.05, 0.95], dtype=x.dtype), dim=0)
    rotation = torch.eye(ends.shape[1], dtype=x.dtype) if posterior.rotation is None else posterior.rotation
    stds = (rotation * posterior.stds[:, None, :]).square().sum(dim=2).sqrt()
    below = torch.special.ndtr((ends[:, None] - posterior.means) / stds)
    return float(torch.einsum("k,qki->qi", posterior.log_weights.exp(), below).diff(dim=0).mean())


def measured(
    problem: Problem, draw: Draw, y: Tensor, count: int, budget: int, seed: int, batches: int = 1
) -> tuple[np.ndarray, float]:
    """Return the METRICS for each measurement, (P, 4), and the passes for each sample; infinite if a method fails.

    batches: number of batches that the method makes, for it counts its passes once for each.
    """
    with counting() as passes, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            x = draw(problem, y, count, budget, seed)
        except (RuntimeError, ValueError) as error:
            print(f"{problem}, {budget} passes: {error}", file=sys.stderr)
            x = torch.full((len(y), 1), math.inf)
    used = (passes.forward + passes.backward) / batches
    if used > budget:
        raise RuntimeError(f"a method must make at most {budget} passes; it made {used:g}")
    truth = exact(problem, y, TRUTHS * count, budget, 10_000 + seed)
    posteriors = [problem.oracle.posterior(problem.operator, one) for one in y]
    rows = [errors(*entry) for entry in zip(x, posteriors, truth, strict=True)]
    return np.array(rows), used


# --- cells


def cell(problem: Problem, method: Method, budget: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the errors of the best setting of a method, chosen on pilot measurements."""
    pilot, y = problem.measurements(options.pilot, 2000), problem.measurements(options.measurements, 1000)
    tried = {}
    few, batches = max(options.samples // 4, 32), (len(pilot), len(y)) if method.one_batch_each else (1, 1)
    for name, draw in method.settings.items():
        tried[name] = float(measured(problem, draw, pilot, few, budget, 3000, batches[0])[0][:, 0].mean())
    setting = min(tried, key=lambda name: tried[name])
    found, passes = measured(problem, method.settings[setting], y, options.samples, budget, 4000, batches[1])
    return {"setting": setting, "pilot": tried[setting], "tried": tried, "passes": passes, "errors": found.tolist()}


class Store:
    """The cells that are done, in a file of JSON lines if a path is given."""

    def __init__(self, path: Path | None):
        self.path, self.cells = path, {}
        if path and path.exists():
            self.cells = dict(json.loads(line) for line in path.read_text().splitlines())

    def get(self, key: Sequence[Any], make: Any) -> dict[str, Any]:
        """Return the cell of a key; it is made, and written, if it is not known yet."""
        name = json.dumps(list(key))
        if name not in self.cells:
            self.cells[name] = make()
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps([name, self.cells[name]]) + "\n")
        return self.cells[name]


Cells = dict[tuple[str, str], list[dict[str, Any]]]
"""(library, method) -> one cell for each problem of a table."""


def tables(options: argparse.Namespace, store: Store) -> Iterator[tuple[str, int, Cells]]:
    """Yield (title, budget, cells) for each mixture, SDE and budget."""
    listed = methods()
    for states, sde, budget in product(options.states, options.sdes, options.budgets):
        problems = [Problem(states, *which, sde) for which in product(options.operators, options.noises)]
        cells: Cells = {}
        for problem, method in product(problems, listed):
            key = (states, problem.operator_name, problem.noise, sde, budget, method.library, method.name)
            key += (options.measurements, options.samples, options.pilot)
            made = store.get(key, lambda p=problem, m=method, b=budget: cell(p, m, b, options))
            cells.setdefault((method.library, method.name), []).append(made)
        yield f"{states}, {sde}", budget, cells


# --- tables


def stacked(cells: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the errors (problems, measurements, 4)."""
    return np.array([one["errors"] for one in cells])


def average(*problems: np.ndarray) -> np.ndarray:
    """Return the mean over problems of the means along the last axis, the measurements."""
    return np.mean([values.mean(axis=-1) for values in problems], axis=0)


def ratio_of_averages(*problems: np.ndarray, count: int) -> np.ndarray:
    """Return the average of the first `count` problems over that of the others."""
    return average(*problems[:count]) / average(*problems[count:])


def stated(values: np.ndarray) -> str:
    """Format the mean of values (problems, measurements) and its interval."""
    low, high = interval(average, *values)
    return f"{average(*values):.4f} [{low:.4f}, {high:.4f}]"


def print_errors(cells: Cells) -> None:
    """Print a row for each method."""
    print("| library | method | setting | passes | energy distance [95%] | sliced W2 [95%] | weights | coverage |")
    print("| --- " * 8 + "|")
    for (library, name), here in cells.items():
        values = stacked(here)
        settings = "; ".join(dict.fromkeys(one["setting"] for one in here))
        passes = max(one["passes"] for one in here)
        distances = " | ".join(stated(values[:, :, index]) for index in (0, 1))
        rest = " | ".join(f"{average(*values[:, :, index]):.3f}" for index in (2, 3))
        print(f"| {library} | {name} | {settings} | {passes:.0f} | {distances} | {rest} |", flush=True)


def best(cells: Cells, library: str) -> list[dict[str, Any]]:
    """Return, for each problem, the cell of the method of a library that is best on the pilot measurements."""
    columns = zip(*(here for (which, _), here in cells.items() if which == library), strict=True)
    return [min(column, key=lambda one: one["pilot"]) for column in columns]


def print_ratios(title: str, budget: int, cells: Cells) -> None:
    """Print this library beside azula: the best method of each, and the same method of both."""
    pairs = {"best of each": (best(cells, OURS), best(cells, PEER))}
    pairs |= {name: (cells[OURS, name], cells[PEER, other]) for name, other in LIKE.items()}
    for name, sides in pairs.items():
        ours, theirs = (stacked(side) for side in sides)
        count, sliced = len(ours), np.concatenate([ours[:, :, 1], theirs[:, :, 1]])
        ratio = partial(ratio_of_averages, count=count)
        low, high = interval(ratio, *sliced)
        difference = stated(ours[:, :, 0] - theirs[:, :, 0])
        print(f"| {title} | {budget} | {name} | {ratio(*sliced):.2f} [{low:.2f}, {high:.2f}] | {difference} |")


# --- evidence


def print_evidence(options: argparse.Namespace) -> None:
    """Print the error of the particle sampler's log evidence over seeds, and that of its weights in one large run."""
    print(
        f"\n{options.seeds} seeds of {options.particles} particles, {options.steps} steps of StochasticHeun; z of the"
    )
    print(
        "mean evidence / exact evidence - 1; log evidence in nats; weights of one run of", options.many, "particles\n"
    )
    print("| problem | exact | mean error | z | spread / stated error | within 2 stated | weights |")
    print("| --- " * 7 + "|")
    for states, name, noise, sde in product(options.states, options.operators, options.noises, options.sdes):
        problem = Problem(states, name, noise, sde)
        y = problem.measurements(1, 1000)[0]
        truth, posterior = (
            problem.oracle.log_evidence(problem.operator, y),
            problem.oracle.posterior(problem.operator, y),
        )
        sampler = TwistedParticles(StochasticHeun(), options.steps, data_covariance=problem.oracle.covariance())
        counts = [(options.particles, seed) for seed in range(options.seeds)] + [(options.many, options.seeds)]
        *runs, large = (
            sampler(problem.model, problem.operator, y, (count, *SHAPES[states]), seed=seed, dtype=torch.float64)
            for count, seed in counts
        )
        off = np.array([run.log_evidence - float(truth) for run in runs])
        stds = np.array([run.stderr for run in runs])
        ratios = np.exp(off) - 1
        weights = (large.weights @ posterior.log_posterior(large.x).exp() - posterior.log_weights.exp()).abs().max()
        z = ratios.mean() / (ratios.std(ddof=1) / math.sqrt(len(ratios)))
        calibration = off.std(ddof=1) / math.sqrt(np.square(stds).mean())
        within = np.mean(np.abs(off) <= 2 * stds)
        cells = f"{off.mean():+.4f} | {z:+.1f} | {calibration:.2f} | {within:.0%} | {float(weights):.4f}"
        print(f"| {states}, {name}, noise {noise:g}, {sde} | {float(truth):.3f} | {cells} |", flush=True)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2-D and 16-D, two operators, one noise level, VP")
    parser.add_argument("--evidence", action="store_true", help="the particle sampler's evidence and weights only")
    parser.add_argument("--states", nargs="*", default=tuple(SHAPES), choices=SHAPES)
    parser.add_argument("--operators", nargs="*", default=OPERATORS, choices=OPERATORS)
    parser.add_argument("--noises", nargs="*", type=float, default=NOISES)
    parser.add_argument("--sdes", nargs="*", default=tuple(SDES), choices=SDES)
    parser.add_argument("--budgets", nargs="*", type=int, default=BUDGETS)
    parser.add_argument("--measurements", type=int, default=32, help="measurements of each problem")
    parser.add_argument("--pilot", type=int, default=16, help="measurements to choose the settings on")
    parser.add_argument(
        "--samples", type=int, default=512, help="samples for each measurement, a quarter for the pilot"
    )
    parser.add_argument("--seeds", type=int, default=100, help="runs of the particle sampler for the evidence")
    parser.add_argument("--particles", type=int, default=128, help="particles of each of these runs")
    parser.add_argument("--many", type=int, default=4096, help="particles for the weights")
    parser.add_argument("--steps", type=int, default=100, help="steps of these runs")
    parser.add_argument("--store", type=Path, help="JSON lines of the cells; those in it are not run again")
    options = parser.parse_args()
    if options.quick:
        options.states, options.operators, options.noises, options.sdes = (
            ("2-D", "16-D"),
            OPERATORS[:2],
            (0.2,),
            ("VP",),
        )
        options.budgets, options.measurements, options.pilot, options.samples = (20, 100), 8, 6, 256
    return options


def main() -> None:
    """Print the tables."""
    options = arguments()
    print(machine("cpu"))
    if options.evidence:
        print_evidence(options)
        return
    compared = []
    for title, budget, cells in tables(options, Store(options.store)):
        print(f"\n### {title}, {budget} passes: means over {', '.join(options.operators)}\n")
        print_errors(cells)
        compared.append((title, budget, cells))
    if any(library == PEER for library, _ in compared[0][2]):
        print(
            "\n| states, SDE | passes | method | sliced W2, ours / azula [95%] | energy distance, ours - azula [95%] |"
        )
        print("| --- " * 5 + "|")
        for title, budget, cells in compared:
            print_ratios(title, budget, cells)


if __name__ == "__main__":
    main()
