"""Reference data of other projects: weights by the rule in the READMEs of `tests/data`, and the files they come in."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch

from scoresde.convert.from_score_sde import score_sde

DATA = Path(__file__).parents[1] / "data"


def weights(shapes, fourier_scale=16.0):
    """The state dict of random weights that names and shapes determine."""
    state = {}
    for i, (name, shape) in enumerate(shapes):
        value = np.random.RandomState(i).standard_normal(shape)
        if name.endswith((".bias", ".b")):
            value = 0.1 * value
        elif len(shape) == 1:
            value = 1 + 0.1 * value if name.endswith(".weight") else fourier_scale * value
        else:
            fan_in = shape[0] if name.endswith(".W") else np.prod(shape[1:])
            value = value / np.sqrt(fan_in)
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


def described(folder, name):
    """A JSON file in a folder of `tests/data`."""
    return json.loads((DATA / folder / f"{name}.json").read_text())


def arrays(folder, name):
    """The arrays of an npz file in a folder, relative to `tests/data`, as tensors."""
    with np.load(DATA / folder / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@functools.cache
def converted(name, averages):
    """The run of a checkpoint in `score_sde`; it is cached and must not be changed. Averages are the default."""
    return score_sde(DATA / "score_sde" / f"{name}.pth", **({} if averages == "ema" else {"weights": averages}))


def relative_error(actual, expected):
    """The largest over samples of the norm of the difference, relative to that of the reference."""
    assert actual.shape == expected.shape
    return float(((actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())


class Trap:
    """An object whose pickle creates a folder when it is loaded without restrictions."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)
