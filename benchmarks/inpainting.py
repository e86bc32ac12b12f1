"""Inpainting of held-out patches: a network trained for it, and posterior methods with a network that was not.

    scoresde train experiment=patches
    scoresde train experiment=patches_inpainting       # starts from runs/patches
    python benchmarks/inpainting.py runs/patches_inpainting runs/patches --store cells.jsonl

Patches evenly spaced in the test split are measured outside of a box, or in one half, with noise of standard deviation
0.05 in model space, and restored by n samples of each method. A budget counts forward and backward passes of the
network for each sample, for each particle with particles. `trained` takes the first run, the other methods the second.

- PSNR and SSIM of the posterior mean, and averaged over samples, against the clean patch;
- rmse of the mean over the hidden entries, in model space;
- coverage: the share of hidden entries of the truth between the smallest and the largest of n samples, whose stated
  level is (n - 1)/(n + 1);
- residual: the root mean square of A(x) - y.

Tables have means over patches with 95% bootstrap intervals; entries of a patch depend on each other, patches hardly.
Cells are (mask, method): with --store each is written when it is done, and is not computed again.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samplers import interval, machine

import scoresde as ss
from scoresde.build import Run, instantiate
from scoresde.evaluation.references import evenly_spaced
from scoresde.evaluation.restoration import Problem, Restoration, measure, picture_quality, residual, restore
from scoresde.inverse import DDNM, MMPS, Replacement, SizedInpainting, TrainedInpainting, TwistedParticles
from scoresde.samplers import Ancestral, PredictorCorrector, Sampler
from scoresde.tensors import float64

NOISE = 0.05
METRICS = ("psnr", "sample_psnr", "ssim", "sample_ssim", "rmse", "coverage", "residual")
BOXES = {"box": (0.25, 0.75, 0.25, 0.75), "half": (0.0, 1.0, 0.5, 1.0)}  # hidden: top, bottom, left, right

Draw = Callable[[Problem, int, int], Restoration]
"""(problem, n, seed) -> n samples."""


def ancestral(evaluations: int) -> Sampler:
    """Return the ancestral sampler with this number of evaluations of the model."""
    return PredictorCorrector(Ancestral(), steps=evaluations - 1, denoise_final=True)


def methods(trained: Run, prior: Run, passes: int) -> dict[str, Draw]:
    """Return the methods, each with at most this number of passes for a sample."""

    def method(run: Run, build: Any, sampler: Sampler | None) -> Draw:
        return lambda problem, n, seed: restore(run, run.model, problem, build, sampler, n, seed, particles=n)

    return {
        "trained": method(trained, TrainedInpainting, ancestral(passes)),
        "trained, a fifth of the passes": method(trained, TrainedInpainting, ancestral(max(2, passes // 5))),
        "mmps(1)": method(prior, partial(MMPS, iterations=1), ancestral(passes // 2)),
        "mmps(3)": method(prior, partial(MMPS, iterations=3), ancestral(passes // 4)),
        "replacement": method(prior, lambda _, operator, y: Replacement(operator, y), ancestral(passes)),
        "ddnm": method(prior, lambda _, operator, y: DDNM(operator, y, steps=passes - 1), None),
        "particles": method(prior, lambda *_: TwistedParticles(steps=(passes - 1) // 2), None),
    }


def errors(run: Run, problem: Problem, restored: Restoration) -> dict[str, float]:
    """Return the METRICS of a restoration."""
    hidden = ~problem.operator.mask.expand(problem.state.shape)
    x, truth, mean = restored.x, problem.state, restored.mean
    row = picture_quality(run, mean[None].float(), problem.data)
    row |= {f"sample_{name}": value for name, value in picture_quality(run, x, problem.data).items()}
    row["rmse"] = float((mean - float64(truth))[hidden].square().mean().sqrt())
    inside = (x.amin(dim=0) <= truth) & (truth <= x.amax(dim=0))
    row["coverage"] = float(inside[hidden].double().mean())
    return row | {"residual": residual(problem, x)}


def cell(draw: Draw, run: Run, mask: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the METRICS of a method for each patch, and its passes for a sample."""
    operator = SizedInpainting(BOXES[mask], noise_std=NOISE)(tuple(run.config.data.shape))
    dataset = instantiate(run.config.data.test)
    rows, used = [], 0
    for number, index in enumerate(evenly_spaced(len(dataset), options.patches).tolist()):
        problem = measure(run, operator, dataset[index], seed=number)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of particles that are equal
            restored = draw(problem, options.samples, 1000 * number)
        used = max(used, restored.nfe + restored.backward)
        rows.append(errors(run, problem, restored))
    if used > options.passes:
        raise RuntimeError(f"a method must make at most {options.passes} passes; it made {used}")
    return {"passes": used, "rows": [[row[name] for name in METRICS] for row in rows]}


def stated(values: np.ndarray, digits: int) -> str:
    """Format the mean of values (P,) with its interval."""
    low, high = interval(lambda rows: rows.mean(axis=-1), values)
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_cell(mask: str, name: str, found: dict[str, Any]) -> None:
    """Print the row of a method."""
    columns = dict(zip(METRICS, np.array(found["rows"]).T, strict=True))
    digits = {"psnr": 2, "sample_psnr": 2, "residual": 4}
    cells = " | ".join(stated(columns[key], digits.get(key, 3)) for key in METRICS)
    print(f"| {mask} | {name} | {found['passes']} | {cells} |", flush=True)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", help="the run that was trained for inpainting")
    parser.add_argument("prior", help="the run of the other methods")
    parser.add_argument("--passes", type=int, default=50, help="forward and backward passes for each sample")
    parser.add_argument("--patches", type=int, default=16, help="number of test patches")
    parser.add_argument("--samples", type=int, default=19, help="samples for each patch")
    parser.add_argument("--masks", nargs="*", default=tuple(BOXES), choices=BOXES)
    parser.add_argument("--store", type=Path, help="JSON lines of the cells; those in it are not run again")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    options = arguments()
    torch.set_num_threads(1)
    trained, prior = ss.load(options.trained), ss.load(options.prior)
    known = {}
    if options.store and options.store.exists():
        known = dict(json.loads(line) for line in options.store.read_text().splitlines())
    level = (options.samples - 1) / (options.samples + 1)
    print(
        f"{machine('cpu')}; {options.patches} patches, {options.samples} samples; coverage of intervals of {level:.0%}"
    )
    print("| mask | method | passes | " + " | ".join(METRICS) + " |\n" + "| --- " * (3 + len(METRICS)) + "|")
    for mask in options.masks:
        for name, draw in methods(trained, prior, options.passes).items():
            key = json.dumps([mask, name, options.passes, options.patches, options.samples])
            if key not in known:
                known[key] = cell(draw, prior, mask, options)
                if options.store:
                    with options.store.open("a") as file:
                        file.write(json.dumps([key, known[key]]) + "\n")
            print_cell(mask, name, known[key])


if __name__ == "__main__":
    main()
