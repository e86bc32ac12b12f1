"""Datasets, and invertible transforms to model space."""

from scoresde.data.datasets import Digits, Toy2D
from scoresde.data.transforms import Affine, Compose, Levels, Logit

__all__ = ["Affine", "Compose", "Digits", "Levels", "Logit", "Toy2D"]
