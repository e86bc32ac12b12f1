"""Patches: pixels of the photographs, none of them in two splits."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from scoresde.data import Patches

SPLITS = ("train", "validation", "test")
PHOTOGRAPHS = np.stack(load_sample_images().images)  # china, flower


def pixels(dataset):
    """How many patches each pixel is in, (2, 427, 640)."""
    seen = np.zeros(PHOTOGRAPHS.shape[:3], int)
    for photograph, top, left in dataset.positions:
        seen[photograph, top : top + dataset.size, left : left + dataset.size] += 1
    return seen


@pytest.mark.parametrize(("size", "stride"), [(16, 4), (16, None), (8, 5), (80, 7), (2, None), (33, 3)])
def test_no_pixel_is_in_two_splits(size, stride):
    seen = [pixels(Patches(size, split, stride)) > 0 for split in SPLITS]
    assert sum(mask.astype(int) for mask in seen).max() == 1
    assert all(mask.any(axis=(1, 2)).all() for mask in seen)  # of both photographs


def test_regions_are_those_of_the_table():
    """80 columns for each letter; 2 x 2 pixels leave out the last of 427 rows."""
    layout = {
        "train": ["##.###.#", "#.###.##"],
        "validation": ["..#.....", ".....#.."],
        "test": ["......#.", ".#......"],
    }
    for split, rows in layout.items():
        seen = pixels(Patches(2, split))[:, :426]
        expected = np.array([[letter == "#" for letter in row] for row in rows]).repeat(80, axis=1)
        assert np.array_equal(seen, np.broadcast_to(expected[:, None], seen.shape))


@pytest.mark.parametrize("split", SPLITS)
def test_patches_are_what_the_photographs_show_there(split):
    dataset = Patches(16, split, stride=11)
    for i in range(0, len(dataset), 37):
        photograph, top, left = dataset.positions[i]
        state = dataset[i]
        assert (state.shape, state.dtype) == ((3, 16, 16), torch.float32)
        expected = PHOTOGRAPHS[photograph, top : top + 16, left : left + 16]
        assert np.array_equal(state.permute(1, 2, 0).numpy(), expected)


def test_positions_are_all_on_the_grid_and_do_not_overlap_by_default():
    assert [len(Patches(16, split)) for split in SPLITS] == [1560, 260, 260]
    assert len(Patches(16, "train", stride=4)) == 22_866
    for split in SPLITS:
        assert pixels(Patches(16, split)).max() == 1
    shifts = {(top % 4, left % 4) for _, top, left in Patches(16, "train", 4).positions}
    assert shifts == {(0, 0)}


def test_mirror_images_follow_the_patches():
    plain, flipped = Patches(8, "test"), Patches(8, "test", flip=True)
    assert len(flipped) == 2 * len(plain)
    for i in (0, 17, len(plain) - 1):
        assert torch.equal(flipped[i], plain[i])
        assert torch.equal(flipped[len(plain) + i], plain[i][:, :, range(7, -1, -1)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "all"}, "split among train, validation, test expected; got 'all'"),
        ({"size": 81}, "1 <= size <= 80 and stride >= 1 expected; got size=81, stride=81"),
        ({"size": 0}, "got size=0"),
        ({"stride": 0}, "got size=16, stride=0"),
    ],
)
def test_refuses_what_there_is_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        Patches(**arguments)


def test_other_photographs_are_refused(monkeypatch):
    class Found:
        filenames = ("x/china.jpg",)
        images = (PHOTOGRAPHS[0],)

    monkeypatch.setattr("sklearn.datasets.load_sample_images", Found)
    with pytest.raises(ValueError, match=r"flower\.jpg of 427 x 640 x 3 expected from scikit-learn; got None"):
        Patches()
