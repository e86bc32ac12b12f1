"""Operators with the shape of the states that they measure, and their matrices."""

import torch

from scoresde.inverse import Blur, Colour, Downsampling, Fourier, Grey, Inpainting, Linear
from tests.conftest import normal

MASK = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
KERNEL = torch.tensor([[0.1, 0.2, 0.0], [0.1, 0.4, 0.15], [0.0, 0.05, 0.1]])
GREY_ONLY = torch.zeros(3, 2, 2)
GREY_ONLY[0] = 1
MATRIX = normal(3, 4, seed=3)
OPERATORS = {
    "inpainting": (Inpainting(MASK), (4, 4)),
    "inpainting each channel": (Inpainting(MASK), (2, 4, 4)),
    "inpainting vectors": (Inpainting(torch.tensor([True, False, True])), (3,)),
    "box": (Downsampling(2), (1, 4, 6)),
    "box of 3": (Downsampling(3), (6, 3)),
    "bicubic": (Downsampling(2, "bicubic"), (2, 6, 8)),
    "bicubic of 3": (Downsampling(3, "bicubic"), (6, 9)),
    "own filter": (Downsampling(2, KERNEL), (4, 6)),
    "blur": (Blur(KERNEL), (2, 4, 5)),
    "singular blur": (Blur(torch.tensor([[0.5, 0.5]])), (4, 4)),
    "a kernel larger than the image": (Blur(normal(7, 5)), (3, 4)),
    "grey": (Grey(), (3, 2, 2)),
    "luminance": (Grey(weights=[0.299, 0.587, 0.114]), (3, 5)),
    "colour": (Colour(), (3, 2, 2)),
    "colourisation": (Inpainting(GREY_ONLY) @ Colour(), (3, 2, 2)),
    "blurred colour": (Colour() @ Blur(KERNEL), (3, 4, 4)),
    "fourier": (Fourier(MASK), (4, 4)),
    "fourier each channel": (Fourier(normal(3, 5, seed=1) > 0), (2, 3, 5)),
    "matrix": (Linear(MATRIX, shape=(2, 2)), (2, 2)),
    "wide matrix": (Linear(MATRIX), (4,)),
    "singular matrix": (Linear(MATRIX[[0, 1, 1, 0, 2, 2]]), (4,)),
    "functions": (Linear(lambda x: 2 * x[:, :1] - x[:, 1:], lambda y: torch.cat((2 * y, -y), dim=1)), (2, 3)),
    "a composition": (Downsampling(2) @ Blur(KERNEL), (4, 6)),
}


def matrix_of(operator, shape):
    """The matrix (m, D) of an operator, column by column."""
    size = torch.Size(shape).numel()
    return operator(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).flatten(1).mT


def by_functions(matrix, shape, noise_std=0.0):
    """The operator of a matrix (m, D), from two functions, so that its singular values are not known."""
    return Linear(lambda x: x.flatten(1) @ matrix.mT.to(x), lambda y: (y @ matrix.to(y)).unflatten(1, shape), noise_std)
