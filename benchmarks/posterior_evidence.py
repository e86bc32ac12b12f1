"""The particle sampler's log evidence and component weights, compared with the exact ones of a mixture of Gaussians.

    python benchmarks/posterior_evidence.py                  # 2-D and 16-D, averages, noise 0.2, VP
    python benchmarks/posterior_evidence.py --predictors heun --steps 40

The estimate of the evidence is unbiased for the discretised chain; z is the mean of estimate / exact evidence - 1 over
the seeds, divided by its standard error. "spread / stated" compares the standard deviation of the log evidence over
seeds with the root mean square of the stated standard errors. The weights are the mean component probabilities of one
run with many particles; the table has their largest error.
"""

import argparse
import math
from itertools import product

import numpy as np
import torch
from posterior_methods import OPERATORS, SDES, SHAPES, Problem
from samplers import machine

from scoresde.inverse import TwistedParticles
from scoresde.samplers import Ancestral, DPMSolverPP, StochasticHeun

PREDICTORS = {"ancestral": Ancestral, "heun": StochasticHeun, "dpmpp2": lambda: DPMSolverPP(2, l=1.0)}


def print_row(problem: Problem, predictor: str, options: argparse.Namespace) -> None:
    """Print the errors of the evidence and of the weights in a problem."""
    y = problem.measurements(1, 1000)[0]
    truth = float(problem.oracle.log_evidence(problem.operator, y))
    posterior = problem.oracle.posterior(problem.operator, y)
    covariance = problem.oracle.covariance()
    sampler = TwistedParticles(
        PREDICTORS[predictor](), options.steps, threshold=options.threshold, data_covariance=covariance
    )
    counts = [(options.particles, seed) for seed in range(options.seeds)] + [(options.many, options.seeds)]
    *runs, large = (
        sampler(problem.model, problem.operator, y, (n, *SHAPES[problem.states]), seed=seed, dtype=torch.float64)
        for n, seed in counts
    )
    errors, stds = np.array([run.log_evidence - truth for run in runs]), np.array([run.stderr for run in runs])
    ratios = np.exp(errors) - 1
    bias, spread = ratios.mean(), ratios.std(ddof=1) / math.sqrt(len(ratios))
    calibration = errors.std(ddof=1) / math.sqrt(np.square(stds).mean())
    within = np.mean(np.abs(errors) <= 2 * stds)
    weights = (large.weights @ posterior.log_posterior(large.x).exp() - posterior.log_weights.exp()).abs().max()
    name = f"{problem.states}, {problem.operator_name}, noise {problem.noise:g}, {problem.sde_name}"
    print(
        f"| {name} | {predictor} | {runs[0].nfe} + {runs[0].backward} | {truth:.3f} | {bias:+.4f} +- {spread:.4f} | "
        f"{bias / spread:+.1f} | {calibration:.2f} | {within:.0%} | {float(weights):.4f} |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", nargs="*", default=("2-D", "16-D"), choices=SHAPES)
    parser.add_argument("--operators", nargs="*", default=("averages",), choices=OPERATORS)
    parser.add_argument("--noises", nargs="*", type=float, default=(0.2,))
    parser.add_argument("--sdes", nargs="*", default=("VP",), choices=SDES)
    parser.add_argument("--predictors", nargs="*", default=("dpmpp2",), choices=PREDICTORS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threshold", type=float, default=0.5, help="of resampling; 0: none, independent particles")
    parser.add_argument("--seeds", type=int, default=100, help="runs for the evidence")
    parser.add_argument("--particles", type=int, default=1024, help="particles of each of these runs")
    parser.add_argument("--many", type=int, default=4096, help="particles for the weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine("cpu"))
    print(
        f"\n{options.seeds} seeds of {options.particles} particles, {options.steps} steps; "
        f"weights of one run of {options.many} particles\n"
    )
    print(
        "| problem | predictor | passes | exact, nats | estimate / exact - 1 | z | spread / stated | within 2 stated "
        "| weights |"
    )
    print("| --- " * 9 + "|")
    for states, name, noise, sde, predictor in product(
        options.states, options.operators, options.noises, options.sdes, options.predictors
    ):
        print_row(Problem(states, name, noise, sde), predictor, options)


if __name__ == "__main__":
    main()
