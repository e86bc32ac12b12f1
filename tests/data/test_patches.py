"""Patches show the pixels of the photographs, and no pixel is in two splits."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from scoresde.data import Patches

SPLITS = ("train", "validation", "test")
PHOTOGRAPHS = np.stack(load_sample_images().images)  # china, flower


def pixels(dataset):
    """Return how many patches each pixel is in, (2, 427, 640)."""
    counts = np.zeros(PHOTOGRAPHS.shape[:3], int)
    for photograph, top, left in dataset.entries:
        counts[photograph, top : top + dataset.size, left : left + dataset.size] += 1
    return counts


@pytest.mark.parametrize(("size", "stride"), [(16, 4), (16, None), (80, 7), (33, 3)])
def test_no_pixel_is_in_two_splits(size, stride):
    covered = [pixels(Patches(size, split, stride)) > 0 for split in SPLITS]
    assert sum(mask.astype(int) for mask in covered).max() == 1
    assert all(mask.any(axis=(1, 2)).all() for mask in covered)  # of both photographs


def test_regions_are_those_of_the_table():
    """80 columns per letter; patches of 4 x 4 leave out the last three of 427 rows."""
    layout = {
        "train": ["##.###.#", "#.###.##"],
        "validation": ["..#.....", ".....#.."],
        "test": ["......#.", ".#......"],
    }
    for split, rows in layout.items():
        covered = pixels(Patches(4, split))[:, :424]
        expected = np.array([[letter == "#" for letter in row] for row in rows]).repeat(80, axis=1)
        assert np.array_equal(covered, np.broadcast_to(expected[:, None], covered.shape))


@pytest.mark.parametrize("split", SPLITS)
def test_patches_show_the_photographs(split):
    dataset = Patches(16, split, stride=11, flip=True)
    assert len(dataset) == 2 * len(dataset.entries)
    for i in range(0, len(dataset.entries), 37):
        photograph, top, left = dataset.entries[i]
        expected = PHOTOGRAPHS[photograph, top : top + 16, left : left + 16]
        assert dataset[i].dtype == torch.float32
        assert np.array_equal(dataset[i].permute(1, 2, 0), expected)


def test_positions_are_all_on_the_grid_and_do_not_overlap_by_default():
    assert [len(Patches(16, split)) for split in SPLITS] == [1560, 260, 260]
    assert all(pixels(Patches(16, split)).max() == 1 for split in SPLITS)
    positions = Patches(16, "train", stride=4).entries
    assert len(positions) == 22_866
    assert {(top % 4, left % 4) for _, top, left in positions} == {(0, 0)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "all"}, "split must be one of train, validation, test; got 'all'"),
        ({"size": 81}, "1 <= size <= 80 and stride >= 1 are required; got size=81, stride=81"),
        ({"size": 0}, "got size=0"),
        ({"stride": 0}, "got size=16, stride=0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Patches(**arguments)


def test_other_photographs_are_refused(monkeypatch):
    monkeypatch.setattr("sklearn.datasets.load_sample_image", lambda name: PHOTOGRAPHS[0, :400])
    with pytest.raises(ValueError, match=r"must have shape \(2, 427, 640, 3\); got \(2, 400, 640, 3\)"):
        Patches()
