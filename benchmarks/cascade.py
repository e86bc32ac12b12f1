"""Cascades of OpenMoji's people, 16 x 16 to 32 x 32: bits of the stages, and samples against the augmentation.

    scoresde train experiment=openmoji_cond
    scoresde train experiment=openmoji_haar
    scoresde train experiment=openmoji_super_resolution
    python benchmarks/cascade.py runs/openmoji_cond runs/openmoji_haar runs/openmoji_super_resolution

The first run is the base, each other one a second stage. Bits are those of the test pictures given their skin tone, by
Adams with --steps steps and one Hutchinson probe, at level 0 of the augmentation. Samples have the tones of the test
pictures and 20 steps of DPM-Solver++(2M) in each stage, with the same base samples at every level of the augmentation.

- Frechet distance: of the colours of 4 x 4 pixels (48 numbers in [-1, 1], every fourth position) of samples and of test
  pictures, with a 95% bootstrap interval over both. The row "training pictures" has as many pictures of the training.
- energy: the mean square of the Haar coefficients other than the mean, relative to that of test pictures.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import scoresde as ss
from scoresde import plots
from scoresde.build import Run, instantiate
from scoresde.data import Haar
from scoresde.metrics.frechet import frechet_distance
from scoresde.metrics.moments import moments
from scoresde.pipelines import Cascade

LEVELS = (0.0, 0.1, 0.3)
RESAMPLES = 200


def split_of(run: Run, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the pictures and the tones of a split, or of `count` items evenly spaced in it."""
    dataset = instantiate(run.config.data[split])
    rows = range(len(dataset)) if count is None else [i * len(dataset) // count for i in range(count)]
    items = [dataset[i] for i in rows]
    return torch.stack([x for x, _ in items]), torch.stack([torch.as_tensor(tone) for _, tone in items])


def patches(x: Tensor) -> Tensor:
    """Return the 4 x 4 patches of pictures (N, 3, H, W) of grey levels, scaled to [-1, 1]: (N, positions, 48)."""
    return F.unfold(x.double() / 128 - 1, 4, stride=4).transpose(1, 2)


def frechet(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of patches (N, positions, 48) of two sets of pictures."""
    return float(frechet_distance(*moments(first.flatten(0, 1)), *moments(second.flatten(0, 1))))


def interval(first: Tensor, second: Tensor) -> str:
    """Return the Frechet distance with its 95% bootstrap interval over pictures."""
    rng = np.random.RandomState(0)
    drawn = [[torch.from_numpy(rng.randint(len(x), size=len(x))) for x in (first, second)] for _ in range(RESAMPLES)]
    low, high = np.quantile([frechet(first[i], second[j]) for i, j in drawn], [0.025, 0.975])
    return f"{frechet(first, second):.3f} [{low:.3f}, {high:.3f}]"


def energy(x: Tensor) -> float:
    """Return the mean square of the Haar coefficients other than the mean."""
    return float(Haar().fine(x.double() / 128 - 1).square().mean())


def bits(cascade: Cascade, run: Run, steps: int) -> str:
    """Return the bits of the test pictures as a row: the parts of both stages and their sum."""
    x, tones = split_of(run, "test")
    found = cascade.bits_per_dim(x, tones, solver=ss.solvers.Adams(steps=steps), batch_size=76)
    parts = [*found.stages.T, found.per_image]
    return " | ".join(f"{part.mean():.3f} +- {part.std() / len(part) ** 0.5:.3f}" for part in parts)


def main() -> None:
    """Print both tables, and save a picture of samples in the directory of each second stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--n", type=int, default=76)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} used; PyTorch {torch.__version__}\n")
    base, stages = ss.load(options.base), [ss.load(path) for path in options.stages]
    cascades = {Path(run.path).name: (run, Cascade([base, run])) for run in stages}
    print("| second stage | split | first stage | second stage, given the first | sum, bits/dim |")
    print("| --- | --- | --- | --- | --- |")
    for name, (run, cascade) in cascades.items():
        print(f"| {name} | {run.stage.resolutions} | {bits(cascade, run, options.steps)} |", flush=True)
    reference, tones = split_of(stages[0], "test")
    tones = tones[torch.arange(options.n) % len(tones)]
    print("\n| second stage | augmentation | Frechet distance [95%] | energy |\n| --- | --- | --- | --- |")
    training = split_of(stages[0], "train", options.n)[0]
    row = f"{interval(patches(training), patches(reference))} | {energy(training) / energy(reference):.2f}"
    print(f"| training pictures | | {row} |", flush=True)
    for name, (run, cascade) in cascades.items():
        for level in LEVELS:
            x = cascade.sample(options.n, tones, range(options.n), augmentation=level, batch_size=76).x
            row = f"{interval(patches(x), patches(reference))} | {energy(x) / energy(reference):.2f}"
            print(f"| {name} | {level:g} | {row} |", flush=True)
            credit = run.config.data.credit
            plots.save_samples(x[:40], run.path / "figures" / f"cascade_{level:g}.png", 0, 256, credit=credit)


if __name__ == "__main__":
    main()
