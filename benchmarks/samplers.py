"""Samplers: the overhead of the sampling loop, and the accuracy compared with other projects at equal cost.

    python benchmarks/samplers.py --overhead                        # needs an otherwise idle machine
    pip install --no-deps k-diffusion azula; pip install diffusers  # packages that are not installed are skipped
    python benchmarks/samplers.py --oracle --plot docs/sampler_benchmark.png
    python benchmarks/samplers.py --checkpoint digits_vp.pth --images 256 --pilot 32 --samples 256

--overhead prints the milliseconds per step with a network that returns its input, and the time of a sampler divided by
that of its network evaluations. After every step of the sampler the network is called again with the inputs of that
step, so that both times are measured under the same load. A second ratio adds the time of the random draws to that of
the evaluations. Freed memory stays with the process, as in the command line. Each ratio is the median over runs, with a
95% bootstrap interval; the upper end of the first is compared with 1.02.

    python benchmarks/samplers.py --mixture --learned runs/solvers_mixture --budgets 5 7 10
    python benchmarks/samplers.py --checkpoint digits_vp.pth --learned runs/solvers_digits --budgets 5 7 10
    python benchmarks/samplers.py --run runs/digits_cond --learned runs/solvers_digits_cond --budgets 5 7 10

--learned adds solvers that were learned for the model (`scoresde.samplers.learn`), on starts of their own. They are
read from the folder; those that are missing are learned and stored first (--learning steps=300 pool=1024). The ratios
are then those of the learned solver's error. --every lists every method on its best grid (with --batches 0).

The other commands compare samplers at 5, 10 and 20 evaluations, counted on the network. All samplers start at t_max
from the same states, drawn from the exact marginal (for a checkpoint, from the prior). They integrate to t = 0.001,
where 2011.13456 stops the sampling of VP models, and return E[x_0 | x] there, which is one of the evaluations.
k-diffusion and azula run on all grids of this library, diffusers on all grids of its own. Two errors are measured:

- for deterministic methods, the error of each sample: its root mean square distance, over the dimensions, to the
  converged probability flow from the same start. For each library, the method and grid with the smallest error on pilot
  samples (--pilot) are measured on other samples (--images). The table has the root mean square over samples with a 95%
  bootstrap interval, and the ratio of this library's error to it, on the same samples. It also has the median, because
  a few samples that end in a wrong mode can dominate the root mean square;
- for deterministic and stochastic methods, the error of the distribution: sliced 2-Wasserstein distance and energy
  distance to exact draws (also denoised at t = 0.001; for a checkpoint, samples of the converged flow), as mean and
  standard error over batches. The distances between two sets of exact draws are printed for reference.
"""

import argparse
import csv
import importlib.metadata
import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
import numpy as np
import sampler_peers as peers
import torch
from clock import seconds
from matplotlib.figure import Figure
from sampler_peers import Run
from torch import Tensor, nn

import scoresde as ss
from scoresde.build import Run as TrainedRun
from scoresde.build import build_model, instantiate
from scoresde.cli import config_directory
from scoresde.evaluation.conditions import data_conditions
from scoresde.evaluation.distillation import CONDITIONS
from scoresde.metrics import energy_distance, sliced_wasserstein
from scoresde.process_settings import tune_process
from scoresde.protocols import Condition
from scoresde.random_stream import RandomStream
from scoresde.samplers import (
    DDIM,
    DEIS,
    IPNDM,
    Ancestral,
    AngularAdams,
    DPMSolverPP,
    Heun,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    SASolver,
    UniPC,
)
from scoresde.samplers.grids import GRIDS, Grid
from scoresde.samplers.learned_solver import SolverTable, StoredSolver, solver_file
from scoresde.samplers.learning import Learner, Learning, repeated

LIBRARIES = ("learned", "scoresde", "diffusers", "k-diffusion", "azula")
LEARNED, OURS, END, BUDGETS = *LIBRARIES[:2], 1e-3, (5, 10, 20)
ENERGY = 2000  # samples per energy distance
TARGET, LEARNING_SEED = 1.02, 7


# --- candidates


@dataclass(frozen=True)
class Candidate:
    """A method of a library on a grid."""

    library: str
    name: str
    grid: str
    run: Run
    stochastic: bool = False


