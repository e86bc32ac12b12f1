"""Posterior samplers compared with the exact posterior of mixtures of Gaussians, and with azula at equal cost.

    pip install --no-deps azula                        # skipped if it is not installed
    python benchmarks/posterior.py --store cells.jsonl --table benchmarks/posterior.csv    # the whole design
    python benchmarks/posterior.py --quick             # 2-D and 16-D, two operators, one noise level, VP

A problem is a mixture of 8 rotated Gaussians in 2, 16 or 64 dimensions, a linear operator, a noise level and an SDE.
Measurements are drawn from the mixture; the posterior of each is known in closed form. A budget counts forward and
backward passes through the network for each sample, and is counted, not assumed. All samplers end at t_min, where sigma
is 0.01. `posterior_errors` has the measures of error.

**Design.** The tables average over problems, so that each problem has few measurements and samples. All problems run at
20 passes, a half of them at 100, and a quarter at 500, in which mixtures, noise levels and SDEs occur equally often.
Where a method has several settings (sampler, grid, scale), the one with the smallest energy
distance on pilot measurements of one operator is used, for each mixture, noise level and SDE: of all settings at 20
passes, of the two best of these at 100, and that of 100 passes at 500. Both libraries are treated alike. "Best of each"
is the method of a library with the smallest energy distance in the same pilot. DDNM, replacement and RePaint run at 20
passes only. --all-problems runs everything at all budgets. The pilot of a single problem is noisy, and a method may
fail for another operator than the pilot's. "One method" is therefore that with the smallest mean energy distance in all
pilots of the row.

Intervals are 95% bootstrap intervals over problems, in pairs for ratios. A run whose samples are not finite counts as
failed, and its problem is left out of the averages of its method; the table gives the number of failures. With --store,
each result is written when it is done; the same command continues after an interruption, and with --only-stored it
prints the tables of the results in the file.
"""

import argparse
import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from posterior_errors import METRICS, energies, measured, sampled, target_of
from posterior_methods import OPERATORS, OURS, PEER, SDES, SHAPES, Method, Problem, methods
from samplers import interval, machine

NOISES, BUDGETS = (0.05, 0.2, 0.8), (20, 100, 500)
PILOT_SAMPLES = 8  # for each measurement of the pilot
FULL, MIDDLE = 20, 100  # up to FULL passes all problems and settings; above MIDDLE the settings of the budget before
HALVINGS = (FULL, MIDDLE)  # above each of these budgets, half of the problems
SHORTLIST = 2  # settings of the budget before that are tried above FULL passes
ONLY_AT_FULL = ("DDNM", "replacement", "RePaint")
LIKE = {"DPS": "DPS", "PiGDM": "PGDM", "MMPS(1)": "MMPS(1)", "MMPS(2)": "MMPS(2)", "MMPS(3)": "MMPS(3)"}


# --- results

known = cache(Problem)


class Store:
    """The results that are done, in a file of JSON lines if a path is given; if `frozen`, no others are made."""

    def __init__(self, path: Path | None, frozen: bool = False):
        self.path, self.frozen, self.results = path, frozen, {}
        if path and path.exists():
            self.results = dict(json.loads(line) for line in path.read_text().splitlines())

    def get(self, key: Sequence[Any], make: Callable[[], Any]) -> Any:
        """Return the result of a key; it is made, and written, if it is not known yet. None if the store is frozen."""
        name = json.dumps(list(key))
        if name not in self.results and not self.frozen:
            self.results[name] = make()
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps([name, self.results[name]]) + "\n")
        return self.results.get(name)


@dataclass(frozen=True)
class Cell:
    """The errors of a method in a problem at a budget: means over measurements, and the pilot's energy distance."""

    problem: Problem
    budget: int
    library: str
    method: str
    setting: str
    pilot: float
    passes: float
    errors: tuple[float, ...]


