"""The splits of the digits, and the shapes of the toys."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from scoresde.data import Digits, Toy2D
from tests.data.files import stacked

SIZES = {"train": 1300, "validation": 200, "test": 297, "fit": 1500}
ORDER = np.random.RandomState(0).permutation(1797)


def test_splits_are_the_permuted_digits_each_once():
    expected = torch.from_numpy(load_digits().images[ORDER]).float()[:, None]
    parts = {split: stacked(Digits(split)) for split in SIZES}
    assert {split: len(part) for split, part in parts.items()} == SIZES
    assert torch.equal(torch.cat([parts["train"], parts["validation"], parts["test"]]), expected)
    assert torch.equal(parts["fit"], torch.cat([parts["train"], parts["validation"]]))
    assert len(expected.flatten(1).unique(dim=0)) == 1797  # no test image is a training image


def test_digits_have_labels_on_request():
    pairs = Digits("test", labels=True)
    assert [int(label) for _, label in (pairs[i] for i in range(297))] == load_digits().target[ORDER[1500:]].tolist()
    assert torch.equal(pairs[5][0], Digits("test")[5])
    assert (pairs[0][1].dtype, pairs[0][1].shape) == (torch.int64, ())
    assert pairs.class_names == {"label": [str(digit) for digit in range(10)]}
    assert not hasattr(Digits("test"), "class_names")


def curves(name):
    """Return the curves that a toy scatters its points around, 1,000 points of each."""
    half, turn = np.linspace(0, np.pi, 1000), np.linspace(0, 2 * np.pi, 1000)
    if name == "moons":
        outer, inner = np.c_[np.cos(half), np.sin(half)], np.c_[1 - np.cos(half), 0.5 - np.sin(half)]
        return 1.2 * (np.concatenate([outer, inner]) - [0.5, 0.25])
    if name == "rings":
        return np.concatenate([radius * np.c_[np.cos(turn), np.sin(turn)] for radius in (0.5, 1, 1.5, 2)])
    along = np.linspace(0, 3 * np.pi, 1000)
    arm = np.c_[-np.cos(along), np.sin(along)] * along[:, None] / 5
    return np.concatenate([arm, -arm])


@pytest.mark.parametrize(("name", "noise"), [("moons", 0.072), ("rings", 0.04), ("spirals", 0.05)])
def test_toy_lies_along_its_curve_and_covers_it(name, noise):
    points = stacked(Toy2D(name, n=1000)).double()
    distances = torch.cdist(points, torch.from_numpy(curves(name))).numpy()
    to_curve, to_points = distances.min(axis=1), distances.min(axis=0)
    assert to_curve.max() < 5 * noise
    # Along the normal of the curve the noise is Gaussian: its mean distance is (2/pi)^(1/2) of the standard deviation.
    assert to_curve.mean() == pytest.approx(noise * np.sqrt(2 / np.pi), rel=0.1)
    assert to_points.max() < 0.3
    shares = np.bincount(distances.argmin(axis=1) // 1000) / len(points)
    assert shares == pytest.approx(1 / len(shares), abs=0.05)


def test_checkerboard_is_uniform_on_every_other_square():
    points = stacked(Toy2D("checkerboard", n=8000)).double().numpy() + 2
    column, row = np.floor(points).astype(int).T
    assert points.min() >= 0
    assert points.max() <= 4
    assert set((row + column) % 2) == {0}
    squares = np.bincount(4 * row + column, minlength=16)
    assert squares[squares > 0] == pytest.approx(np.full(8, 1000), abs=150)
    quartiles = np.quantile(points % 1, [0.25, 0.5, 0.75], axis=0)
    assert quartiles == pytest.approx(np.array([[0.25], [0.5], [0.75]]) * np.ones(2), abs=0.03)


@pytest.mark.parametrize("name", ["moons", "checkerboard", "spirals", "rings"])
def test_toys_are_drawn_from_their_seed(name):
    points = stacked(Toy2D(name, n=100, seed=3))
    assert (points.shape, points.dtype) == ((100, 2), torch.float32)
    assert torch.equal(points, stacked(Toy2D(name, n=100, seed=3)))
    assert not torch.equal(points, stacked(Toy2D(name, n=100, seed=4)))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="train, validation, test, fit; got 'valid'"):
        Digits("valid")
    with pytest.raises(ValueError, match="name must be one of moons, checkerboard, spirals, rings; got 'moon'"):
        Toy2D("moon")
    with pytest.raises(ValueError, match="got 0"):
        Toy2D("moons", n=0)
