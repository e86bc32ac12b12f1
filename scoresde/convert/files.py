"""Read the files of other projects: tensors, plain containers and JSON, nothing that executes code."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load_file
from torch import Tensor


def load_tensors(path: Path) -> Any:
    """Load a `.pth`, `.pt` or `.safetensors` file on the CPU; a pickle may hold only tensors and plain containers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its pickle holds other objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and is not loaded, because it could execute code; if you trust the file, "
            f"load it elsewhere and save the state dict alone with torch.save ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # torch's reader raises exceptions of many types for a damaged file
        raise ValueError(f"{path} is not a checkpoint that PyTorch or safetensors can read: {error}") from error


def is_state_dict(value: Any) -> TypeGuard[dict[str, Tensor]]:
    """Return whether the value is a dict of tensors."""
    return isinstance(value, dict) and all(isinstance(tensor, Tensor) for tensor in value.values())


def load_config(path: Path, config: Mapping[str, Any] | str | Path | None, content: str) -> Mapping[str, Any] | None:
    """Return the configuration of a checkpoint: `config` if it is a mapping, otherwise the JSON object in a file.

    Args:
        path: the path of the checkpoint.
        config: a mapping, the path of a JSON file, or None for `<stem>.config.json` beside the checkpoint; if that file
            does not exist, None is returned.
        content: a description of the configuration, for error messages.

    Raises:
        FileNotFoundError: there is no file at the path `config`.
        ValueError: the file does not hold a JSON object.
    """
    if isinstance(config, Mapping):
        return config
    file = path.with_name(f"{path.stem}.config.json") if config is None else Path(config)
    if not file.is_file():
        if config is None:
            return None
        raise FileNotFoundError(f"no configuration at {file}")
    try:
        loaded = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); it must hold {content}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} must hold {content}; got a JSON {type(loaded).__name__}")
    return loaded
