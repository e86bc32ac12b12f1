"""Checkpoints: one safetensors file, replaced atomically, with nothing executable in it.

Tensors are named `<group>/<name>`: `model/...`, `ema/...`, `optimizer/<parameter>/<moment>`; everything else (the step,
the optimiser's settings) is JSON in the file's metadata.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

Tree = dict[str, dict[str, Tensor]]


def replace_atomically(path: Path, write: Callable[[Path], Any], alone: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place of `path` in one move.

    Args:
        path: of the file.
        write: given the path of the temporary one.
        alone: no other process writes this file. Its temporary name is then always the same: what a killed process
            leaves is overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp" if alone else f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, groups: Tree, info: dict[str, Any]) -> None:
    """Write groups of named tensors, and JSON-able information, as one file."""
    tensors = {
        f"{group}/{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for group, members in groups.items()
        for name, tensor in members.items()
    }
    replace_atomically(path, lambda file: save_file(tensors, file, metadata={"info": json.dumps(info)}))


def load(path: Path, groups: set[str] | None = None) -> tuple[Tree, dict[str, Any]]:
    """The groups named (all by default) and the information of a file that `save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not such a checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train the run first")
    tree: Tree = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
                group, _, name = key.partition("/")
                if groups is None or group in groups:
                    tree.setdefault(group, {})[name] = file.get_tensor(key)
            return tree, json.loads(metadata["info"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a checkpoint of this library ({error})") from error


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as named tensors, and the rest of it as JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, moments in state["state"].items():
        for name, value in moments.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}/{name}"] = value
    return tensors, {"kind": type(optimizer).__name__, "param_groups": state["param_groups"], "scalars": scalars}


def unpack_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Restore what `pack_optimizer` took.

    Raises:
        ValueError: it was another kind of optimiser's, or of other parameters.
    """
    if (kind := info.get("kind", type(optimizer).__name__)) != type(optimizer).__name__:
        raise ValueError(f"the checkpoint has the moments of {kind}; it cannot go on with {type(optimizer).__name__}")
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **info["scalars"]}.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": info["param_groups"]})
