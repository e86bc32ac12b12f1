"""Bits per dimension of Gaussian densities, the baselines of the score models.

    python benchmarks/baselines.py            # the digits
    python benchmarks/baselines.py patches    # colour patches of photographs

The densities are fitted on the training split, and the number of components and the regularisation of the covariance
are chosen on the validation split. The chosen density of the digits is fitted again with the validation split included,
as the score models are, and measured on the test split. All splits are uniformly dequantised. The script prints the
rows of benchmarks/RESULTS.md.
"""

import argparse
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from scoresde.data import Digits, Patches

COMPONENTS = (5, 10, 20, 40)
REGULARISATION = {"digits": (0.05, 0.1, 0.2, 0.5, 1.0), "patches": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)}
COPIES = {"digits": 4, "patches": 1}  # dequantised copies of each training image


def digits(split: str) -> np.ndarray:
    """Return the digits of a split (n, 64), in grey levels."""
    return Digits(split).images.flatten(1).numpy()


def patches(split: str) -> np.ndarray:
    """Return the patches of a split (n, 768), in levels; training patches overlap."""
    name = "train" if split == "fit" else split
    data = Patches(split=name, stride=4 if name == "train" else None)
    return torch.stack([data[i] for i in range(len(data))]).flatten(1).numpy()


DATA: dict[str, Callable[[str], np.ndarray]] = {"digits": digits, "patches": patches}


class Density:
    """Gaussian mixtures with full covariances on one of the datasets."""

    def __init__(self, name: str):
        self.copies, self.images = COPIES[name], {split: DATA[name](split) for split in ("train", "fit")}
        self.measured = {split: DATA[name](split) for split in ("validation", "test")}

    def fit(self, split: str, components: int, regularisation: float) -> GaussianMixture:
        """Fit a mixture to a split."""
        model = GaussianMixture(components, reg_covar=regularisation, random_state=0)
        return model.fit(dequantised(self.images[split].repeat(self.copies, axis=0), seed=0))

    def bits(self, model: GaussianMixture, split: str) -> tuple[float, float]:
        """Return the mean bits per dimension of a split and its standard error over images."""
        images = self.measured[split]
        per_image = -model.score_samples(dequantised(images, seed=1)) / (images.shape[1] * math.log(2))
        return float(per_image.mean()), float(per_image.std(ddof=1) / math.sqrt(len(per_image)))


def dequantised(images: np.ndarray, seed: int) -> np.ndarray:
    """Add uniform noise on [0, 1) to the levels."""
    return images + np.random.default_rng(seed).uniform(size=images.shape)


def main() -> None:
    """Choose each density on the validation split, fit it on all training data and print its test results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="digits", choices=DATA)
    name = parser.parse_args().data
    density = Density(name)
    print("| density | bits/dim on test |\n| --- | --- |")
    for title, counts in (("Gaussian, full covariance", (1,)), ("mixture of Gaussians", COMPONENTS)):
        grid = itertools.product(counts, REGULARISATION[name])
        best = min(grid, key=lambda setting: density.bits(density.fit("train", *setting), "validation")[0])
        mean, stderr = density.bits(density.fit("fit", *best), "test")
        print(f"| {title}, {best[0]} component(s), regularisation {best[1]} | {mean:.3f} +- {stderr:.3f} |", flush=True)


if __name__ == "__main__":
    main()
