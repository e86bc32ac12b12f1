"""Patches of two photographs: real colour images without a download.

scikit-learn ships two photographs, china.jpg and flower.jpg, of 427 x 640 pixels. Each is cut into eight vertical
strips of 80 columns, and each strip belongs to one split:

    columns   0-79   80-159  160-239     240-319  320-399  400-479     480-559  560-639
    china     train  train   validation  train    train    train       test     train
    flower    train  test    train       train    train    validation  train    train

A patch lies within one run of neighbouring strips of its split, so no pixel is in the patches of two splits. All splits
still show the same two scenes: likelihoods of these splits test a method, not generalisation to other photographs.
"""

import numpy as np
import torch
from torch import Tensor

from scoresde.data.items import Items, check_choice

STRIP = 80
REGIONS = {  # (number of the photograph, first column, column after the last)
    "train": [(0, 0, 160), (0, 240, 480), (0, 560, 640), (1, 0, 80), (1, 160, 400), (1, 480, 640)],
    "validation": [(0, 160, 240), (1, 400, 480)],
    "test": [(0, 480, 560), (1, 80, 160)],
}


class Patches(Items):
    """Square patches of the two photographs: 3 x size x size, levels 0 to 255, at all positions of a grid.

    The patches are ordered by photograph, by region from left to right, and by row and column of the grid in each
    region. With size 16 and stride 4 there are 22,866 training patches; without overlap (stride 16) there are 1,560 for
    training, 260 for validation and 260 for testing.

    Args:
        size: height and width, at most 80.
        split: "train", "validation" or "test".
        stride: distance between neighbouring patches, down and across; default `size`, so that patches do not overlap
            (the standard error over a test set assumes independent samples).
        flip: if True, append the mirror images, see `Items`.

    Raises:
        ValueError: the split is unknown, `size` does not fit into a strip, or `stride` is below 1.
    """

    def __init__(self, size: int = 16, split: str = "train", stride: int | None = None, flip: bool = False):
        check_choice("split", split, REGIONS)
        stride = size if stride is None else stride
        if not 1 <= size <= STRIP or stride < 1:
            raise ValueError(f"1 <= size <= {STRIP} and stride >= 1 are required; got size={size}, stride={stride}")
        from sklearn.datasets import load_sample_image  # imported late, see Digits

        photographs = np.stack([load_sample_image(name) for name in ("china.jpg", "flower.jpg")])
        if photographs.shape != (2, 427, 640, 3):
            raise ValueError(
                f"the two photographs of scikit-learn must have shape (2, 427, 640, 3); got {photographs.shape}: "
                "install another version of scikit-learn"
            )
        self.size, self.photographs = size, torch.from_numpy(photographs).movedim(-1, 1)
        positions = [
            (photograph, top, left)
            for photograph, start, stop in REGIONS[split]
            for top in range(0, photographs.shape[1] - size + 1, stride)
            for left in range(start, stop - size + 1, stride)
        ]
        super().__init__(positions, flip=flip)

    def state(self, entry: tuple[int, int, int]) -> Tensor:
        """Return the patch at (photograph, top, left)."""
        photograph, top, left = entry
        return self.photographs[photograph, :, top : top + self.size, left : left + self.size].float()
