"""Multilevel bits per dimension: calibration of the stated error, and seconds to a stated error beside other projects.

    python benchmarks/multilevel.py --checkpoint digits_vp.pth --table table.npz --calibrate
    python benchmarks/multilevel.py --checkpoint digits_vp.pth --table table.npz --seconds
    python benchmarks/multilevel.py --oracle --table oracle.npz --calibrate
    python benchmarks/multilevel.py --checkpoint digits_vp.pth --table table.npz --learned likelihood_solvers

`--table` computes the values of some test images once: with several dequantisations and kept probes at all levels, and
with several draws of fresh probes at the first level. It stores them in a file, or reads them from it. `--calibrate`
lets the estimator draw from this table through the interface that it has for images, in 200 repetitions, and compares
its errors with those that it states. An item of the table is an image. The means over fresh and over kept probes are
equal in expectation; the fresh values are shifted by the difference of the means in the table, which is printed.

`--seconds` counts the passes through the network of the multilevel estimate at several tolerances, for 297 and for
10,000 images, by drawing from the table: item i has the values of image i modulo the size of the table, each item with
its own dequantisation and probes. Times are these passes times the seconds of one, measured on a solve of some images.
The other projects are measured on a few images, in turn with that solve; their time is linear in the number of images.
Their standard error is that of one kept probe and one dequantisation for each image, from the table; an equal error
takes as many repetitions as the squared ratio of the errors, at least one. Times are seconds of the process on one
core, which depend less on other work on the machine than the time on the clock.

`--learned` counts these passes with first levels of solvers that `learned_solvers.py --likelihood --store` learned, and
beside it with `Adams` on all levels, for which the scale of the data is measured for each batch or, as for a learned
solver, known. The levels for whose numbers of steps the directory has a solver are learned; their values are stored
beside the table.
"""

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peers
import torch
from likelihood import exact_case
from torch import Tensor

import scoresde as ss
from scoresde.build import instantiate
from scoresde.divergence import Trace
from scoresde.multilevel_bits import PROBES, Draws, MultilevelLikelihood, multilevel_likelihood, seeds_of
from scoresde.protocols import Transform
from scoresde.random_stream import RandomStream
from scoresde.solvers import Solver
from scoresde.solvers.learned_adams import table_file
from scoresde.solvers.solver import StepSolver, with_steps
from scoresde.tensors import dimensions

KEPT = ss.Hutchinson(probes=2, resample=False)
TOLERANCES = (3e-3, 1e-3, 3e-4)
COUNTS = (297, 10_000)
LEVELS = (12, 24, 48, 96, 192)
CALIBRATED = (1e-2, 5e-3, 2e-3)  # of the images of the table, which are fewer than 297
REPETITIONS, COUNTED = 200, 10
FRESH = 8  # fresh draws of level 0 for each image and number of probes
DEQUANTISATIONS = 2
PEERS: dict[str, tuple[Callable, float]] = {
    "score_sde's convention, SciPy RK45": (peers.score_sde, 1e-5),
    "k-diffusion, dopri5": (peers.k_diffusion, 1e-4),
    "flow_matching, dopri5": (peers.flow_matching, 1e-5),
}


