"""The problems and the methods of `posterior.py`: mixtures, operators, samplers with their settings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import posterior_peers as peers
import torch
from sampler_peers import missing
from samplers import seeded
from torch import Tensor

import scoresde as ss
from scoresde.inverse import DDNM, DDRM, DPS, MMPS, Measured, PiGDM, RePaint, Replacement, Resampled, TwistedParticles
from scoresde.inverse.operators import Operator
from scoresde.samplers import Ancestral, AngularAdams, DPMSolverPP, PredictorCorrector, SASolver
from scoresde.samplers.grids import GRIDS

SHAPES = {"2-D": (2,), "16-D": (1, 4, 4), "64-D": (1, 8, 8)}
OPERATORS = ("inpainting", "averages", "blur", "random")
SDES = {"VP": lambda: ss.VP(t_min=1e-3), "VE": lambda: ss.VE(sigma_min=0.01, sigma_max=10.0)}
OURS, PEER, EXACT = "scoresde", "azula", "exact draws"
LENGTHS = (5.0, 15.0, 50.0)  # of all steps of DPS together, in both libraries
GRIDS_OF_BOTH = ("uniform_time", "quadratic", "uniform_angle")


# --- problems


def mixture(shape: Sequence[int], components: int = 8) -> ss.GaussianMixture:
    """Return a mixture whose components overlap in part of the measurements, in any number of dimensions."""
    generator, size = seeded(0), math.prod(shape)
    spread = 0.7 * (2 / size) ** 0.25
    means = spread * torch.randn(components, *shape, generator=generator, dtype=torch.float64)
    stds = 0.05 + 0.25 * torch.rand(components, *shape, generator=generator, dtype=torch.float64)
    square = torch.randn(components, size, size, generator=generator, dtype=torch.float64)
    return ss.GaussianMixture(means, stds, rotation=torch.linalg.qr(square).Q)


def operator_of(name: str, shape: Sequence[int], noise: float) -> Operator:
    """Return an operator for states of a shape: vectors of two numbers, or images with one channel."""
    size = math.prod(shape)
    if name == "random":
        matrix = torch.randn(max(size // 4, 1), size, generator=seeded(1), dtype=torch.float64) / math.sqrt(size)
        return ss.inverse.Linear(matrix, noise_std=noise, shape=shape)
    if len(shape) == 1:
        rows = {"inpainting": [[1.0, 0.0]], "averages": [[0.5, 0.5]], "blur": [[0.75, 0.25], [0.25, 0.75]]}
        return ss.inverse.Linear(torch.tensor(rows[name], dtype=torch.float64), noise_std=noise)
    if name == "inpainting":
        mask = torch.zeros(shape[1:])
        mask[: shape[1] // 2, : shape[2] // 2] = 1
        return ss.inverse.Inpainting(mask, noise)
    if name == "averages":
        return ss.inverse.Downsampling(2, noise_std=noise)
    side = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    return ss.inverse.Blur(side[:, None] * side, noise)


@dataclass(frozen=True)
class Problem:
    """A mixture, an operator, a noise level and an SDE, by their names."""

    states: str
    operator_name: str
    noise: float
    sde_name: str

    @cached_property
    def oracle(self) -> ss.GaussianMixture:
        """The mixture."""
        return mixture(SHAPES[self.states])

    @cached_property
    def operator(self) -> Operator:
        """The operator with its noise."""
        return operator_of(self.operator_name, SHAPES[self.states], self.noise)

    @cached_property
    def model(self) -> ss.ScoreModel:
        """The exact score."""
        return self.oracle.score_model(SDES[self.sde_name]())

    @cached_property
    def data_std(self) -> float:
        """The standard deviation of the data, root mean square over entries."""
        return float(self.oracle.covariance().diag().mean().sqrt())

    def measurements(self, count: int, seed: int) -> Tensor:
        """Draw measurements (count, *m) of samples of the mixture."""
        return self.operator.measure(self.oracle.sample(count, generator=seeded(seed)), generator=seeded(seed + 1))


# --- methods

Draw = Callable[[Problem, Tensor, int, int, int], Tensor]
"""(problem, y (P, *m), samples of each N, budget, seed) -> samples (P, N, *)."""


@dataclass(frozen=True)
class Method:
    """A method of a library, with its settings; `one_batch_each` if it runs each measurement in a batch of its own."""

    library: str
    name: str
    settings: dict[str, Draw]
    one_batch_each: bool = False


def shape_of(problem: Problem, y: Tensor, count: int) -> tuple[int, ...]:
    """Return the shape (P N, *) of all samples."""
    return (len(y) * count, *SHAPES[problem.states])


def sampled(sampler: Any, problem: Problem, model: Any, y: Tensor, count: int, seed: int, **more: Any) -> Tensor:
    """Return the samples (P, N, *) of a sampler of this library."""
    options = {"shape": shape_of(problem, y, count), "generator": seeded(seed), "dtype": torch.float64}
    return sampler(model, **options, **more).x.unflatten(0, (len(y), count))


STEPS: dict[str, Callable[[], Any]] = {
    "Ancestral": Ancestral,
    "DPMSolverPP(2, l=1)": lambda: DPMSolverPP(2, l=1.0, final=1),
    "SASolver(2, 2, l=0.5)": lambda: SASolver(2, 2, l=0.5),
    "AngularAdams(2, 0)": lambda: AngularAdams(2, 0),
}


def guided(
    build: Callable[[Problem, Tensor, int], Measured], backward: int = 1, steps: Sequence[str] = tuple(STEPS)
) -> dict[str, Draw]:
    """Return the settings of a posterior model, one for each sampler and grid; build(problem, y, number of steps).

    An evaluation makes `backward` passes, but no more than there are measurements: the linear solver stops there.
    """

    def setting(step: Callable[[], Any], grid: str) -> Draw:
        def draw(problem: Problem, y: Tensor, count: int, budget: int, seed: int) -> Tensor:
            evaluations = budget // (1 + min(backward, y[0].numel()))
            sampler = PredictorCorrector(step(), steps=evaluations, grid=grid)
            model = build(problem, y.repeat_interleave(count, 0), evaluations)
            return sampled(sampler, problem, model, y, count, seed)

        return draw

    return {f"{name}, {grid}": setting(STEPS[name], grid) for name in steps for grid in GRIDS_OF_BOTH}


def spectral(kind: type) -> dict[str, Draw]:
    """Return the settings of DDRM or DDNM, one for each grid; the transition to clean data is one evaluation more."""

    def setting(grid: Any) -> Draw:
        def draw(problem: Problem, y: Tensor, count: int, budget: int, seed: int) -> Tensor:
            sampler = kind(problem.operator, y.repeat_interleave(count, 0), steps=budget - 1, grid=grid)
            return sampled(sampler, problem, problem.model, y, count, seed)

        return draw

    return {name: setting(GRIDS[name]) for name in GRIDS_OF_BOTH}


def replacement(repeats: int, published: bool = False) -> Draw:
    """Return replacement, or RePaint with several repeats of every step."""

    def draw(problem: Problem, y: Tensor, count: int, budget: int, seed: int) -> Tensor:
        sde, constraint = problem.model.sde, Replacement(problem.operator, y.repeat_interleave(count, 0), published)
        if repeats == 1:
            sampler = PredictorCorrector(Ancestral(), steps=budget - published, denoise_final=published)
        else:  # evaluations are made on the way down only, and on the way up none
            grid, steps = Resampled(1, repeats), 1
            while falls(grid(sde, steps + 1)) <= budget:
                steps += 1
            sampler = RePaint(steps, 1, repeats)
        return sampled(sampler, problem, problem.model, y, count, seed, constraint=constraint)

    return draw


def falls(times: Tensor) -> int:
    """Return the number of transitions to less noise."""
    return int((times.diff() < 0).sum())


def particles(step: Callable[[], Any], grid: str | None = None) -> Draw:
    """Return the particle sampler, one run for each measurement, with N particles, resampled to equal weights."""

    def draw(problem: Problem, y: Tensor, count: int, budget: int, seed: int) -> Tensor:
        sampler = TwistedParticles(step(), (budget - 1) // 2, grid=grid, data_covariance=problem.oracle.covariance())
        shape = (count, *SHAPES[problem.states])
        runs = [
            sampler(problem.model, problem.operator, one, shape, seed=seed + i, dtype=torch.float64)
            for i, one in enumerate(y)
        ]
        return torch.stack([run.draw(count, seed) for run in runs])

    return draw


def foreign(run: peers.PosteriorRun) -> Draw:
    """Return a run of azula."""

    def draw(problem: Problem, y: Tensor, count: int, budget: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        x = problem.model.sde.prior_std * torch.randn(shape_of(problem, y, count), dtype=torch.float64)
        samples = run(problem.model, problem.operator, y.repeat_interleave(count, 0), x, budget)
        return samples.unflatten(0, (len(y), count))

    return draw


def exact(problem: Problem, y: Tensor, count: int, budget: int, seed: int) -> Tensor:
    """Return exact draws of the posteriors."""
    posteriors = [problem.oracle.posterior(problem.operator, one) for one in y]
    return torch.stack([one.sample(count, generator=seeded(seed + i)) for i, one in enumerate(posteriors)])


def published_dps(problem: Problem, y: Tensor, steps: int, length: float) -> DPS:
    """Return DPS with the published step rule, and this length of all steps together; it is 1,000 at scale 1."""
    return DPS(problem.model, problem.operator, y, length / 1000, rule="published")


def dps(problem: Problem, y: Tensor, steps: int) -> DPS:
    """Return DPS with the gradient of the likelihood at the denoised state."""
    return DPS(problem.model, problem.operator, y)


def pigdm(problem: Problem, y: Tensor, steps: int) -> PiGDM:
    """Return PiGDM for the standard deviation of the problem's data."""
    return PiGDM(problem.model, problem.operator, y, data_std=problem.data_std)


