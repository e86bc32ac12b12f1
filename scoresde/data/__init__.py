"""Datasets, and invertible transforms to model space."""

from scoresde.data.datasets import Digits, Toy2D
from scoresde.data.images import CIFAR10, ImageFolder
from scoresde.data.transforms import Affine, Compose, Levels, Logit

__all__ = ["CIFAR10", "Affine", "Compose", "Digits", "ImageFolder", "Levels", "Logit", "Toy2D"]