@dataclass
class Table:
    """Bits per dimension of N images.

    kept: (levels, N, dequantisations, 2 probes). fresh: {m: (N, draws)} of level 0, for m probes. variance: {m: mean
    squared standard error that the trace states for `fresh`}. steps: the numbers of steps.
    """

    kept: Tensor
    fresh: dict[int, Tensor]
    variance: dict[int, float]
    steps: tuple[int, ...]

    def draw(self, solver: Solver, trace: Trace, items: Tensor, repeats: Tensor, repetition: int = 0) -> Draws:
        """Return values from the table as `multilevel_bits.Draw`: a random entry for each draw and repetition."""
        seeds = range(repetition * 10**9, (repetition + 1) * 10**9)
        words = RandomStream(seeds=seeds_of(seeds, items, repeats))
        column = words.uniform(torch.zeros(len(items), 2, dtype=torch.float64))
        first, second = (column[:, 0] * self.kept.shape[2]).long(), (column[:, 1] * 2).long()
        level, m = self.steps.index(solver.steps), trace.probes
        steps = torch.full((len(items),), solver.steps + 1)
        nfe = steps + (6 if solver.data_scale is None else 2)  # two for the check of the derivative, four for the scale
        items = items % self.kept.shape[1]
        if not trace.resample:
            return Draws(self.kept[level, items, first, second], None, nfe, steps + 2)
        own = self.fresh[m] - self.fresh[m].mean() + self.kept[0].mean()
        value, stated = own[items, (column[:, 0] * own.shape[1]).long()], math.sqrt(self.variance[m])
        return Draws(value, torch.full((len(items),), stated), nfe, steps * m + 2)

    @property
    def truth(self) -> float:
        """The mean that the estimates converge to."""
        return float(self.kept[-1].mean())

    @property
    def one_probe(self) -> float:
        """Standard deviation of the value of an image over a kept probe and a dequantisation."""
        dequantisations = self.kept[-1].mean(dim=2)
        probes = self.kept[-1].var(dim=2).mean()  # within a dequantisation
        between = (dequantisations.var(dim=1).mean() - probes / 2).clamp(min=0)
        return float((probes + between).sqrt())

    def begun_by(self, first: "Table") -> "Table":
        """Return the table with the levels of another one before its own levels with more steps."""
        later = [i for i, steps in enumerate(self.steps) if steps > first.steps[-1]]
        steps = (*first.steps, *(self.steps[i] for i in later))
        return Table(torch.cat([first.kept, self.kept[later]]), first.fresh, first.variance, steps)

    def store(self, path: Path) -> None:
        """Write the table."""
        fresh = {f"fresh{m}": values.numpy() for m, values in self.fresh.items()}
        stated = {f"variance{m}": value for m, value in self.variance.items()}
        np.savez(path, kept=self.kept.numpy(), steps=self.steps, **fresh, **stated)

    @classmethod
    def read(cls, path: Path) -> "Table":
        """Read a table."""
        with np.load(path) as file:
            numbers = [int(name[5:]) for name in file.files if name.startswith("fresh")]
            fresh = {m: torch.from_numpy(file[f"fresh{m}"]) for m in numbers}
            stated = {m: float(file[f"variance{m}"]) for m in numbers}
            return cls(torch.from_numpy(file["kept"]), fresh, stated, tuple(file["steps"].tolist()))


class Case(NamedTuple):
    """A model, the transform of its data, and images of grey levels (N, *)."""

    model: ss.ScoreModel
    transform: Transform
    images: Tensor


def compute(case: Case, steps: Sequence[int], draws: int = FRESH, solver: StepSolver | None = None) -> Table:
    """Compute the table of the images of a case with a number of fresh draws, by default with `Adams`."""
    solvers = [with_steps(solver or ss.solvers.Adams(), n) for n in steps]
    model, transform, images = case
    count, unit = len(images), dimensions(images) * math.log(2)

    def values(seed: int, trace: Trace, solver: Solver) -> tuple[Tensor, Tensor]:
        """Return the values of each probe (N, m), and their standard error; `seed` determines the dequantisation."""
        stream = RandomStream(seeds=range(seed * count, (seed + 1) * count))
        x, nats = ss.DataMap(transform, ss.Uniform()).draw(images.double(), stream, model.sde)
        seeds = range(10**6 + seed * count, 10**6 + (seed + 1) * count)
        found = ss.log_prob(model, x, trace=trace, solver=solver, seeds=seeds)
        stated = torch.zeros(count) if found.stderr is None else found.stderr / unit
        return -(found.per_probe + nats[:, None]) / unit, stated

    fresh, variance = {}, {}
    for m in PROBES:
        drawn = [values(1000 * m + k, ss.Hutchinson(m), solvers[0]) for k in range(draws)]
        fresh[m] = torch.stack([value.mean(dim=1) for value, _ in drawn], dim=1)
        variance[m] = float(torch.stack([stated for _, stated in drawn]).square().mean())
        print(f"fresh, m={m}", flush=True)
    kept = []
    for one in solvers:
        kept.append(torch.stack([values(k, KEPT, one)[0] for k in range(DEQUANTISATIONS)], dim=1))
        print(f"kept, {one}", flush=True)
    return Table(torch.stack(kept), fresh, variance, tuple(steps))


