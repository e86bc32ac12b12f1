"""Conversion of samples of states (N, *) to float64 matrices (N, D), from which every distance is computed."""

import torch
from torch import Tensor

from scoresde.tensors import float64

SHOWN = 8  # largest number of indices in an error message


def refuse_nonfinite(x: Tensor, name: str, rows: str = "samples") -> None:
    """Raise ValueError if x (N, ...) has NaN or infinity; the message has their number and first indices."""
    is_bad = ~torch.isfinite(x).reshape(len(x), -1).all(dim=1)
    if bad := is_bad.nonzero().flatten().tolist():
        raise ValueError(
            f"{name} must be finite; got NaN or infinity in {len(bad)} of {len(x)} {rows} (first {bad[:SHOWN]})"
        )


def flatten(x: Tensor, name: str = "x") -> Tensor:
    """Return a sample (N, *) as (N, D), float64.

    Raises:
        ValueError: x has fewer than two dimensions or fewer than two samples, or contains NaN or infinity.
    """
    if x.ndim < 2 or x.shape[0] < 2:
        raise ValueError(f"{name} must have shape (N, *) with at least 2 samples; got {tuple(x.shape)}")
    refuse_nonfinite(x, name)
    return float64(x).flatten(1)


def flatten_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return two samples with states of the same shape, each flattened to a float64 matrix.

    Raises:
        ValueError: the states differ in shape, or a sample has fewer than two states or a state that is not finite.
    """
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"x and y must have states of the same shape; got {tuple(x.shape)} and {tuple(y.shape)}")
    return flatten(x), flatten(y, "y")
