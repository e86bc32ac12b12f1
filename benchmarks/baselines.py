"""Bits per dimension of Gaussian densities on the digits: what a score model has to beat.

    python benchmarks/baselines.py

Fits on the 1,500 training and validation digits, with the number of components and the covariance's regularisation
chosen on the validation split, and measures on the 297 test digits; uniform dequantisation throughout. Prints the rows
of benchmarks/RESULTS.md.
"""

import itertools
import math

import numpy as np
from sklearn.mixture import GaussianMixture

from scoresde.data import Digits

PIXELS = 64
COMPONENTS = (5, 10, 20, 40)
REGULARISATION = (0.05, 0.1, 0.2, 0.5, 1.0)


def levels(split: str, copies: int, seed: int) -> np.ndarray:
    """Dequantised digits (n, 64) in grey levels, each `copies` times."""
    images = Digits(split).images.flatten(1).numpy().repeat(copies, axis=0)
    return images + np.random.default_rng(seed).uniform(size=images.shape)


def bits(model: GaussianMixture, split: str) -> tuple[float, float]:
    """Mean bits per dimension of a split and its standard error over images."""
    per_image = -model.score_samples(levels(split, 1, seed=1)) / (PIXELS * math.log(2))
    return float(per_image.mean()), float(per_image.std(ddof=1) / math.sqrt(len(per_image)))


def fit(split: str, components: int, regularisation: float) -> GaussianMixture:
    """A mixture with full covariances."""
    model = GaussianMixture(components, reg_covar=regularisation, random_state=0)
    return model.fit(levels(split, 4, seed=0))


def main() -> None:
    """Choose on validation, fit on all training data, print test figures."""
    print("| density | bits/dim on test |\n| --- | --- |")
    for name, counts in (("Gaussian, full covariance", (1,)), ("mixture of Gaussians", COMPONENTS)):
        grid = itertools.product(counts, REGULARISATION)
        best = min(grid, key=lambda setting: bits(fit("train", *setting), "validation")[0])
        mean, stderr = bits(fit("fit", *best), "test")
        print(f"| {name}, {best[0]} component(s), regularisation {best[1]} | {mean:.3f} +- {stderr:.3f} |")


if __name__ == "__main__":
    main()
