"""Samples of states (N, *) as float64 matrices (N, D), the form that every distance computes with."""

from torch import Tensor

from scoresde.tensors import float64


def flatten(x: Tensor, name: str = "x") -> Tensor:
    """Return a sample (N, *) as (N, D), float64.

    Raises:
        ValueError: x has fewer than two dimensions, or fewer than two samples.
    """
    if x.ndim < 2 or x.shape[0] < 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (N, *) with at least 2 samples")
    return float64(x).flatten(1)


def flatten_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return two samples of equal state shape, each flattened to a float64 matrix.

    Raises:
        ValueError: the states differ in shape, or a sample has fewer than two of them.
    """
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must have states of the same shape")
    return flatten(x), flatten(y, "y")
