"""Reading the files of other projects: tensors and plain containers, nothing that executes."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def load_tensors(path: Path) -> Any:
    """What a `.pth`, `.pt` or `.safetensors` file holds, on the CPU; a pickle is read as tensors and containers alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, or holds more than that.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and is not loaded: it could execute anything. Where you trust it, save "
            f"its state dict alone with torch.save ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # of a damaged file, torch's reader raises whatever its parsing comes upon
        raise ValueError(f"{path} is not a checkpoint that PyTorch or safetensors can read: {error}") from error
