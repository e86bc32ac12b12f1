"""A network trained for inpainting compared with the exact posterior of a mixture of Gaussians.

    python benchmarks/inpainting_mixture.py

A perceptron is trained for inpainting on draws of the 2-D mixture of `posterior.py`: it sees one entry with noise of
standard deviation 0.2, or nothing. Its samples are compared with the exact posterior given the first entry, by the
measures of `posterior.py`, beside methods that have the exact score of the prior. All settings are chosen on other
measurements, as there. The training costs `--steps` steps of 512 states.
"""

import argparse
import copy
import math

import torch
from posterior import mean, pilot, stated
from posterior_errors import measured, target_of
from posterior_methods import EXACT, OURS, Method, Problem, guided, methods
from samplers import machine, seeded

import scoresde as ss
from scoresde.inverse import Inpainting, TrainedInpainting
from scoresde.losses import DenoisingScoreMatching, InpaintingObjective, RandomMasks
from scoresde.networks import MLP
from scoresde.training.ema import EMA

BATCH, RATE = 512, 2e-3
COMPARED = [(EXACT, ""), *((OURS, name) for name in ("PiGDM", "MMPS(1)", "DDRM", "replacement", "particles"))]


def perceptron(problem: Problem, steps: int) -> ss.ScoreModel:
    """Train a perceptron for inpainting on draws of a problem's mixture, and return it with its averaged weights."""
    torch.manual_seed(0)
    sde, generator = problem.model.sde, seeded(0)
    prediction = ss.predictions.KarrasPreconditioning(problem.data_std)
    model = ss.ScoreModel(MLP(2, width=128, cond_channels=4), sde, prediction)
    masks = RandomMasks(box=0.0, strokes=0.0, half=3.0, hidden=1.0)
    loss = InpaintingObjective(DenoisingScoreMatching("karras"), masks, problem.noise)
    optimizer, average = torch.optim.Adam(model.parameters(), lr=RATE), EMA(model, 0.999)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.5 * RATE * (1 + math.cos(math.pi * step / steps))
        x0 = problem.oracle.sample(BATCH, generator=generator).float()
        optimizer.zero_grad()
        loss(model, x0, generator=generator).value.mean().backward()
        optimizer.step()
        average.update(step + 1)
    with average.applied():
        return copy.deepcopy(model).eval()


def print_errors(problem: Problem, method: Method, budget: int, options: argparse.Namespace) -> None:
    """Print the errors of the setting of a method that is best on the pilot measurements, means over others."""
    tried = pilot(problem, method, budget, list(method.settings), options)
    setting = min(tried, key=lambda name: tried[name])
    target = target_of(problem, options.measurements, options.samples, 1000)
    errors, passes = measured(target, method, setting, options.samples, budget, 4000)
    energy, sliced, weights, coverage = errors.T
    row = [method.library, method.name, setting, f"{passes:.0f}", stated(mean, energy), stated(mean, sliced)]
    print(f"| {' | '.join(row)} | {mean(weights):.3f} | {mean(coverage):.3f} |", flush=True)


def main() -> None:
    """Print a table for each number of passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="steps of the training")
    parser.add_argument("--budgets", type=int, nargs="*", default=(20, 100), help="forward and backward passes")
    parser.add_argument("--measurements", type=int, default=16)
    parser.add_argument("--pilot", type=int, default=16, help="measurements to choose the settings on")
    parser.add_argument("--samples", type=int, default=256, help="samples for each measurement")
    options = parser.parse_args()
    print(machine("cpu"))
    problem = Problem("2-D", "inpainting", 0.2, "VP")
    model, operator = perceptron(problem, options.steps), Inpainting(torch.tensor([True, False]), problem.noise)
    listed = [method for method in methods() if (method.library, method.name) in COMPARED]
    listed.append(Method(OURS, "trained", guided(lambda _, y, steps: TrainedInpainting(model, operator, y), 0)))
    for budget in options.budgets:
        print(f"\n### {problem.states}, {problem.operator_name}, {problem.sde_name}, {budget} passes\n")
        print("| library | method | setting | passes | energy distance [95%] | sliced W2 [95%] | weights | coverage |")
        print("| --- " * 8 + "|")
        for method in listed:
            print_errors(problem, method, budget, options)


if __name__ == "__main__":
    main()
