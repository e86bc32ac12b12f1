"""What the converters share: the data node of a configuration, and a converted run written to a directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from scoresde import build
from scoresde.training import checkpoint
from scoresde.training.trainer import CHECKPOINT


def image_data(shape: Sequence[int], low: float, high: float, levels: int = 256) -> dict[str, Any]:
    """The data node for images whose grey levels 0 .. levels - 1 are mapped to [low, high]; no dataset is known.

    Args:
        shape: (C, H, W).
        low, high: the range in model space, see `data.Levels`.
        levels: number of grey levels.
    """
    return {
        "shape": list(shape),
        "range": [0, levels],
        "train": None,
        "validation": None,
        "test": None,
        "transform": {
            "_target_": "scoresde.data.Levels",
            "levels": levels,
            "low": float(low),
            "high": float(high),
        },
        "dequantization": {"_target_": "scoresde.dequantization.Uniform"},
    }


def save_run(run: build.Run, directory: str | Path, averaged: Mapping[str, Tensor] | None = None) -> Path:
    """Write a run to a directory from which `scoresde.load` brings it back; the directory.

    Each file is replaced atomically, and the configuration comes last: a directory with one is complete.

    Args:
        run: its model's state is the group "model", what `load(weights="raw")` gives.
        directory: made if it is not there.
        averaged: the averaged weights by their names in `model.state_dict()`, what `load(weights="ema")` gives;
            without them that is the model's own state.

    Raises:
        FileExistsError: the directory holds a run already.
        ValueError: averaged weights that the model has not, or of another shape.
    """
    directory, state = Path(directory), run.model.state_dict()
    for name in (build.CONFIG, CHECKPOINT):
        if (directory / name).exists():
            raise FileExistsError(f"{directory} holds a run already (its {name}); choose another directory")
    for name, tensor in (averaged or {}).items():
        if name not in state or state[name].shape != tensor.shape:
            found = tuple(state[name].shape) if name in state else "nothing of that name"
            raise ValueError(
                f"averaged weights of the model's own names and shapes expected; got {name} "
                f"{tuple(tensor.shape)}, where the model has {found}"
            )
    groups = {"model": state, **({} if averaged is None else {"ema": dict(averaged)})}
    checkpoint.save(directory / CHECKPOINT, groups, {"step": 0})
    try:
        build.write_config(run.config, directory / build.CONFIG)
    except BaseException:
        (directory / CHECKPOINT).unlink()
        raise
    return directory