def ours(step: Callable[[], Any], grid: Grid, cost: int = 1) -> Run:
    """Return a run of this library with a sampler step on a grid, denoised at the end."""

    def run(model: ss.ScoreModel, x: Tensor, evaluations: int) -> Tensor:
        steps = (evaluations - 1) // cost
        return PredictorCorrector(step(), steps=steps, grid=grid, denoise_final=True)(model, x_T=x).x

    return run


def flow(order: int, smoothing: int = 0) -> Run:
    """Return a run of the likelihood's solver in its own variable, which evaluates both ends of the path; denoised."""

    def run(model: ss.ScoreModel, x: Tensor, evaluations: int) -> Tensor:
        solver = ss.solvers.Adams(evaluations - 2, order, smoothing, data_scale=1.0)
        return ProbabilityFlow(solver, denoise_final=True)(model, x_T=x).x

    return run


def of_this_library() -> Iterator[Candidate]:
    """Yield the methods of this library."""
    steps = {
        "DDIM": DDIM,
        "DPMSolverPP(2)": lambda: DPMSolverPP(2),
        "DPMSolverPP(2, final)": lambda: DPMSolverPP(2, final=1),
        "DPMSolverPP(3)": lambda: DPMSolverPP(3),
        "DPMSolverPP(3, final)": lambda: DPMSolverPP(3, final=1),
        "DPMSolverPP(3, published)": lambda: DPMSolverPP(3, form="published"),
        "UniPC(2)": lambda: UniPC(2),
        "UniPC(3)": lambda: UniPC(3),
        "UniPC(2, bh1)": lambda: UniPC(2, "bh1"),
        "UniPC(3, bh1)": lambda: UniPC(3, "bh1"),
        "DEIS(3)": lambda: DEIS(3),
        "DEIS(4)": lambda: DEIS(4),
        "DEIS(3, ratio)": lambda: DEIS(3, "ratio"),
        "IPNDM(3)": lambda: IPNDM(3),
        "IPNDM(4)": lambda: IPNDM(4),
        "AngularAdams(2, 1)": lambda: AngularAdams(2, 1),
        "AngularAdams(2, 2)": lambda: AngularAdams(2, 2),
        "AngularAdams(3, 0)": lambda: AngularAdams(3, 0),
        "AngularAdams(3, 2)": AngularAdams,
        "AngularAdams(3, 2, final=0)": lambda: AngularAdams(final=0),
        "AngularAdams(3, 3)": lambda: AngularAdams(3, 3),
        "AngularAdams(4, 3)": lambda: AngularAdams(4, 3),
        "SASolver(2, 2, l=0)": lambda: SASolver(2, 2, l=0.0),
        "SASolver(3, 3, l=0)": lambda: SASolver(3, 3, l=0.0),
    }
    noisy = {
        "Ancestral": Ancestral,
        "DPMSolverPP(1, l=1)": lambda: DPMSolverPP(1, l=1.0),
        "DPMSolverPP(2, l=1)": lambda: DPMSolverPP(2, l=1.0),
        "DPMSolverPP(2, l=0.5)": lambda: DPMSolverPP(2, l=0.5),
        "SASolver(2, 2, l=0.5)": lambda: SASolver(2, 2, l=0.5),
        "SASolver(3, 3, l=1)": lambda: SASolver(3, 3),
    }
    for grid, times in GRIDS.items():
        for name, step in steps.items():
            yield Candidate(OURS, name, grid, ours(step, times))
        yield Candidate(OURS, "Heun", grid, ours(Heun, times, cost=2))
        for name, step in noisy.items():
            yield Candidate(OURS, name, grid, ours(step, times), stochastic=True)
    for order in (1, 2, 3):
        for smoothing in (0, 1):
            name = f"ProbabilityFlow(Adams(order={order}, smoothing={smoothing}))"
            yield Candidate(OURS, name, "its own", flow(order, smoothing))