def in_design(problem: Problem, budget: int, options: argparse.Namespace) -> bool:
    """Return whether a problem is measured at a budget, by the parities of the places of its factors."""
    i, j = options.operators.index(problem.operator_name), options.noises.index(problem.noise)
    k, m = options.sdes.index(problem.sde_name), options.states.index(problem.states)
    parities = zip(HALVINGS, (i + j + k, i // 2 + j + m), strict=True)
    return options.all_problems or not any(budget > above and parity % 2 for above, parity in parities)


def pilot(
    family: Problem, method: Method, budget: int, names: Sequence[str], options: argparse.Namespace
) -> dict[str, float]:
    """Return the mean energy distance of the settings `names` on the pilot measurements of a family.

    Methods whose samples depend on each other have as many samples as later, for a quarter of the measurements.
    """
    count, samples = options.pilot, PILOT_SAMPLES
    if method.one_batch_each:
        count, samples = max(count // 4, 1), options.samples
    target = target_of(family, count, samples, 2000)
    return {
        name: float(energies(sampled(target, method, name, samples, budget, 3000)[0], target).mean()) for name in names
    }


def cells(options: argparse.Namespace, store: Store) -> Iterator[Cell]:
    """Yield the cells of the design, budget by budget."""
    listed, before = methods(), {}
    sizes = options.measurements, options.samples, options.pilot
    for budget, states, noise, sde in product(options.budgets, options.states, options.noises, options.sdes):
        family = known(states, options.pilot_operator, noise, sde)
        for method in listed:
            key = states, noise, sde, method.library, method.name
            if budget > FULL and method.name in ONLY_AT_FULL and not options.all_problems:
                continue
            names = before.get(key, method.settings) if budget > FULL else method.settings
            if budget <= MIDDLE or key not in before:
                names = list(names)[:SHORTLIST] if key in before else list(names)
                tried = store.get(
                    ("pilot", family.operator_name, *key, budget, *sizes, *names),
                    partial(pilot, family, method, budget, names, options),
                )
                if tried is None:
                    continue
                before[key] = dict(sorted(tried.items(), key=lambda item: item[1]))
            setting, energy = next(iter(before[key].items()))
            for operator in options.operators:
                problem = known(states, operator, noise, sde)
                if in_design(problem, budget, options):
                    found = store.get(
                        (states, operator, noise, sde, budget, method.library, method.name, setting, *sizes),
                        partial(errors_of, problem, method, setting, budget, options),
                    )
                    if found is not None:
                        passes, values = found
                        yield Cell(problem, budget, *key[3:], setting, energy, passes, tuple(values))


def errors_of(
    problem: Problem, method: Method, setting: str, budget: int, options: argparse.Namespace
) -> tuple[float, list[float]]:
    """Return the passes and the METRICS, means over measurements, of a setting of a method."""
    target = target_of(problem, options.measurements, options.samples, 1000)
    values, passes = measured(target, method, setting, options.samples, budget, 4000)
    return passes, values.mean(axis=0).tolist()


# --- tables


def best(rows: Sequence[Cell], library: str, without: Sequence[str] = ()) -> dict[Problem, Cell]:
    """Return, for each problem, the cell of the method of a library that is best in the pilot."""
    chosen: dict[Problem, Cell] = {}
    for one in rows:
        if one.library == library and one.method not in without:
            other = chosen.get(one.problem)
            if other is None or one.pilot < other.pilot:
                chosen[one.problem] = one
    return chosen


def one_method(rows: Sequence[Cell], library: str) -> dict[Problem, Cell]:
    """Return, for each problem, the cell of the method of a library that is best on average over the pilots."""
    pilots: dict[str, list[float]] = {}
    for one in rows:
        if one.library == library:
            pilots.setdefault(one.method, []).append(one.pilot)
    return named(rows, library, min(pilots, key=lambda name: sum(pilots[name]) / len(pilots[name]))) if pilots else {}


def named(rows: Sequence[Cell], library: str, method: str) -> dict[Problem, Cell]:
    """Return the cell of a method for each problem."""
    return {one.problem: one for one in rows if (one.library, one.method) == (library, method)}


def mean(values: np.ndarray) -> np.ndarray:
    """Return the mean along the last axis."""
    return values.mean(axis=-1)


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the ratio of the means along the last axis."""
    return mean(a) / mean(b)


def stated(statistic: Callable[..., np.ndarray], *values: np.ndarray, digits: int = 4) -> str:
    """Format a statistic of values along the problems, with its interval."""
    low, high = interval(statistic, *values)
    return f"{statistic(*values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def ratios(ours: dict[Problem, Cell], theirs: dict[Problem, Cell]) -> list[str]:
    """Return the ratios of the mean energy distance and of the mean sliced W2, ours / theirs, with intervals."""
    both = [p for p in ours if p in theirs and all(math.isfinite(side[p].errors[0]) for side in (ours, theirs))]
    if len(both) < 2:
        return ["", ""]
    errors = (np.array([side[p].errors for p in both]).T for side in (ours, theirs))
    return [stated(ratio, a, b, digits=2) for a, b in zip(*errors, strict=True)][:2]


def print_ratios(rows: Sequence[Cell], budgets: Sequence[int]) -> None:
    """Print this library beside azula: the best method of each, the same without the particles, and by method."""
    head = [f"{name}, {budget} passes" for name in ("energy distance", "sliced W2") for budget in budgets]
    print(f"\n| problems | method | {' | '.join(head)} |\n" + "| --- " * (2 + len(head)) + "|")
    for states in (*dict.fromkeys(one.problem.states for one in rows), "all"):
        here = [[c for c in rows if c.budget == budget and states in (c.problem.states, "all")] for budget in budgets]
        sides = {
            "one method": [(one_method(part, OURS), one_method(part, PEER)) for part in here],
            "best of each": [(best(part, OURS), best(part, PEER)) for part in here],
            "without particles": [(best(part, OURS, ("particles",)), best(part, PEER)) for part in here],
        }
        for name, other in LIKE.items() if states == "all" else ():
            sides[name] = [(named(part, OURS, name), named(part, PEER, other)) for part in here]
        for name, pairs in sides.items():
            columns = zip(*(ratios(*pair) for pair in pairs), strict=True)
            print(f"| {states} | {name} | {' | '.join(' | '.join(column) for column in columns)} |")


def print_errors(rows: Sequence[Cell], budgets: Sequence[int]) -> None:
    """Print the errors of every method, means over the problems of each budget."""
    head = " | ".join(f"energy distance, {budget} passes" for budget in budgets)
    print(f"\n| library | method | {head} | weights | coverage | failed |\n" + "| --- " * (5 + len(budgets)) + "|")
    for library, method in dict.fromkeys((one.library, one.method) for one in rows):
        energies, weights, coverages, failed = [], [], [], []
        for budget in budgets:
            here = [c.errors for c in rows if (c.library, c.method, c.budget) == (library, method, budget)]
            finite = np.array([values for values in here if math.isfinite(values[0])]).reshape(-1, len(METRICS)).T
            energies.append(stated(mean, finite[0], digits=3) if finite.size else "")
            weights.append(f"{mean(finite[2]):.3f}" if finite.size else "-")
            coverages.append(f"{mean(finite[3]):.2f}" if finite.size else "-")
            failed.append(f"{len(here) - finite.shape[1]} of {len(here)}")
        rest = " | ".join(", ".join(column) for column in (weights, coverages, failed))
        print(f"| {library} | {method} | {' | '.join(energies)} | {rest} |")


def write_table(rows: Sequence[Cell], path: Path) -> None:
    """Write all cells as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["states", "operator", "noise", "sde", "budget", "library", "method", "setting", "passes", *METRICS]
        )
        for one in rows:
            problem = one.problem
            which = [problem.states, problem.operator_name, problem.noise, problem.sde_name, one.budget]
            values = [f"{one.passes:g}", *(f"{value:.4f}" for value in one.errors)]
            writer.writerow([*which, one.library, one.method, one.setting, *values])


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2-D and 16-D, two operators, one noise level, VP")
    parser.add_argument("--states", nargs="*", default=tuple(SHAPES), choices=SHAPES)
    parser.add_argument("--operators", nargs="*", default=OPERATORS, choices=OPERATORS)
    parser.add_argument("--noises", nargs="*", type=float, default=NOISES)
    parser.add_argument("--sdes", nargs="*", default=tuple(SDES), choices=SDES)
    parser.add_argument("--budgets", nargs="*", type=int, default=BUDGETS)
    parser.add_argument("--measurements", type=int, default=2, help="measurements of each problem")
    parser.add_argument("--samples", type=int, default=64, help="samples for each measurement")
    parser.add_argument("--pilot", type=int, default=16, help="measurements to choose the settings on")
    parser.add_argument("--pilot-operator", default="random", choices=OPERATORS, help="operator of these measurements")
    parser.add_argument("--all-problems", action="store_true", help="all problems and methods at every budget")
    parser.add_argument("--store", type=Path, help="JSON lines of the results; those in it are not run again")
    parser.add_argument("--only-stored", action="store_true", help="print the tables of the stored results")
    parser.add_argument("--table", type=Path, help="CSV of all results")
    options = parser.parse_args()
    if options.quick:
        options.states, options.operators, options.noises, options.sdes = (
            ("2-D", "16-D"),
            OPERATORS[:2],
            (0.2,),
            ("VP",),
        )
        options.budgets, options.all_problems = (20, 100), True
    return options


def main() -> None:
    """Print the tables."""
    options = arguments()
    torch.set_num_threads(1)
    print(machine("cpu"))
    rows = list(cells(options, Store(options.store, options.only_stored)))
    budgets = list(dict.fromkeys(one.budget for one in rows))
    if any(one.library == PEER for one in rows):
        print_ratios(rows, budgets)
    print_errors(rows, budgets)
    if options.table:
        write_table(rows, options.table)


if __name__ == "__main__":
    main()
