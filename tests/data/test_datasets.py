"""Datasets: the digits' splits, and the shapes of the toys."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from scoresde.data import Digits, Toy2D

SIZES = {"train": 1300, "validation": 200, "test": 297, "fit": 1500}
TOYS = ["moons", "checkerboard", "spirals", "rings"]


def stacked(dataset):
    return torch.stack([dataset[i] for i in range(len(dataset))])


@pytest.mark.parametrize(("split", "size"), SIZES.items())
def test_digits_are_grey_levels_of_one_split(split, size):
    images = stacked(Digits(split))
    assert images.shape == (size, 1, 8, 8)
    assert set(images.unique().tolist()) == set(range(17))


def test_splits_are_the_permuted_digits_each_once():
    order = np.random.RandomState(0).permutation(1797)
    expected = torch.from_numpy(load_digits().images[order]).float()[:, None]
    parts = {split: stacked(Digits(split)) for split in SIZES}
    assert torch.equal(torch.cat([parts["train"], parts["validation"], parts["test"]]), expected)
    assert torch.equal(parts["fit"], torch.cat([parts["train"], parts["validation"]]))
    # No two of the 1,797 are the same picture: none that is trained on is tested on either.
    assert len(expected.flatten(1).unique(dim=0)) == 1797


def curves(name):
    """The curves, 1,000 points of each, that a toy scatters its points around."""
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
    assert np.count_nonzero(squares) == 8
    assert squares[squares > 0] == pytest.approx(1000, abs=150)
    assert np.quantile(points % 1, [0.25, 0.5, 0.75], axis=0) == pytest.approx(
        np.array([[0.25], [0.5], [0.75]]) * np.ones(2), abs=0.03
    )


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_drawn_from_their_seed(name):
    points = stacked(Toy2D(name, n=100, seed=3))
    assert points.shape == (100, 2)
    assert points.dtype == torch.float32
    assert bool(torch.isfinite(points).all())
    assert torch.equal(points, stacked(Toy2D(name, n=100, seed=3)))
    assert not torch.equal(points, stacked(Toy2D(name, n=100, seed=4)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Digits("valid"), "train, validation, test, fit expected; got 'valid'"),
        (lambda: Toy2D("moon"), "moons, checkerboard, spirals, rings expected; got 'moon'"),
        (lambda: Toy2D("moons", n=0), "got n=0"),
    ],
    ids=["split", "toy", "n"],
)
def test_refuses_what_there_is_not(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_digits_have_their_labels_if_asked():
    target = load_digits().target[np.random.RandomState(0).permutation(1797)]
    pairs = Digits("test", labels=True)
    assert [int(label) for _, label in pairs] == target[1500:].tolist()
    assert torch.equal(pairs[5][0], Digits("test")[5])
    assert (pairs[0][1].dtype, pairs[0][1].shape) == (torch.int64, ())