def of_k_diffusion() -> Iterator[Candidate]:
    """Yield the methods of k-diffusion."""
    samplers: list[tuple[str, int, dict[str, Any]]] = [  # name, evaluations per step, options
        ("euler", 1, {}),
        ("heun", 2, {}),
        ("dpm_2", 2, {}),
        *(("lms", 1, {"order": order}) for order in (2, 3, 4)),
        ("dpmpp_2m", 1, {}),
        ("dpmpp_2m_sde", 1, {"eta": 0.0, "solver_type": "heun"}),
        ("dpmpp_3m_sde", 1, {"eta": 0.0}),
        ("euler_ancestral", 1, {"eta": 1.0}),
        ("dpmpp_sde", 2, {"eta": 1.0}),
        *(("dpmpp_2m_sde", 1, {"eta": eta}) for eta in (0.5, 1.0)),
        ("dpmpp_3m_sde", 1, {"eta": 1.0}),
    ]
    for grid, times in GRIDS.items():
        for name, cost, options in samplers:
            run = peers.k_diffusion(name, times, cost, **options)
            yield Candidate("k-diffusion", labelled(name, options), grid, run, bool(options.get("eta")))


def of_azula() -> Iterator[Candidate]:
    """Yield the methods of azula."""
    samplers: list[tuple[str, int, dict[str, Any], bool]] = [  # name, evaluations per step, options, stochastic
        ("DDIM", 1, {}, False),
        ("Euler", 1, {}, False),
        ("Heun", 2, {}, False),
        *((name, 1, {"order": n}, False) for name in ("zAB", "vAB", "zEAB", "xEAB", "REAB") for n in (2, 3, 4)),
        ("DDPM", 1, {}, True),
        ("DDIM", 1, {"eta": 0.5}, True),
        ("Ito", 1, {}, True),
    ]
    for grid, times in GRIDS.items():
        for name, cost, options, draws in samplers:
            run = peers.azula(name, times, cost, **options)
            yield Candidate("azula", labelled(name, options), grid, run, draws)


