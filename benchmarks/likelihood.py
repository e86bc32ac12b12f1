"""Compare the log-likelihoods of this library, score_sde's convention, k-diffusion and flow_matching on one model.

    pip install --no-deps k-diffusion flow_matching        # packages that are not installed are skipped
    python benchmarks/likelihood.py --checkpoint digits_vp.pth --plot docs/likelihood_benchmark.png
    python benchmarks/likelihood.py --run runs/digits --csv rows.csv
    python benchmarks/likelihood.py --oracle --images 32    # an exact score, with a known density
    python benchmarks/likelihood.py --checkpoint digits_vp.pth --study

All methods compute log p of the same points (test images under one uniform dequantisation, taken as x(t_min)) with the
same network and the same probe for each image, fixed along the whole path. They therefore have the same limit for each
image, and the errors compared are those of the integration. The limit is computed by Adams with many steps, and its
difference from rk4 is printed. The script prints

- each method at several budgets: evaluations of the flow and its divergence, passes through the network (forward and
  backward), the error of the mean and the root mean square error over images, in bits/dim; seconds (median of runs in
  random order, after one run of each), also relative to score_sde at its default tolerance; peak memory in excess of
  the model, in a separate process (measured at the smallest budget, on which it does not depend);
- the seconds in which each method reaches a given accuracy: for this library at the smallest budget from which on all
  larger ones reach it, for the others interpolated between measured budgets (linear in the logarithms);
- the standard deviation per image over random probes, for a fixed probe and for probes drawn anew at every evaluation,
  at equal cost, and the exact trace.

With --study it prints the effect of smoothing in the Adams predictor, and of other ways to draw the probes.
"""

import argparse
import csv
import math
import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import peers
import study
import torch
from clock import seconds
from matplotlib.figure import Figure
from torch import Tensor

import scoresde as ss
from scoresde.build import instantiate
from scoresde.counting import Evaluations, counting
from scoresde.probability_flow import DEFAULT_SOLVER
from scoresde.random_stream import RandomStream
from scoresde.tensors import dimensions

TARGETS = (3e-3, 1.5e-3, 5e-4)  # bits/dim, root mean square
CHECKED = 16  # points at which the reference is compared with rk4
KEPT = ss.Hutchinson(resample=False)


@dataclass(frozen=True)
class Method:
    """A method, its budgets from the smallest to the largest, its default budget, and its style in the plot."""

    name: str
    run: Callable[[ss.ScoreModel, Tensor, Tensor, Any], peers.Outcome]
    budget: str
    budgets: Sequence[Any]
    default: Any
    colour: str
    marker: str


def ours(solver: Callable[[Any], ss.solvers.Solver]) -> Callable[[ss.ScoreModel, Tensor, Tensor, Any], peers.Outcome]:
    """Return `log_prob` with a solver; the fixed probe is the first draw of each seed, see `given_probe`."""

    def run(model: ss.ScoreModel, x: Tensor, probe: Tensor, budget: Any) -> peers.Outcome:
        found = ss.log_prob(model, x, trace=KEPT, solver=solver(budget), seeds=range(len(x)))
        return peers.Outcome(found.value.cpu(), float(found.nfe.double().mean()))

    return run


ADAMS = "scoresde, Adams"
ADAPTIVE = "scoresde, AdaptiveAdams"
SCORE_SDE = "score_sde's convention, SciPy RK45"
STEPS = sorted({16, 20, 24, 28, 32, 35, 40, 48, 64, 96, 128, 160, 256, DEFAULT_SOLVER.steps})
METHODS = [
    Method(ADAMS, ours(ss.solvers.Adams), "steps={}", STEPS, DEFAULT_SOLVER.steps, "#0072B2", "o"),
    Method(ADAPTIVE, ours(ss.solvers.AdaptiveAdams), "rtol={:g}", (1e-2, 3e-3, 1e-3, 3e-4, 1e-4), 1e-3, "#56B4E9", "s"),
    Method(SCORE_SDE, peers.score_sde, "tol={:g}", (1e-3, 1e-4, 1e-5, 1e-6), 1e-5, "#D55E00", "^"),
    Method("k-diffusion, dopri5", peers.k_diffusion, "tol={:g}", (1e-3, 1e-4, 1e-5), 1e-4, "#E69F00", "v"),
    Method("flow_matching, dopri5", peers.flow_matching, "tol={:g}", (1e-3, 1e-4, 1e-5), 1e-5, "#009E73", "D"),
    Method("flow_matching, midpoint", peers.flow_matching_midpoint, "steps={}", (20, 50, 100), 100, "#CC79A7", "P"),
]


