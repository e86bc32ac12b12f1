"""Cost of posterior means and variances to a stated error: multilevel estimates beside plain samples.

    python benchmarks/posterior_moments.py

Problems are those of `posterior.py`: a mixture of 8 Gaussians in 2 or (1, 4, 4) dimensions, averages of its entries
with noise 0.2, VP. Models are the exact score of the posterior, whose moments are known in closed form, and `MMPS`, of
which the reference is 20,000 samples with 256 steps. For each, independent multilevel estimates
(`ss.inverse.posterior_moments`), and the number of samples that the finest sampler of each would need for the same
stated error. Reported, with 95% bootstrap intervals over repetitions:

- error: root mean square of the error over entries, both moments and repetitions; the tolerance is the goal;
- squared ratio: mean square of error / stated error, 1 if the stated errors are right;
- saving: forward and backward passes of plain samples, divided by those of the multilevel estimate.
"""

import argparse
from functools import partial

import numpy as np
import torch
from posterior_methods import SHAPES, Problem
from samplers import interval, machine
from torch import Tensor

import scoresde as ss
from scoresde.inverse import MMPS, posterior_moments
from scoresde.samplers import DPMSolverPP, PredictorCorrector

REFERENCE, FINEST = 20_000, 256


mean_of = partial(np.mean, axis=-1)


def closed_form(posterior: ss.GaussianMixture) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of each entry."""
    mean = posterior.mean()
    return mean, posterior.covariance().reshape(mean.numel(), -1).diagonal().reshape(mean.shape)


def sampled(model: ss.ScoreModel, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of each entry of many accurate samples."""
    x = PredictorCorrector(DPMSolverPP(2), steps=FINEST)(
        model, shape=(REFERENCE, *shape), seeds=range(REFERENCE), dtype=torch.float64
    ).x
    return x.mean(dim=0), x.var(dim=0)


def row(states: str, method: str, tolerance: float, repetitions: int) -> str:
    """Return one row of the table."""
    problem, shape = Problem(states, "averages", 0.2, "VP"), SHAPES[states]
    y = problem.measurements(1, seed=5)[0]
    posterior = problem.oracle.posterior(problem.operator, y)
    if method == "exact score":
        model, (mean, variance) = posterior.score_model(problem.model.sde), closed_form(posterior)
    else:
        model = MMPS(problem.model, problem.operator, y)
        mean, variance = sampled(model, shape)
    squares, ratios, savings = [], [], []
    for seed in range(repetitions):
        found = posterior_moments(model, shape, tolerance, seed=seed, dtype=torch.float64)
        errors = torch.stack([found.mean - mean, found.variance - variance])
        stated = torch.stack([found.mean_stderr, found.variance_stderr])
        squares.append(float(errors.square().mean()))
        ratios.append(float((errors / stated).square().mean()))
        savings.append(found.plain / (found.nfe + found.backward))
    error = float(np.sqrt(np.mean(squares)))
    cells = [
        f"{np.mean(v):.2f} [{low:.2f}, {high:.2f}]"
        for v in (ratios, savings)
        for low, high in [interval(mean_of, np.array(v))]
    ]
    draws = ", ".join(str(term.draws) for term in found.estimate.terms)
    return f"| {states} | {method} | {tolerance:g} | {error:.4f} | {' | '.join(cells)} | {draws} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.03, 0.01])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine("cpu"), flush=True)
    print("| states | model | tolerance | error | squared ratio [95%] | saving [95%] | draws of each level |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for states in ("2-D", "16-D"):
        for method in ("exact score", "MMPS"):
            for tolerance in options.tolerances:
                print(row(states, method, tolerance, options.repetitions), flush=True)


if __name__ == "__main__":
    main()
