"""Checkpoints: one safetensors file, replaced atomically, with nothing executable in it.

Tensors are named `<group>/<name>`: `model/...`, `ema/...`, `optimizer/<parameter>/<moment>`. The rest (the step, the
optimiser's settings) is JSON in the file's metadata.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from scoresde.training.distributed import place_like

Tree = dict[str, dict[str, Tensor]]


def replace_atomically(path: Path, write: Callable[[Path], Any], alone: bool = True) -> None:
    """Let `write` fill a temporary file in the directory of `path`, then rename it to `path`.

    Args:
        path: the file to write or replace.
        write: called with the path of the temporary file.
        alone: if True, no other process writes this file: the temporary name is always the same, and the next write
            overwrites what a killed process left; if False, the temporary name contains the process number.
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
    """Write groups of named tensors, and information that JSON can represent, to one file."""
    tensors = {
        f"{group}/{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for group, members in groups.items()
        for name, tensor in members.items()
    }
    replace_atomically(path, lambda file: save_file(tensors, file, metadata={"info": json.dumps(info)}))


def load(path: Path, groups: set[str] | None = None) -> tuple[Tree, dict[str, Any]]:
    """Return the groups and the information of a file written by `save`.

    Args:
        path: the file.
        groups: the groups whose tensors are loaded, by default all; the other groups are returned empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train the run first")
    tree: Tree = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
                group, _, name = key.partition("/")
                members = tree.setdefault(group, {})
                if groups is None or group in groups:
                    members[name] = file.get_tensor(key)
            return tree, json.loads(metadata["info"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a checkpoint of this library ({error})") from error


@torch.no_grad()
def restore(tensors: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Copy the stored values into the tensors of the same names.

    Raises:
        ValueError: names or shapes differ; nothing is copied then.
    """
    for name in [*tensors, *stored]:
        expected, actual = (tuple(group[name].shape) if name in group else "none" for group in (tensors, stored))
        if expected != actual:
            raise ValueError(
                f"the checkpoint is of another model: expected {name} of shape {expected}; got {actual}: use a new run"
            )
    for name, tensor in tensors.items():
        tensor.copy_(place_like(stored[name], tensor))


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an optimiser: named tensors, and the rest as JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, moments in state["state"].items():
        for name, value in moments.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}/{name}"] = value
    return tensors, {"kind": type(optimizer).__name__, "param_groups": state["param_groups"], "scalars": scalars}


def unpack_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Restore the state that `pack_optimizer` returned.

    Raises:
        ValueError: the state belongs to another kind of optimiser, or to more parameters than this one has.
    """
    if (kind := info.get("kind", type(optimizer).__name__)) != type(optimizer).__name__:
        raise ValueError(f"the optimiser must be {kind}, as in the checkpoint; got {type(optimizer).__name__}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **info["scalars"]}.items():
        number, _, name = key.partition("/")
        if (index := int(number)) >= len(parameters):
            raise ValueError(
                f"the checkpoint has moments of more parameters than the optimiser, which has {len(parameters)}"
            )
        if isinstance(value, Tensor) and value.shape == parameters[index].shape:
            value = place_like(value, parameters[index])
        state.setdefault(index, {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": info["param_groups"]})
