"""Datasets, their statistics, and invertible transforms between data space and model space."""

from scoresde.data.arrays import Arrays
from scoresde.data.cifar import CIFAR10
from scoresde.data.datasets import Digits, Toy2D
from scoresde.data.idx import IDX
from scoresde.data.image_files import ImageFolder
from scoresde.data.openmoji import OpenMoji
from scoresde.data.parquet import ParquetImages
from scoresde.data.patches import Patches
from scoresde.data.resolutions import AveragePooling, Haar, Resolutions
from scoresde.data.standardize import Standardize
from scoresde.data.summary import DatasetSummary, describe
from scoresde.data.tables import Table
from scoresde.data.transforms import Affine, Compose, Levels, Logit

__all__ = [
    "CIFAR10",
    "IDX",
    "Affine",
    "Arrays",
    "AveragePooling",
    "Compose",
    "DatasetSummary",
    "Digits",
    "Haar",
    "ImageFolder",
    "Levels",
    "Logit",
    "OpenMoji",
    "ParquetImages",
    "Patches",
    "Resolutions",
    "Standardize",
    "Table",
    "Toy2D",
    "describe",
]