def mmps(problem: Problem, y: Tensor, steps: int, iterations: int) -> MMPS:
    """Return MMPS with this number of iterations of its linear solver."""
    return MMPS(problem.model, problem.operator, y, iterations=iterations)


def of_this_library() -> list[Method]:
    """Return the methods of this library."""
    likelihood = guided(dps, steps=("Ancestral", "DPMSolverPP(2, l=1)"))
    published = {
        f"length={length:g}, {k}": v
        for length in LENGTHS
        for k, v in guided(partial(published_dps, length=length), steps=("Ancestral",)).items()
    }
    listed = [Method(OURS, "DPS", likelihood | published)]
    listed.append(Method(OURS, "PiGDM", guided(pigdm)))
    listed += [Method(OURS, f"MMPS({n})", guided(partial(mmps, iterations=n), n)) for n in (1, 2, 3)]
    listed += [Method(OURS, kind.__name__, spectral(kind)) for kind in (DDRM, DDNM)]
    listed.append(Method(OURS, "replacement", {"": replacement(1), "published": replacement(1, published=True)}))
    listed.append(Method(OURS, "RePaint", {f"repeats={n}": replacement(n) for n in (2, 4)}))
    chains = {"Ancestral": particles(Ancestral)}
    for grid in ("bounded_log_snr", "quadratic"):
        chains[f"DPMSolverPP(2, l=1), {grid}"] = particles(STEPS["DPMSolverPP(2, l=1)"], grid)
    listed.append(Method(OURS, "particles", chains, one_batch_each=True))
    return listed