@dataclass
class Case:
    """A model, the points x (B, *) to evaluate it at, and the exact density if it is known."""

    title: str
    model: ss.ScoreModel
    x: Tensor
    oracle: ss.GaussianMixture | None = None

    @property
    def unit(self) -> float:
        """The number of nats in one bit/dim."""
        return dimensions(self.x) * math.log(2)


@dataclass
class Row:
    """The measurements of a method at a budget; errors in bits/dim, memory in MiB."""

    method: str
    budget: str
    default: bool
    evaluations: float
    passes: float
    mean_error: float
    rms_error: float
    seconds: list[float] = field(default_factory=list)
    memory: float = math.nan

    @property
    def median(self) -> float:
        """The median seconds."""
        return statistics.median(self.seconds)


class Meter(ss.ModelWrapper):
    """A wrapper that counts forward and backward passes through the network of a model, per image."""

    def __init__(self, model: ss.ScoreModel, images: int):
        super().__init__(model)
        self.images = images
        self.calls: list[tuple[int, Evaluations]] = []  # batch size and passes of each call; backward passes come later

    def predict(self, x: Tensor, t: Tensor | float) -> ss.Views:
        """Return the views of the model, and count the call."""
        with counting() as count:
            views = self.model.predict(x, t)
        self.calls.append((len(x), count))
        return views

    @property
    def passes(self) -> float:
        """The mean number of passes per image."""
        return sum(rows * (count.forward + count.backward) for rows, count in self.calls) / self.images


def load(options: argparse.Namespace) -> Case:
    """Return the model and the points that the options select."""
    torch.manual_seed(0)
    if options.oracle:
        return exact_case(options.images)
    run = ss.load(options.run) if options.run else ss.convert.score_sde(options.checkpoint)
    data = instantiate(run.config.data.test)
    images = torch.stack([data[i] for i in range(min(options.images, len(data)))])
    levels, _ = ss.Uniform().sample(images.double(), RandomStream(seeds=range(len(images))))
    title = f"{Path(options.run or options.checkpoint).stem}, {len(images)} test images {tuple(images.shape[1:])}"
    return Case(title, run.model.to(options.device), run.transform(levels).to(options.device))


def exact_case(images: int, components: int = 3) -> Case:
    """Return a mixture of rotated Gaussians over (1, 8, 8) with its exact score under VP, and samples at t_min."""
    generator = torch.Generator().manual_seed(0)
    shape, size, sde = (components, 1, 8, 8), 64, ss.VP()
    means = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    stds = 0.1 + 0.6 * torch.rand(shape, generator=generator, dtype=torch.float64)
    square = torch.randn(components, size, size, generator=generator, dtype=torch.float64)
    mixture = ss.GaussianMixture(means, stds, rotation=torch.linalg.qr(square).Q)
    x = mixture.sample(images, sde, sde.t_min, generator)
    return Case(f"an exact mixture of Gaussians, {images} samples", mixture.score_model(sde), x, mixture)


def given_probe(x: Tensor) -> Tensor:
    """Return the fixed probe that `log_prob` draws for the seeds 0, 1, 2, ...; the peers use the same."""
    return KEPT.draw(RandomStream(seeds=range(len(x))), x.double())[0]


