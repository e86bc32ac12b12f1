"""A run on the digits without training, for the tests of evaluations."""

import torch
from omegaconf import OmegaConf

import scoresde as ss
from scoresde.build import Run
from scoresde.data import Levels


def digits(split):
    return {"_target_": "scoresde.data.Digits", "split": split}


def broken(n=20):
    """Points of which every seventh is NaN, from the third on."""
    return [torch.full((2,), torch.nan if i % 7 == 3 else 1.0) for i in range(n)]


def digits_run(path, levels=17, dequantization=ss.Uniform(), training=None, **data):  # noqa: B008
    """A run whose data are the digits, or levels of the same shape; `data` changes its configuration."""
    splits = {split: digits(split) for split in ("train", "validation", "test")}
    config = {"data": {"shape": [1, 8, 8], "range": [0, levels], "training": training, **splits, **data}}
    return Run(None, Levels(levels), OmegaConf.create(config), path, dequantization, training is not None)
