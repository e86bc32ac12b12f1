"""Functions that the converters share: make a `data` node, build a U-Net with converted weights, save a run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde import build, hub, run_config
from scoresde.networks.configuration import with_parts
from scoresde.training import checkpoint
from scoresde.training.locks import locked
from scoresde.training.trainer import CHECKPOINT


def image_data(shape: Sequence[int], low: float, high: float, levels: int = 256) -> dict[str, Any]:
    """Return the node `data` of a configuration: no datasets, and grey levels 0 .. levels - 1 mapped to [low, high].

    Args:
        shape: (C, H, W).
        low, high: the range in model space, see `data.Levels`.
        levels: number of grey levels.
    """
    transform = {"_target_": "scoresde.data.Levels", "levels": levels, "low": float(low), "high": float(high)}
    return {
        "shape": list(shape),
        "range": [0, levels],
        **dict.fromkeys(("train", "validation", "test")),
        "transform": transform,
        "dequantization": {"_target_": "scoresde.dequantization.Uniform"},
    }


def assemble_unet(config: Mapping[str, Any], translate: Callable[[Any], Mapping[str, Tensor]], path: Path) -> build.Run:
    """Return a run of a `UNet`, or of the `EncoderUNet` of a classifier, with converted weights.

    Args:
        config: the run's configuration; `network` holds flat arguments, see `networks.configuration`, and the class as
            `_target_` (default: `UNet`).
        translate: returns the converted state dict for the network, which is on the device "meta".
        path: the path of the checkpoint.
    """
    node = with_parts({"_target_": "scoresde.networks.UNet", **config["network"]})
    with torch.device("meta"):
        network = build.instantiate(node)
    return build.assemble({**config, "network": node}, translate(network), path)


def check_free(directory: str | Path) -> Path:
    """Return `directory` as a path; raise FileExistsError if it already holds a run, ValueError if it is on the hub."""
    directory = hub.check_local(directory)
    for name in (run_config.CONFIG, CHECKPOINT):
        if (directory / name).exists():
            raise FileExistsError(f"{directory} holds a run already (its {name}); choose another directory")
    return directory


def save_run(run: build.Run, directory: str | Path, averaged: Mapping[str, Tensor] | None = None) -> Path:
    """Write a run to a directory that `scoresde.load` reads, and return the directory.

    Each file is replaced atomically. The configuration is written last, so that a directory with a configuration is
    complete.

    Args:
        run: the run; the state of its model becomes the raw weights, for `load(weights="raw")`.
        directory: created if it does not exist.
        averaged: averaged weights by their names in `model.state_dict()`, for `load(weights="ema")`; by default the
            raw weights.

    Raises:
        FileExistsError: the directory already holds a run.
        ValueError: the model has no weights of these names and shapes, or another process writes this run.
    """
    directory, state = check_free(directory), run.model.state_dict()
    for name, tensor in (averaged or {}).items():
        if name not in state or state[name].shape != tensor.shape:
            expected = f"shape {tuple(state[name].shape)}" if name in state else "none"
            raise ValueError(
                f"averaged weights must match the model; {name} has shape {tuple(tensor.shape)}, but the model has "
                f"{expected}"
            )
    groups = {
        "model": state,
        **({} if averaged is None else {"ema": {name: x.to(state[name].dtype) for name, x in averaged.items()}}),
    }
    with locked(directory):
        for name in (run_config.CONFIG, CHECKPOINT):
            if (directory / name).exists():
                raise FileExistsError(f"{directory} holds a run already (its {name}); choose another directory")
        checkpoint.save(directory / CHECKPOINT, groups, {"step": 0, "config": run_config.plain(run.config)})
        try:
            run_config.write_config(run.config, directory / run_config.CONFIG)
        except BaseException:
            (directory / CHECKPOINT).unlink()
            raise
    return directory
