"""Operators that are completed when the shape of the states is known, as in the configuration of `scoresde restore`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from scoresde.arguments import Named, Share, checked
from scoresde.configured import Configured
from scoresde.data.image_files import Reader
from scoresde.data.items import reading
from scoresde.inverse.general_operators import Inpainting
from scoresde.inverse.operators import Operator, checked_mask

Box = tuple[Share, Share, Share, Share]
File = Annotated[str | int, Named("a path")]
CENTRE = (0.25, 0.75, 0.25, 0.75)


class SizedOperator(Configured):
    """A function from the shape `*` of a state to an `Operator`, for configurations that do not know the shape.

    A subclass defines `__call__(shape)`.
    """

    def __call__(self, shape: Sequence[int]) -> Operator:
        """Return the operator for states of this shape."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(shape)")


@checked
class SizedInpainting(SizedOperator):
    """`Inpainting` of images outside of a box, or of states where a mask in a file is true.

    Args:
        box: (top, bottom, left, right) of the hidden rectangle, as shares of the height and of the width, rounded to
            whole pixels; ignored if there is a mask.
        mask: a NumPy file (.npy) of bools or numbers 0 and 1, of the shape of a state or of all but its first
            dimension; or an image of the height and width of the states, white where they are measured.
        noise_std: standard deviation of a measurement's noise, a number or one for each of its entries; 0 for none.

    Raises:
        ValueError: the box is empty; in a call, it hides no pixel or all of them, or states are not images; or the
            file is not a mask of this shape.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, box: Box = CENTRE, mask: File | None = None, noise_std: float | Tensor = 0.0):
        top, bottom, left, right = box
        if not (top < bottom and left < right):
            raise ValueError(f"box must be (top, bottom, left, right) with top < bottom and left < right; got {box}")
        self.box, self.mask, self.noise_std = (top, bottom, left, right), mask, noise_std

    def __call__(self, shape: Sequence[int]) -> Inpainting:
        mask = box_mask(self.box, shape) if self.mask is None else read_mask(Path(str(self.mask)), shape)
        return Inpainting(mask, self.noise_std)


def box_mask(box: Box, shape: Sequence[int]) -> Tensor:
    """Return the mask (H, W) that is true outside of a box, for images of the shape (C, H, W); see `SizedInpainting`.

    Raises:
        ValueError: the shape is another one, or the box has no pixel, or all of them.
    """
    if len(shape) != 3:
        raise ValueError(
            f"a box needs images (C, H, W); got states {tuple(shape)}: give a mask of their shape, mask=FILE, true "
            "where they are measured"
        )
    height, width = shape[1:]
    rows = slice(round(box[0] * height), round(box[1] * height))
    columns = slice(round(box[2] * width), round(box[3] * width))
    mask = torch.ones(height, width, dtype=torch.bool)
    mask[rows, columns] = False
    if bool(mask.all()) or not bool(mask.any()):
        raise ValueError(
            f"box must hide some pixels of {height} x {width}, and not all; got {box}, which hides "
            f"{'none' if bool(mask.all()) else 'all'}"
        )
    return mask


def read_mask(path: Path, shape: Sequence[int]) -> Tensor:
    """Return the mask in a file, of the shape of a state or of all but its first dimension; see `SizedInpainting`.

    Raises:
        ValueError: the file holds something else.
        FileNotFoundError: there is no such file.
    """
    shapes = tuple(shape), tuple(shape[1:])
    if path.suffix == ".npy":
        with reading(path, "an array in NumPy's format", "write it with numpy.save"):
            mask = np.load(path, allow_pickle=False)
    elif len(shape) == 3:
        mask = Reader(shape[1:], channels=1)(path.read_bytes, path)[0] > 127.5
    else:
        raise ValueError(f"a mask for states {shapes[0]} must be a .npy file; got {path}")
    try:
        mask = checked_mask(mask)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a mask: {error}") from error
    if mask.shape not in shapes:
        expected = " or ".join(map(str, filter(None, shapes)))
        raise ValueError(f"the mask in {path} must have the shape {expected}; got {tuple(mask.shape)}")
    return mask