def of_diffusers() -> Iterator[Candidate]:
    """Yield the schedulers of diffusers, each on all grids that it supports."""
    nodes = {name: {"timestep_spacing": name} for name in ("linspace", "trailing")}
    free = {name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")}
    lu = {"lu_lambdas": {"use_lu_lambdas": True}}
    level = {"final_sigmas_type": "sigma_min"}

    def made(name: str, options: dict[str, Any], grids: dict[str, dict], draws: bool = False, **how: Any) -> Any:
        title = labelled(name, {**options, **({"final": "level"} if options.get("final_sigmas_type") else {})})
        for grid, chosen in grids.items():
            yield Candidate("diffusers", title, grid, peers.diffusers(name, **how, **options, **chosen), draws)

    yield from made("DDIM", {"clip_sample": False}, nodes)
    for order in (2, 3):
        one = {"solver_order": order}
        yield from made("DPMSolverMultistep", one, {**nodes, **free, **lu})
        yield from made("DPMSolverMultistep", one | level, nodes, final="level")
        yield from made("UniPCMultistep", one, {**nodes, **free})
        for kind in ("bh1", "bh2"):  # with a final noise level of zero, "bh1" is not finite
            other = one | {"solver_type": kind} | level
            yield from made("UniPCMultistep", other, nodes, final="level")
            yield from made("UniPCMultistep", other, free, final="repeat")
        yield from made("DEISMultistep", one, nodes, final="level")
        yield from made("DEISMultistep", one, free, final="repeat")
    yield from made("EulerDiscrete", {}, {**nodes, **free}, scaled=True)
    yield from made("LMSDiscrete", {}, {**nodes, **free}, scaled=True)
    yield from made("HeunDiscrete", {}, {**nodes, **free}, scaled=True, cost=2)
    yield from made("KDPM2Discrete", {}, {**nodes, **free}, scaled=True, cost=2)
    sde = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
    yield from made("DPMSolverMultistep", sde, {**nodes, **free, **lu}, draws=True)
    yield from made("EulerAncestralDiscrete", {}, nodes, draws=True, scaled=True)


def labelled(name: str, options: dict[str, Any]) -> str:
    """Return a method as it is printed: its name and the options that define it."""
    shown = [f"{key}={value}" for key, value in options.items() if key not in ("clip_sample", "final_sigmas_type")]
    return f"{name}({', '.join(shown)})" if shown else name


PACKAGES = {"diffusers": of_diffusers, "k_diffusion": of_k_diffusion, "azula": of_azula}


def candidates() -> list[Candidate]:
    """Return the candidates of all installed libraries."""
    found = list(of_this_library())
    for package, listed in PACKAGES.items():
        if peers.missing(package):
            print(f"{package} skipped: it is not installed")
        else:
            found += listed()
    return found


# --- models


@dataclass
class Case:
    """A model, its initial states, and exact draws; the last two are functions of a number and a seed.

    cond: conditions (M,) of a conditional model; sample i has condition i mod M.
    """

    title: str
    model: ss.ScoreModel
    start: Callable[[int, int], Tensor]
    exact: Callable[[int, int], Tensor]
    cond: Condition = None

    def given(self, count: int) -> ss.ScoreModel:
        """Return the model with the conditions of `count` samples."""
        return self.model.given(repeated(self.cond, count))


def seeded(seed: int) -> torch.Generator:
    """Return a generator with a seed."""
    return torch.Generator().manual_seed(seed)


def converged(model: ss.ScoreModel, x: Tensor, steps: int = 400) -> Tensor:
    """Return the converged solutions of the probability flow from the states x at t_max, denoised at the end."""
    return ProbabilityFlow(ss.solvers.Adams(steps, smoothing=0), denoise_final=True)(model, x_T=x).x


def exact_mixture(shape: Sequence[int], components: int = 8) -> ss.GaussianMixture:
    """Return a mixture of rotated Gaussians over states of a shape, float64."""
    generator, size = seeded(0), math.prod(shape)
    means = 0.7 * torch.randn(components, *shape, generator=generator, dtype=torch.float64)
    stds = 0.05 + 0.25 * torch.rand(components, *shape, generator=generator, dtype=torch.float64)
    square = torch.randn(components, size, size, generator=generator, dtype=torch.float64)
    return ss.GaussianMixture(means, stds, rotation=torch.linalg.qr(square).Q)


def exact_case(shape: Sequence[int], components: int = 8) -> Case:
    """Return a mixture of rotated Gaussians over states of a shape, with its exact score under VP, float64."""
    mixture, sde = exact_mixture(shape, components), ss.VP(t_min=END)
    model = mixture.score_model(sde)

    def exact(count: int, seed: int) -> Tensor:
        return model.denoise(mixture.sample(count, sde, sde.t_min, seeded(seed)), sde.t_min)

    def start(count: int, seed: int) -> Tensor:
        return mixture.sample(count, sde, sde.t_max, seeded(seed))

    title = f"an exact mixture of {components} rotated Gaussians over {tuple(shape)}"
    return Case(title, model, start, exact)


def trained_case(run: TrainedRun, sde: ss.SDE, device: str, cond: Condition = None) -> Case:
    """Return a run's model on a path; its exact draws are samples of its own converged flow."""
    shape = tuple(run.config.data.shape)
    model = ss.ScoreModel(run.model.network, sde, run.model.prediction).to(device).eval()

    def start(count: int, seed: int) -> Tensor:
        return torch.randn(count, *shape, generator=seeded(seed)).to(device)

    def exact(count: int, seed: int) -> Tensor:
        return converged(case.given(count), start(count, seed))

    case = Case(f"{run.path.stem}, states {shape}", model, start, exact, cond)
    return case


def cases(options: argparse.Namespace) -> list[Case]:
    """Return the models that the command line names."""
    if options.checkpoint:
        return [trained_case(ss.convert.score_sde(options.checkpoint), ss.VP(t_min=END), options.device)]
    if options.run:
        run = ss.load(options.run)
        sde = instantiate({**run.config.sde, "t_min": END}, (), ss.SDE)
        return [trained_case(run, sde, options.device, data_conditions(run, "train", CONDITIONS))]
    return [exact_case((1, 4, 4))] if options.mixture else [exact_case((2,)), exact_case((1, 4, 4))]


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """Record the batch size of every call of a network within the block."""
    rows: list[int] = []
    handle = network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    try:
        yield rows
    finally:
        handle.remove()


def learned(case: Case, options: argparse.Namespace) -> list[Candidate]:
    """Return the learned solvers of the folder as a candidate; learn those that are missing."""
    if options.learned is None:
        return []
    learner: Learner | None = None
    for budget in options.budgets:
        path = solver_file(options.learned, budget)
        if not path.is_file():
            if learner is None:
                given = dict(setting.split("=") for setting in options.learning)
                numbers = {name: float(text) if "." in text else int(text) for name, text in given.items()}
                settings, shape = Learning(denoise_final=True, **numbers), case.start(1, 0).shape[1:]
                learner = Learner(case.model, shape, case.cond, settings, LEARNING_SEED)
            learner.learn(budget).table.save(path)
        notes = SolverTable.load(path).notes
        print(f"learned, {budget} evaluations: {notes}\n", flush=True)

    def run(model: ss.ScoreModel, x: Tensor, evaluations: int) -> Tensor:
        return StoredSolver(str(options.learned), evaluations)(model, x_T=x).x

    return [Candidate(LEARNED, "samplers.learn", "learned", run)]


# --- errors


@dataclass
class Result:
    """The evaluations of a candidate at a budget, and the error of each sample (N,); NaN if it failed."""

    candidate: Candidate
    budget: int
    evaluations: float
    errors: Tensor

    @property
    def rms(self) -> float:
        """The root mean square error over samples; infinite if the candidate failed."""
        value = float(self.errors.square().mean().sqrt())
        return value if math.isfinite(value) else math.inf


def sampled(candidate: Candidate, model: ss.ScoreModel, x: Tensor, budget: int) -> tuple[Tensor, float]:
    """Return samples and the evaluations per sample; NaN if a method fails or does not support so few steps."""
    with counted(model.network) as rows, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.manual_seed(0)
            found = candidate.run(model, x, budget)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            print(f"{candidate.name} on {candidate.grid}, {budget} evaluations: {error}", file=sys.stderr)
            found = torch.full_like(x, math.nan)
    return found, sum(rows) / len(x)


def flow_errors(
    model: ss.ScoreModel, x: Tensor, truth: Tensor, budget: int, listed: Sequence[Candidate]
) -> Iterator[Result]:
    """Yield the errors of candidates at a budget."""
    for candidate in listed:
        found, evaluations = sampled(candidate, model, x, budget)
        if evaluations > budget:
            raise RuntimeError(f"{candidate} must make at most {budget} evaluations; it made {evaluations:g}")
        yield Result(candidate, budget, evaluations, distance(found, truth).cpu())


def deterministic(
    case: Case, options: argparse.Namespace, listed: Sequence[Candidate]
) -> tuple[list[Result], list[Result]]:
    """Measure every deterministic candidate on pilot samples, and the best of each library on other samples."""
    x, pilot = case.start(options.images, 1), case.start(options.pilot, 4)
    steps = options.reference_steps
    model, trial = case.given(len(x)), case.given(len(pilot))
    truth, near = converged(model, x, steps), converged(trial, pilot, steps)
    off = float(distance(converged(trial, pilot, 3 * steps // 4), near).square().mean().sqrt())
    print(f"converged flow: Adams with {steps} steps; {3 * steps // 4} differ by {off:.1e} (rms)\n", flush=True)
    tried: list[Result] = []
    best: list[Result] = []
    for budget in options.budgets:
        results = list(flow_errors(trial, pilot, near, budget, [one for one in listed if not one.stochastic]))
        for group in grouped(results, options.every):
            chosen = min(group, key=lambda result: result.rms).candidate
            best += flow_errors(model, x, truth, budget, [chosen])
        tried += results
    return tried, best


def grouped(results: Sequence[Result], every: bool) -> list[list[Result]]:
    """Return the results of each library, or of each method of each library."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(results, key=lambda result: LIBRARIES.index(result.candidate.library)):
        one = result.candidate
        groups.setdefault((one.library, one.name if every else ""), []).append(result)
    return list(groups.values())


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the root mean square difference over the dimensions of each sample, (B,), float64."""
    return (x - y).double().flatten(1).square().mean(dim=1).sqrt()


def interval(statistic: Callable[..., np.ndarray], *samples: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """Return a 95% bootstrap interval of a statistic along the last axis; the arrays share the resampled indices."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(samples[0]), size=(draws, len(samples[0])))
    low, high = np.quantile(statistic(*(sample[rows] for sample in samples)), [0.025, 0.975])
    return float(low), float(high)


def rms(errors: np.ndarray) -> np.ndarray:
    """Return the root mean square along the last axis."""
    return np.sqrt(np.square(errors).mean(axis=-1))


def print_flow(best: Sequence[Result]) -> None:
    """Print the errors of the best deterministic method of each library."""
    first, name = (LEARNED, LEARNED) if any(one.candidate.library == LEARNED for one in best) else (OURS, "ours")
    print(f"| budget | library | method | grid | evaluations | rms error [95%] | median | {name} / this [95%] |")
    print("| --- " * 8 + "|")
    mine = {
        result.budget: result.errors.numpy()
        for result in sorted(best, key=lambda one: -one.rms)
        if result.candidate.library == first
    }
    for result in best:
        one, errors, base = result.candidate, result.errors.numpy(), mine[result.budget]
        low, high = interval(rms, errors)
        ratio = "1"
        if one.library != first:
            bounds = interval(lambda a, b: rms(a) / rms(b), base, errors)
            ratio = f"{rms(base) / rms(errors):.2f} [{bounds[0]:.2f}, {bounds[1]:.2f}]"
        cells = f"{result.rms:.2e} [{low:.2e}, {high:.2e}] | {np.median(errors):.2e} | {ratio}"
        print(f"| {result.budget} | {one.library} | {one.name} | {one.grid} | {result.evaluations:.0f} | {cells} |")


def print_law(case: Case, options: argparse.Namespace, best: Sequence[Result], listed: Sequence[Candidate]) -> None:
    """Print distances to exact draws for the best deterministic and the best stochastic method of each library."""
    count, batches, few = options.samples, options.batches, min(options.samples, 4 * options.pilot)
    truths = [case.exact(count, 100 + i) for i in range(batches)]
    starts = [case.start(count, 200 + i) for i in range(batches)]
    print("\n| budget | library | method | grid | evaluations | sliced 2-Wasserstein | energy distance |")
    print("| --- " * 7 + "|")
    floor = [compared(truth, case.exact(count, 300 + i)) for i, truth in enumerate(truths)]
    print(f"| | exact draws | | | | {' | '.join(stated(column) for column in zip(*floor, strict=True))} |")
    trial, wanted = case.start(few, 2), case.exact(few, 3)
    for budget in dict.fromkeys(result.budget for result in best):
        for library in LIBRARIES:
            rows = [
                result.candidate for result in best if (result.candidate.library, result.budget) == (library, budget)
            ]
            noisy = [one for one in listed if one.stochastic and one.library == library]
            if noisy:
                rows.append(
                    min(noisy, key=lambda one: from_law(sampled(one, case.given(len(trial)), trial, budget)[0], wanted))
                )
            for one in rows:
                drawn = [sampled(one, case.given(len(x)), x, budget) for x in starts]
                found = [compared(truth, x) for truth, (x, _) in zip(truths, drawn, strict=True)]
                cells = " | ".join(stated(column) for column in zip(*found, strict=True))
                print(f"| {budget} | {library} | {one.name} | {one.grid} | {drawn[0][1]:.0f} | {cells} |", flush=True)


def from_law(x: Tensor, truth: Tensor) -> float:
    """Return the sliced 2-Wasserstein distance, with the same directions in every call; infinite for a failure."""
    if not bool(torch.isfinite(x).all()):
        return math.inf
    return float(sliced_wasserstein(x, truth, 64, generator=seeded(0)))


def compared(truth: Tensor, x: Tensor) -> tuple[float, float]:
    """Return the sliced 2-Wasserstein distance and the energy distance."""
    if not bool(torch.isfinite(x).all()):
        return math.inf, math.inf
    pairs = zip(truth.split(ENERGY)[:5], x.split(ENERGY)[:5], strict=True)
    energy = [float(energy_distance(a, b)) for a, b in pairs if len(a) > 1]
    return from_law(x, truth), statistics.mean(energy)


def stated(values: Sequence[float]) -> str:
    """Format the mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.2e} +- {error:.0e}"


def draw(best: Sequence[Result], title: str, path: Path) -> None:
    """Plot the error of the best method of each library against the budget."""
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for library, marker in zip(LIBRARIES, "*o^vD", strict=True):
        here = [result for result in best if result.candidate.library == library]
        axes.loglog([r.budget for r in here], [r.rms for r in here], marker=marker, linewidth=1.3, label=library)
    axes.set(xlabel="network evaluations", ylabel="rms distance to the converged flow")
    axes.set_title(f"{title}\nthe best method and grid of each library", fontsize=9)
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.grid(which="major", linewidth=0.4, alpha=0.6)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"\nplot: {path}")


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Write the errors of every deterministic candidate on the pilot samples."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["budget", "library", "method", "grid", "evaluations", "rms_error", "median_error"])
        for result in sorted(results, key=lambda result: (result.budget, result.rms)):
            one = result.candidate
            middle = float(result.errors.median())
            writer.writerow([result.budget, one.library, one.name, one.grid, result.evaluations, result.rms, middle])


def quality(case: Case, options: argparse.Namespace, plot: Path | None) -> list[Result]:
    """Print both tables of a model."""
    print(f"\n### {case.title}\n")
    known = [one for one in candidates() if not options.among or one.name in options.among]
    listed = [*learned(case, options), *known]
    results, best = deterministic(case, options, listed)
    print_flow(best)
    if options.batches:
        print_law(case, options, best, listed)
    if plot:
        draw(best, case.title, plot)
    return results


# --- overhead


class Identity(nn.Module):
    """A network that returns its input."""

    def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        """Return x."""
        return x


METHODS = {
    "DPMSolverPP(2)": lambda: {"predictor": DPMSolverPP(2)},
    "Ancestral": lambda: {"predictor": Ancestral()},
    "ReverseDiffusion, Langevin": lambda: {"predictor": ReverseDiffusion(), "corrector": Langevin()},
}
MORE = {
    "DDIM": lambda: {"predictor": DDIM()},
    "UniPC(3)": lambda: {"predictor": UniPC(3)},
    "SASolver(3, 3)": lambda: {"predictor": SASolver()},
    "Heun": lambda: {"predictor": Heun()},
}


def configured(experiment: str) -> ss.ScoreModel:
    """Return the untrained model of an experiment, in eval mode."""
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = hydra.compose("train", overrides=[f"experiment={experiment}"])
    return build_model(config).eval()


@dataclass
class Overhead:
    """Measures a sampler that pauses after every step while the network is called again with the inputs of that step.

    The two times are interleaved step by step, so that other load on the machine affects both alike.

    shape: the shape of the states. seeds: one for each sample, or None for one stream.
    """

    sampler: PredictorCorrector
    model: ss.ScoreModel
    shape: Sequence[int]
    seeds: Sequence[int] | None
    device: str

    def run(self) -> tuple[float, float, int]:
        """Return the seconds of the sampler without pauses, and the seconds and number of evaluations in the pauses."""
        network, calls, alone, count = self.model.network, [], [], 0

        def repeat(*_: Any) -> None:
            nonlocal count
            given = list(calls)
            alone.append(seconds(lambda: [network(*arguments) for arguments in given], self.device))
            count += len(given)
            calls.clear()

        options = {"seeds": self.seeds, "device": self.device, "callback": repeat}
        handle = network.register_forward_pre_hook(lambda _, given: calls.append(given))
        with_stops = seconds(lambda: self.sampler(self.model, shape=self.shape, **options), self.device)
        handle.remove()
        return with_stops - sum(alone), sum(alone), count

    def draws(self) -> float:
        """Return the seconds of the random draws."""
        count = 0
        normal = RandomStream.normal

        def noted(stream: RandomStream, like: Tensor, rows: Tensor | None = None) -> Tensor:
            nonlocal count
            count += 1
            return normal(stream, like, rows)

        with mock.patch.object(RandomStream, "normal", noted):
            self.sampler(self.model, shape=self.shape, seeds=self.seeds, device=self.device)
        stream, like = RandomStream(seeds=self.seeds), torch.empty(tuple(self.shape), device=self.device)
        return seconds(lambda: [stream.normal(like) for _ in range(count)], self.device)

    def ratios(self, pairs: int) -> tuple[np.ndarray, np.ndarray, float, int]:
        """Return the ratios of the sampler's time to that of its evaluations and to that of evaluations and draws.

        Each ratio has one entry per run. Also return the seconds of an evaluation and the number of evaluations.
        """
        self.run()
        runs = [self.run() for _ in range(pairs)]
        sample, bare = (np.array([run[i] for run in runs]) for i in range(2))
        count = runs[0][2]
        return sample / bare, sample / (bare + self.draws()), float(np.median(bare)) / count, count


def print_overhead(options: argparse.Namespace) -> None:
    """Print both tables of the overhead."""
    tune_process()
    print("\n| network that returns its input, states | method | ms a step |\n| --- | --- | --- |")
    for shape in ((16, 3, 32, 32), (256, 1, 8, 8)):
        model = ss.ScoreModel(Identity(), ss.VP(), "v")
        for name, parts in {**METHODS, **MORE}.items():
            sampler = PredictorCorrector(**parts(), steps=options.steps, grid="uniform_log_snr")
            run = partial(sampler, model, shape=shape, device=options.device)
            cost = [seconds(run, options.device) for _ in range(options.pairs)]
            print(f"| {shape} | {name} | {1e3 * statistics.median(cost) / options.steps:.3f} |", flush=True)
    print("\n| network, states | seeds | method | evaluations | ms each | ratio [95%] | less the draws [95%] |", end="")
    print(f" at most {TARGET} |\n" + "| --- " * 8 + "|")
    cases = [
        ("cifar10_ddpmpp", (options.batch, 3, 32, 32), False, 3),
        ("digits", (256, 1, 8, 8), True, 20),
        ("digits", (256, 1, 8, 8), False, 20),
    ]
    for experiment, shape, separate, steps in (case for case in cases if case[0] in options.networks):
        model = configured(experiment).to(options.device)
        for name in options.methods:
            sampler = PredictorCorrector(**METHODS[name](), steps=steps, grid="uniform_log_snr")
            seeds = range(shape[0]) if separate else None
            *ratios, each, evaluations = Overhead(sampler, model, shape, seeds, options.device).ratios(options.pairs)
            bounds = [interval(lambda a: np.median(a, axis=-1), ratio) for ratio in ratios]
            cells = [
                f"{np.median(ratio):.4f} [{low:.4f}, {high:.4f}]"
                for ratio, (low, high) in zip(ratios, bounds, strict=True)
            ]
            met = "yes" if bounds[0][1] <= TARGET else f"no ({bounds[0][1]:.4f})"
            kind = "one a sample" if separate else "one stream"
            print(f"| {experiment}, {shape} | {kind} | {name} | {evaluations} | {1e3 * each:.1f} | ", end="")
            print(f"{' | '.join(cells)} | {met} |", flush=True)


def machine(device: str) -> str:
    """Return the machine and the versions of the installed libraries."""
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores, {torch.get_num_threads()} used"
    )
    packages = [name for name in ("diffusers", "k-diffusion", "azula") if not peers.missing(name.replace("-", "_"))]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{where}; PyTorch {torch.__version__}, {versions}"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--overhead", action="store_true")
    what.add_argument("--oracle", action="store_true", help="mixtures of Gaussians with their exact score")
    what.add_argument("--mixture", action="store_true", help="the mixture of --oracle in 16 dimensions alone")
    what.add_argument("--checkpoint", help="VP checkpoint of score_sde_pytorch")
    what.add_argument("--run", help="directory of a run; samples have the conditions of the training data")
    parser.add_argument("--images", type=int, default=8192, help="samples for distances to the converged flow")
    parser.add_argument(
        "--pilot",
        type=int,
        default=1024,
        help="samples to choose methods and grids on (four times as many for stochastic methods)",
    )
    parser.add_argument(
        "--samples", type=int, default=20_000, help="samples per batch for distances between distributions"
    )
    parser.add_argument("--batches", type=int, default=5, help="0 leaves out the distances between distributions")
    parser.add_argument("--reference-steps", type=int, default=400, help="steps of the converged flow")
    parser.add_argument("--among", nargs="*", help="names of the methods to choose from; default: all")
    parser.add_argument("--every", action="store_true", help="the best grid of every method, not only the best method")
    parser.add_argument("--learned", type=Path, help="folder of learned solvers")
    parser.add_argument("--learning", nargs="*", default=(), help="settings of samplers.Learning, such as steps=300")
    parser.add_argument("--budgets", type=int, nargs="*", default=BUDGETS)
    parser.add_argument("--pairs", type=int, default=20, help="timed runs")
    parser.add_argument("--steps", type=int, default=200, help="steps with a network that returns its input")
    parser.add_argument("--batch", type=int, default=16, help="batch size of the CIFAR-10 network")
    parser.add_argument("--networks", nargs="*", default=("cifar10_ddpmpp", "digits"), help="networks for --overhead")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="methods for --overhead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    """Print the selected tables."""
    options = arguments()
    print(machine(options.device))
    if options.overhead:
        print_overhead(options)
        return
    results = []
    for index, case in enumerate(cases(options)):
        plot = options.plot if index == 0 else None
        results += quality(case, options, plot)
    if options.csv:
        write_csv(results, options.csv)


if __name__ == "__main__":
    main()