def of_azula() -> list[Method]:
    """Return the methods of azula, each on several grids."""
    grids = {name: GRIDS[name] for name in GRIDS_OF_BOTH}
    dps = {
        f"length={length:g}, {k}": foreign(peers.azula_dps(grid, length))
        for k, grid in grids.items()
        for length in LENGTHS
    }
    pgdm = {
        f"eta={eta:g}, {k}": foreign(peers.azula_pgdm(grid, eta)) for k, grid in grids.items() for eta in (0.0, 1.0)
    }
    listed = [Method(PEER, "DPS", dps), Method(PEER, "PGDM", pgdm)]
    samplers: list[tuple[str, dict[str, Any]]] = [("DDIM", {}), ("DDPM", {}), ("vAB", {"order": 2})]
    for n in (1, 2, 3):
        mmps = {
            f"{name}, {k}": foreign(peers.azula_mmps(grid, name, n, **options))
            for k, grid in grids.items()
            for name, options in samplers
        }
        listed.append(Method(PEER, f"MMPS({n})", mmps))
    return listed


def methods() -> list[Method]:
    """Return exact draws, the methods of this library, and those of azula if it is installed."""
    listed = [Method(EXACT, "", {"": exact}), *of_this_library()]
    if missing("azula"):
        print("azula skipped: it is not installed")
        return listed
    return listed + of_azula()