def load(path: str | None, count: int) -> Case:
    """Return a checkpoint and `count` of its test images, or an exact mixture and levels of its samples."""
    if path is None:
        mixture, transform = exact_case(count), ss.data.Levels(64, -4.0, 4.0)
        return Case(mixture.model, transform, transform.inverse(mixture.x).floor().clamp(0, 63))
    run = ss.convert.score_sde(path)
    data = instantiate(run.config.data.test)
    return Case(run.model, run.transform, torch.stack([data[i] for i in range(count)]))


def computed(path: Path, *arguments: Any) -> Table:
    """Return the table in a file; compute it from the arguments of `compute` and store it if there is none."""
    if not path.is_file():
        compute(*arguments).store(path)
    return Table.read(path)


def repeated(
    table: Table, count: int, tolerance: float, repetitions: int, solver: StepSolver | None = None
) -> list[MultilevelLikelihood]:
    """Return independent multilevel estimates of `count` items from the table, by default with `Adams`."""
    found = []
    for repetition in range(repetitions):
        draw = partial(table.draw, repetition=repetition)
        with warnings.catch_warnings(action="ignore"):
            used = solver or ss.solvers.Adams()
            found.append(multilevel_likelihood(draw, count, tolerance, used, table.steps, seed=repetition))
    return found


def passes_per_image(found: Sequence[MultilevelLikelihood], count: int) -> Tensor:
    """Return the passes through the network of each estimate, forward and backward, divided by the images."""
    return torch.tensor([float((one.nfe + one.backward).sum()) for one in found]).double() / count


def calibrate(table: Table) -> None:
    """Print the mean square of (estimate - truth) / stated error for each tolerance, with a 95% bootstrap interval."""
    kept, fresh = float(table.kept[0].mean()), float(table.fresh[1].mean())
    print(f"{table.kept.shape[1]} images; mean of level 0 with kept probes {kept:.4f}, with fresh ones {fresh:.4f}\n")
    print("| tolerance | stated error | mean of error / stated | mean square of it | probes | passes per image |")
    print("| --- " * 6 + "|")
    generator, count = torch.Generator().manual_seed(0), table.kept.shape[1]
    for tolerance in CALIBRATED:
        found = repeated(table, count, tolerance, REPETITIONS)
        ratios = torch.tensor([(one.mean - table.truth) / one.error for one in found], dtype=torch.float64)
        again = ratios[torch.randint(len(ratios), (2000, len(ratios)), generator=generator)].square().mean(dim=1)
        low, high = again.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        stated = sum(one.error for one in found) / len(found)
        probes = ", ".join(map(str, sorted({one.trace.probes for one in found})))
        passes = float(passes_per_image(found, count).mean())
        print(
            f"| {tolerance:g} | {stated:.1e} | {float(ratios.mean()):+.2f} | {float(ratios.square().mean()):.2f} "
            f"[{low:.2f}, {high:.2f}] | {probes} | {passes:.0f} |",
            flush=True,
        )


def process_seconds(run: Callable[[], Any]) -> float:
    """Return the seconds that the process spends in a call."""
    started = time.process_time()
    run()
    return time.process_time() - started


def measure(case: Case, rounds: int) -> tuple[float, dict[str, float]]:
    """Return the seconds of one pass in a solve of the images, and of each other project for one image: medians."""
    model, transform, images = case
    levels, _ = ss.Uniform().sample(images.double(), RandomStream(seeds=range(len(images))))
    x, probe = transform(levels), ss.Hutchinson().draw(RandomStream(seeds=range(len(images))), levels)[0]
    solver = ss.solvers.Adams(LEVELS[0])
    found = ss.log_prob(model, x, solver=solver)
    passes, times = float((found.nfe + found.backward).sum()), {name: [] for name in ("ours", *PEERS)}
    for _ in range(rounds):
        times["ours"].append(process_seconds(lambda: ss.log_prob(model, x, solver=solver)) / passes)
        for name, (peer, tolerance) in PEERS.items():
            if not peers.missing(peer):
                spent = process_seconds(lambda p=peer, t=tolerance: p(model, x, probe, t))
                times[name].append(spent / len(x))
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    return medians.pop("ours"), medians


