"""Datasets without a download: scikit-learn's digits, and toys in two dimensions.

Any `torch.utils.data.Dataset` can replace them. An item is a state, a tensor `*` in the data's own units (integer grey
levels for images), or a pair (state, condition), where the condition is a tensor or a dict of tensors.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from scoresde.arguments import Count, Seed32, checked
from scoresde.data.items import LABEL, Items, check_choice

SPLITS = {"train": slice(0, 1300), "validation": slice(1300, 1500), "test": slice(1500, 1797), "fit": slice(0, 1500)}


class Digits(Items):
    """scikit-learn's 1,797 handwritten digits (UCI, Alpaydin and Kaynak 1998): 1 x 8 x 8, levels 0 to 16.

    The splits follow each other in numpy.random.RandomState(0).permutation(1797): "train" has 1,300 images,
    "validation" 200, "test" 297. "fit" is train and validation together, for the final model once every choice has been
    made.

    Args:
        split: "train", "validation", "fit" or "test".
        labels: if True, items are pairs (image, digit), where the digit is an int64 tensor (); the classes are named
            "0" to "9".
    """

    def __init__(self, split: str, labels: bool = False):
        check_choice("split", split, SPLITS)
        from sklearn.datasets import load_digits  # imported late: scikit-learn takes longer to import than scoresde

        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.images))[SPLITS[split]]
        self.images = torch.from_numpy(digits.images[order]).float()[:, None]
        names = {LABEL: [str(digit) for digit in range(10)]}
        classes = torch.from_numpy(digits.target[order]).long()
        super().__init__(self.images, classes if labels else None, class_names=names if labels else None)


def moons(n: int, rng: np.random.RandomState) -> np.ndarray:
    """Draw from two interleaved half circles (scikit-learn), centred and scaled to about unit size."""
    from sklearn.datasets import make_moons  # imported late, see Digits

    points, _ = make_moons(n, noise=0.06, random_state=rng)
    return (points - np.array([0.5, 0.25])) * 1.2


def checkerboard(n: int, rng: np.random.RandomState) -> np.ndarray:
    """Draw uniformly from every other square of a 4 x 4 board on [-2, 2]^2."""
    row, half = rng.randint(0, 4, n), rng.randint(0, 2, n)
    corner = np.stack([2 * half + row % 2, row], axis=1)
    return corner + rng.uniform(size=(n, 2)) - 2


def spirals(n: int, rng: np.random.RandomState) -> np.ndarray:
    """Draw from the two arms of a spiral, one and a half turns each."""
    angle = 3 * np.pi * np.sqrt(rng.uniform(size=n))
    arm = rng.choice([-1.0, 1.0], size=n)[:, None]
    curve = np.stack([-np.cos(angle), np.sin(angle)], axis=1) * angle[:, None] / 5
    return arm * curve + 0.05 * rng.normal(size=(n, 2))


def rings(n: int, rng: np.random.RandomState) -> np.ndarray:
    """Draw from four concentric circles of radius 0.5, 1, 1.5 and 2."""
    radius = 0.5 * rng.randint(1, 5, n) + 0.04 * rng.normal(size=n)
    angle = 2 * math.pi * rng.uniform(size=n)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]


TOYS: dict[str, Callable[[int, np.random.RandomState], np.ndarray]] = {
    function.__name__: function for function in (moons, checkerboard, spirals, rings)
}


@checked
class Toy2D(Items):
    """Points of a distribution in the plane, drawn once from a seed: items are float32 tensors (2,).

    Args:
        name: "moons", "checkerboard", "spirals" or "rings".
        n: number of points.
        seed: seed of the draw; use another one for a test set.

    Raises:
        ValueError: the name is unknown, or n < 1.
    """

    def __init__(self, name: str = "moons", n: Count = 10_000, seed: Seed32 = 0):
        check_choice("name", name, TOYS)
        if n < 1:
            raise ValueError(f"the number of points must be 1 or more; got n={n}")
        self.points = torch.from_numpy(TOYS[name](n, np.random.RandomState(seed))).float()
        super().__init__(self.points)