def reference(case: Case, steps: int) -> Tensor:
    """Return the converged log p of each point with its probe, in nats (B,); print the difference from rk4.

    The networks of score_sde embed the time as cos(999 t). Only steps of less than 1/999 resolve their velocity, hence
    the large number of steps.
    """
    converged = ours(lambda n: ss.solvers.Adams(n, smoothing=0))(case.model, case.x, case.x, steps).value
    few = case.x[:CHECKED]
    check = ours(lambda n: ss.solvers.RungeKutta("rk4", n))(case.model, few, few, steps // 4).value
    mean, rms = errors(check, converged[:CHECKED], case.unit)
    print(
        f"reference: Adams with {steps} evaluations; rk4 with as many differs by {mean:+.1e}, rms {rms:.1e} bits/dim",
        end="",
    )
    print(f" ({len(few)} points)")
    if case.oracle is not None:
        print(f"scoresde with the exact trace is within {from_closed_form(case, 600):.1e} bits/dim of the closed form")
    return converged


def from_closed_form(case: Case, steps: int) -> float:
    """Return the largest error of `log_prob` with the exact trace, over four points, in bits/dim.

    `log_prob` adds the log-density of the prior at t_max, which differs slightly from the mixture's marginal there. The
    log-density of the marginal replaces it here.
    """
    sde, x = case.model.sde, case.x[:4]
    found = ss.log_prob(case.model, x, trace=ss.ExactTrace(), solver=ss.solvers.Adams(steps, smoothing=0))
    value = found.value - sde.prior_log_prob(found.latent) + case.oracle.log_prob(found.latent, sde, sde.t_max)
    return float((value - case.oracle.log_prob(x, sde, sde.t_min)).abs().max()) / case.unit


def errors(value: Tensor, truth: Tensor, unit: float) -> tuple[float, float]:
    """Return the error of the mean and the root mean square error in bits/dim, from values in nats (B,)."""
    error = (truth - value) / unit
    return float(error.mean()), float(error.square().mean().sqrt())


def measured(method: Method, budget: Any, case: Case, probe: Tensor, truth: Tensor) -> Row:
    """Return a row without its times; the errors are NaN if torchdiffeq fails."""
    meter = Meter(case.model, len(case.x))
    try:
        value, evaluations = method.run(meter, case.x, probe, budget)
    except AssertionError as error:
        print(f"{method.name}, {method.budget.format(budget)} failed: {error}", file=sys.stderr)
        value, evaluations = torch.full_like(truth, math.nan), math.nan
    off = errors(value, truth, case.unit)
    return Row(method.name, method.budget.format(budget), budget == method.default, evaluations, meter.passes, *off)


def compare(case: Case, truth: Tensor, options: argparse.Namespace) -> list[Row]:
    """Measure all rows: first errors, then times in random order, then memory."""
    probe, pairs = given_probe(case.x), []
    for method in METHODS:
        if package := peers.missing(method.run):
            print(f"{method.name} skipped: {package} is not installed (pip install --no-deps {package})")
            continue
        for budget in method.budgets:
            pairs.append((measured(method, budget, case, probe, truth), method, budget))
            print(f"measured the error of {method.name}, {pairs[-1][0].budget}", file=sys.stderr, flush=True)
    timed = [pair for pair in pairs if math.isfinite(pair[0].rms_error)] * options.repeats
    for row, method, budget in random.Random(0).sample(timed, len(timed)):
        row.seconds.append(seconds(lambda m=method, b=budget: m.run(case.model, case.x, probe, b), options.device))
    peaks = {name: peak_memory(name, options) for name in dict.fromkeys(row.method for row, *_ in pairs)}
    for row, *_ in pairs:
        row.memory = peaks[row.method]
    return [row for row, *_ in pairs]


def peak_memory(name: str, options: argparse.Namespace) -> float:
    """Return the peak memory in MiB of a process that runs a method at its smallest budget; NaN if it fails."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else math.nan


def measure_peak(name: str, case: Case, device: str) -> None:
    """Print the peak memory in MiB in excess of the model and its points."""
    method, probe = next(method for method in METHODS if method.name == name), given_probe(case.x)
    method.run(case.model, case.x[:1], probe[:1], method.budgets[0])  # warm-up: loads libraries
    before = memory(device, reset=True)
    method.run(case.model, case.x, probe, method.budgets[0])
    print(memory(device) - before)


def memory(device: str, reset: bool = False) -> float:
    """Return the peak memory since the last reset, in MiB."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory in use, see proc(5)
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table of all budgets."""
    base = next(row for row in rows if row.method == SCORE_SDE and row.default).median
    print(
        "\n| method | budget | evaluations | passes | mean error | rms error | seconds | time / score_sde's default |",
        end="",
    )
    print(" peak MiB |\n" + "| --- " * 9 + "|")
    for row in rows:
        cost = f"{row.median:.2f} | {row.median / base:.3f}" if row.seconds else "failed | "
        star = " (default)" if row.default else ""
        print(
            f"| {row.method} | {row.budget}{star} | {row.evaluations:.1f} | {row.passes:.1f} | {row.mean_error:+.1e} | "
            f"{row.rms_error:.1e} | {cost} | {row.memory:.0f} |"
        )


def cheapest(rows: Sequence[Row], target: float) -> Row | None:
    """Return the row of the smallest budget from which on all larger budgets reach the target; None without one."""
    found = None
    for row in reversed(rows):
        if not row.rms_error <= target:
            break
        found = row
    return found


def interpolated(rows: Sequence[Row], target: float) -> tuple[str, float]:
    """Return a sign and the seconds in which a method reaches an rms error of `target`.

    The seconds are interpolated, linearly in the logarithms, between the rows that are more accurate than every faster
    row, and the sign is "". If the fastest row already reaches the target, the sign is "<" and the seconds are those of
    this row. If no row reaches it, the sign is ">" and the seconds are those of the most accurate row.
    """
    best: list[Row] = []
    for row in sorted((row for row in rows if row.seconds), key=lambda row: row.median):
        if not best or row.rms_error < best[-1].rms_error:
            best.append(row)
    if target >= best[0].rms_error:
        return "<", best[0].median
    if target < best[-1].rms_error:
        return ">", best[-1].median
    x = [-math.log(row.rms_error) for row in best]
    return "", math.exp(np.interp(-math.log(target), x, [math.log(row.median) for row in best]))


def print_summary(rows: Sequence[Row]) -> None:
    """Print times at equal accuracy: each solver of this library against all peers, and against score_sde's default."""
    tables = {name: list(group) for name, group in groupby(rows, key=lambda row: row.method)}
    others = [name for name in tables if name not in (ADAMS, ADAPTIVE)]
    base = next(row for row in rows if row.method == SCORE_SDE and row.default)
    print(f"\n| rms, bits/dim | ours | s | {' | '.join(f'{name}, s (ratio)' for name in others)} |", end="")
    print(f" ratio to score_sde at {base.budget} |\n" + "| --- " * (len(others) + 4) + "|")
    for target in TARGETS:
        for name in (ADAMS, ADAPTIVE):
            row = cheapest(tables[name], target)
            if row is None:
                print(f"| {target:g} | {name}: not reached |" + " |" * (len(others) + 2))
                continue
            cells = []
            for other in others:
                sign, cost = interpolated(tables[other], target)
                cells.append(f"{sign}{cost:.2f} ({sign}{cost / row.median:.1f})")
            ratio = base.median / row.median
            print(f"| {target:g} | {name}, {row.budget} | {row.median:.2f} | {' | '.join(cells)} | {ratio:.1f} |")


def print_spread(case: Case, seeds: int, images: int) -> None:
    """Print the spread over random probes: one fixed probe against fresh ones."""
    x, device = case.x[:images], case.x.device.type
    exact = ss.log_prob(case.model, x, trace=ss.ExactTrace()).value.cpu() / case.unit
    many = x.repeat_interleave(seeds, dim=0)
    print(f"\n{len(x)} images, {seeds} probes each, the default solver\n")
    print(
        "| one probe | standard deviation per image | as `stderr` states it | mean less that of the exact trace | s |"
    )
    print("| --- " * 5 + "|")
    values = {}
    for name, trace in (("kept", KEPT), ("fresh", ss.Hutchinson())):
        parts: list[ss.LogProb] = []
        cost = seconds(lambda t=trace, p=parts: p.extend(in_batches(case.model, many, t)), device)
        values[name] = torch.cat([part.value for part in parts]).reshape(len(x), seeds).cpu() / case.unit
        stated = [part.stderr.square() for part in parts if part.stderr is not None]
        rms = f"{float(torch.cat(stated).mean().sqrt()) / case.unit:.4f}" if stated else "unknown"
        spread = float(values[name].var(dim=1).mean().sqrt())
        off = float((values[name].mean(dim=1) - exact).mean())
        error = spread / math.sqrt(values[name].numel())
        print(f"| {name} | {spread:.4f} | {rms} | {off:+.4f} +- {error:.4f} | {cost:.1f} |")
    cost = seconds(lambda: ss.log_prob(case.model, x, trace=ss.ExactTrace()), device) * seeds
    print(f"| none: the exact trace | 0 | 0 | 0 | {cost:.1f} for as many |")
    ratio, low, high = variance_ratio(values["kept"].numpy(), values["fresh"].numpy())
    print(f"\nvariance with a fixed probe over that with fresh ones: {ratio:.2f} [{low:.2f}, {high:.2f}]", end=" ")
    print("(95% bootstrap interval over images and probes)")


def in_batches(model: ss.ScoreModel, x: Tensor, trace: ss.Hutchinson, size: int = 128) -> list[ss.LogProb]:
    """Return `log_prob` of many points in batches, with one seed per point."""
    return [
        ss.log_prob(model, part, trace=trace, seeds=range(i * size, i * size + len(part)))
        for i, part in enumerate(x.split(size))
    ]


def variance_ratio(a: np.ndarray, b: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Return the mean variance of the rows of a over that of b, (images, probes), and its 95% bootstrap interval."""
    rng = np.random.default_rng(0)

    def ratio(x: np.ndarray, y: np.ndarray) -> float:
        return float(x.var(axis=1, ddof=1).mean() / y.var(axis=1, ddof=1).mean())

    found = []
    for _ in range(draws):
        rows = rng.integers(len(a), size=len(a))[:, None]
        picked = [values[rows, rng.integers(values.shape[1], size=(len(rows), values.shape[1]))] for values in (a, b)]
        found.append(ratio(*picked))
    low, high = np.quantile(found, [0.025, 0.975])
    return ratio(a, b), float(low), float(high)


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Plot error against seconds, one line per method, with a ring around its default."""
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for method in METHODS:
        here = [row for row in rows if row.method == method.name and row.seconds]
        if not here:
            continue
        x, y = [row.median for row in here], [row.rms_error for row in here]
        axes.loglog(x, y, color=method.colour, marker=method.marker, markersize=5, linewidth=1.3, label=method.name)
        ring = [(a, b) for a, b, row in zip(x, y, here, strict=True) if row.default]
        if ring:
            axes.loglog(*zip(*ring, strict=True), "o", markersize=12, fillstyle="none", color=method.colour)
    axes.set(xlabel="seconds", ylabel="rms error of log p, bits/dim")
    axes.set_title(f"{title}\nrings: the defaults of each project", fontsize=9)
    axes.grid(which="major", linewidth=0.4, alpha=0.6)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"\nplot: {path}")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write all rows; the times of a row are separated by spaces."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows({**asdict(row), "seconds": " ".join(f"{s:.4f}" for s in row.seconds)} for row in rows)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", help="folder of a run")
    model.add_argument("--checkpoint", help="checkpoint of score_sde_pytorch")
    model.add_argument("--oracle", action="store_true", help="a mixture of Gaussians with its exact score")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each row")
    parser.add_argument("--reference", type=int, default=2400, help="evaluations of the reference")
    parser.add_argument("--probes", type=int, default=64, help="probes per image of the third table")
    parser.add_argument("--probe-images", type=int, default=8, help="images of the third table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--study", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print the selected tables."""
    options = arguments()
    case = load(options)
    if options.peak:
        measure_peak(options.peak, case, options.device)
        return
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} cores"
    print(f"{case.title}; {where}, PyTorch {torch.__version__}")
    truth = reference(case, options.reference)
    if options.study:
        study.smoothing(case.model, case.x, truth)
        if case.oracle is None:
            study.probes(case.model, case.x[: options.probe_images])
        return
    rows = compare(case, truth, options)
    print_rows(rows)
    print_summary(rows)
    print_spread(case, options.probes, options.probe_images)
    if options.plot:
        draw(rows, case.title, options.plot)
    if options.csv:
        write_csv(rows, options.csv)


if __name__ == "__main__":
    main()
