"""Patches of two photographs: real colour images where nothing can be downloaded.

scikit-learn brings two photographs, china.jpg and flower.jpg, of 427 x 640 pixels. Each is cut into eight vertical
strips of 80 columns, and each strip belongs to one split:

    columns   0-79   80-159  160-239     240-319  320-399  400-479     480-559  560-639
    china     train  train   validation  train    train    train       test     train
    flower    train  test    train       train    train    validation  train    train

A patch lies within one run of neighbouring strips of its split, so no pixel is in the patches of two splits. They show
the same two scenes all the same: a likelihood on these tests a method, not how it generalises to other photographs.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde.data.items import Items

STRIP = 80
LAYOUT = {
    "china.jpg": ("train", "train", "validation", "train", "train", "train", "test", "train"),
    "flower.jpg": ("train", "test", "train", "train", "train", "validation", "train", "train"),
}
SPLITS = ("train", "validation", "test")


class Patches(Items):
    """Square patches of the two photographs: 3 x size x size, levels 0 to 255, at all positions of a grid.

    In the order of the photographs, their regions from left to right, and rows then columns of the grid in each. With
    size 16 and stride 4 the training patches are 22,866; patches of size 16 that do not overlap are 1,560 to train on,
    260 to validate and 260 to test.

    Args:
        size: height and width, at most 80.
        split: "train", "validation" or "test".
        stride: between positions, down and across; `size` unless given, so that patches do not overlap: the standard
            error over a test set rests on samples that are independent.
        flip: whether the mirror images follow the patches.

    Raises:
        ValueError: another split, a size that does not fit into a strip, a stride below 1.
    """

    def __init__(self, size: int = 16, split: str = "train", stride: int | None = None, flip: bool = False):
        if split not in SPLITS:
            raise ValueError(f"split among {', '.join(SPLITS)} expected; got {split!r}")
        stride = size if stride is None else stride
        if not 1 <= size <= STRIP or stride < 1:
            raise ValueError(f"1 <= size <= {STRIP} and stride >= 1 expected; got size={size}, stride={stride}")
        self.size, self.flip = size, flip
        photographs = _photographs()
        self.photographs = torch.from_numpy(np.stack([photographs[name] for name in LAYOUT])).movedim(-1, 1)
        height = self.photographs.shape[2]
        self.positions = [
            (photograph, top, left)
            for photograph, strips in enumerate(LAYOUT.values())
            for start, stop in _regions(strips, split)
            for top in range(0, height - size + 1, stride)
            for left in range(start, stop - size + 1, stride)
        ]

    def count(self) -> int:
        """The patches, without mirror images."""
        return len(self.positions)

    def state(self, item: int) -> Tensor:
        """One patch."""
        photograph, top, left = self.positions[item]
        return self.photographs[photograph, :, top : top + self.size, left : left + self.size].float()


def _photographs() -> dict[str, np.ndarray]:
    """scikit-learn's photographs by name, each (427, 640, 3) uint8."""
    from sklearn.datasets import load_sample_images  # here, for its import takes longer than that of the library

    found = load_sample_images()
    images = {Path(name).name: image for name, image in zip(found.filenames, found.images, strict=True)}
    for name in LAYOUT:
        shape = images[name].shape if name in images else None
        if shape != (427, 640, 3):
            raise ValueError(
                f"{name} of 427 x 640 x 3 expected from scikit-learn; got {shape}: install another version"
            )
    return images


def _regions(strips: tuple[str, ...], split: str) -> list[tuple[int, int]]:
    """The runs of neighbouring strips of a split, as (first column, column after the last)."""
    edges = [i for i in range(len(strips) + 1) if i in (0, len(strips)) or strips[i] != strips[i - 1]]
    pairs = pairwise(edges)
    return [(STRIP * first, STRIP * last) for first, last in pairs if strips[first] == split]