def compare(table: Table, one_pass: float, others: dict[str, float], data_scale: float | None) -> None:
    """Print seconds to a stated error for each number of images and each tolerance."""
    print(f"\none pass {1e3 * one_pass:.3f} ms; standard deviation of one kept probe and dequantisation ", end="")
    print(f"{table.one_probe:.4f}\n")
    columns = [f"{name}, once, s (ratio) | error | at equal error, s (ratio)" for name in others]
    print(
        "| images | error | passes per image | s | "
        + " | ".join(columns)
        + " |\n"
        + "| --- " * (4 + 3 * len(others))
        + "|"
    )
    for count in COUNTS:
        for tolerance in TOLERANCES:
            found = repeated(table, count, tolerance, COUNTED, ss.solvers.Adams(data_scale=data_scale))
            passes = passes_per_image(found, count)
            ours, cells = float(passes.mean()) * count * one_pass, []
            for seconds in others.values():
                once, error = seconds * count, table.one_probe / math.sqrt(count)
                equal = once * max((error / tolerance) ** 2, 1)
                cells.append(f"{once:.0f} ({once / ours:.1f}) | {error:.1e} | {equal:.0f} ({equal / ours:.0f})")
            spread = f"{float(passes.mean()):.1f} +- {float(passes.std()):.1f}"
            print(f"| {count} | {tolerance:g} | {spread} | {ours:.1f} | " + " | ".join(cells) + " |", flush=True)


def count_passes(cases: dict[str, tuple[Table, StepSolver]]) -> None:
    """Print the standard deviations of the first differences, and the passes per image at each tolerance."""
    print(
        "| first levels | levels | mean difference (standard deviation) of the first two levels |\n"
        + "| --- " * 3
        + "|"
    )
    for title, (table, _) in cases.items():
        first = (table.kept[1] - table.kept[0]).flatten()
        levels = ", ".join(map(str, table.steps))
        print(f"| {title} | {levels} | {float(first.mean()):+.4f} ({float(first.std()):.4f}) |", flush=True)
    print("\n| images | error | " + " | ".join(cases) + " |\n" + "| --- " * (2 + len(cases)) + "|")
    for count in COUNTS:
        for tolerance in TOLERANCES:
            cells = []
            for table, solver in cases.values():
                passes = passes_per_image(repeated(table, count, tolerance, COUNTED, solver), count)
                cells.append(f"{float(passes.mean()):.1f} +- {float(passes.std() / math.sqrt(COUNTED)):.1f}")
            print(f"| {count} | {tolerance:g} | " + " | ".join(cells) + " |", flush=True)


def with_learned(table: Table, options: argparse.Namespace, case: Case) -> dict[str, tuple[Table, StepSolver]]:
    """Return the tables and solvers to compare: `Adams` alone, and begun by learned solvers."""
    path = options.table
    steps = [steps for steps in table.steps if table_file(options.learned, steps).is_file()]
    learned = ss.solvers.StoredAdams(str(options.learned), steps[0])
    file = path.with_name(f"{path.stem}_{options.learned.name}.npz")
    first = computed(file, case, steps, options.fresh, learned)
    return {
        "Adams, scale measured": (table, ss.solvers.Adams()),
        "Adams, scale known": (table, ss.solvers.Adams(data_scale=learned.data_scale)),
        f"learned, {', '.join(map(str, steps))} steps": (table.begun_by(first), learned),
    }


def main() -> None:
    """Compute or read the table, and print the selected results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", help="checkpoint of score_sde_pytorch")
    model.add_argument("--oracle", action="store_true", help="a mixture of Gaussians with its exact score")
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--table-images", type=int, default=96)
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="numbers of steps")
    parser.add_argument("--fresh", type=int, default=FRESH, help="draws of fresh probes for each image and number m")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--seconds", action="store_true")
    parser.add_argument("--learned", type=Path, help="directory of learned solvers of the likelihood")
    parser.add_argument("--data-scale", type=float, help="the scale S of the data, instead of four evaluations for it")
    parser.add_argument("--few", type=int, default=32, help="images on which all times are measured")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = load(options.checkpoint, options.table_images)
    table = computed(options.table, case, options.levels, options.fresh)
    if options.calibrate:
        calibrate(table)
    if options.learned:
        count_passes(with_learned(table, options, case))
    if options.seconds:
        compare(table, *measure(case._replace(images=case.images[: options.few]), options.rounds), options.data_scale)


if __name__ == "__main__":
    main()
