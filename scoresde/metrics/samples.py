"""Samples of states as matrices: what the distances between samples share."""

import torch
from torch import Tensor

from scoresde.tensors import float64


def flatten(x: Tensor, name: str = "x") -> Tensor:
    """A sample (N, *) as (N, D), float64.

    Raises:
        ValueError: no sample axis beside those of the state, or fewer than two samples.
    """
    if x.ndim < 2 or x.shape[0] < 2:
        raise ValueError(f"{name} as two samples or more, (N, *), expected; got shape {tuple(x.shape)}")
    return float64(x).flatten(1)


def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two samples of states of one shape, flattened."""
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"samples of states of one shape expected; got {tuple(x.shape)} and {tuple(y.shape)}")
    return flatten(x), flatten(y, "y")


def everything(x: Tensor) -> Tensor:
    """The indices of all samples."""
    return torch.arange(len(x), device=x.device)
