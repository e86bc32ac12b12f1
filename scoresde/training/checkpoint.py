"""Checkpoints: one safetensors file, replaced atomically, with nothing executable in it.

Tensors are named `<group>/<name>`: `model/...`, `ema/...`, `optimizer/<parameter>/<moment>`. The rest (the step, the
optimiser's settings) is JSON in the file's metadata, under `info`. The metadata entry `crc32`
maps the name of every tensor to its checksum, and the empty name to the checksum of `info`, so that an error can name
the part that is missing or has changed. Older files have no checksums.
"""

import json
import math
import zlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from scoresde.atomic_files import replace_atomically
from scoresde.training.distributed import place_like, whole

Tree = dict[str, dict[str, Tensor]]
MOST_STEPS = 10**9 - 1  # of a training run
DTYPES = {  # their names in safetensors files
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# --- the file


def save(path: Path, groups: Tree, info: dict[str, Any]) -> None:
    """Write groups of named tensors, and information that JSON can represent, to one file.

    Raises:
        ValueError: safetensors files cannot hold the dtype of a tensor.
        OSError: the file cannot be written, see `atomic_files.replace_atomically`.
    """
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group, members in groups.items()
        for name, tensor in members.items()
    }
    # Wide dtypes first: each tensor then starts at a multiple of its item size.
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    text, end, places = json.dumps(info), 0, {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"the dtype of {name} must be one of {', '.join(map(str, DTYPES))}; got {tensor.dtype}")
        offsets = [end, end := end + tensor.nbytes]
        places[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    sums = {"": _checksum(text), **{name: _checksum(name, tensor) for name, tensor in tensors.items()}}
    header = json.dumps({"__metadata__": {"info": text, "crc32": json.dumps(sums)}, **places}).encode()
    header += b" " * (-len(header) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for tensor in tensors.values():
                file.write(_bytes(tensor))

    replace_atomically(path, write, size=8 + len(header) + end)


def load(
    path: Path, groups: Collection[str] | None = None, needed: Collection[str] = (), keys: Collection[str] = ()
) -> tuple[Tree, dict[str, Any]]:
    """Return the groups and the information of a file written by `save`.

    Args:
        path: the file.
        groups: groups whose tensors are loaded; the other groups are returned empty. Default: all.
        needed: groups that the file must have.
        keys: keys that the information must have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, a part is missing or has changed, or its step is not an
            integer from 0 to `MOST_STEPS`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train the run first")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            text = metadata["info"]
            info, sums = json.loads(text), json.loads(metadata.get("crc32", "{}"))
            if not isinstance(info, dict) or not isinstance(sums, dict):
                raise ValueError("its metadata are not mappings")
            chosen = [name for name in names if groups is None or name.partition("/")[0] in groups]
            tensors = {name: file.get_tensor(name) for name in chosen}
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a checkpoint of this library ({error})") from error
    if sums and (damage := _damage(sums, text, names, tensors)):
        raise ValueError(f"{path} is damaged: {damage}; restore it from a copy, or train again")
    tree: Tree = {name.partition("/")[0]: {} for name in names}
    for full_name, tensor in tensors.items():
        group, _, name = full_name.partition("/")
        tree[group][name] = tensor
    if missing := [name for name, parts in ((needed, tree), (keys, info)) for name in name if name not in parts]:
        raise ValueError(f"{path} has no {missing[0]!r}: it is incomplete, or not a checkpoint of this kind")
    step = info.get("step", 0)
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= MOST_STEPS:
        raise ValueError(f"the step of {path} must be an integer from 0 to {MOST_STEPS:,}; got {step!r}")
    return tree, info


def _damage(sums: Mapping[str, Any], text: str, names: Sequence[str], tensors: Mapping[str, Tensor]) -> str | None:
    """Return a message on the first part of a file that differs from its checksum in `sums`; None if all agree."""
    if sums.get("") != _checksum(text):
        return "its information has changed"
    for name in sorted(set(sums).symmetric_difference({"", *names})):
        return f"{name} is missing" if name in sums else f"{name} was added"
    return next((f"{name} has changed" for name, x in tensors.items() if sums[name] != _checksum(name, x)), None)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(text: str, tensor: Tensor | None = None) -> str:
    """Return the CRC-32 of `text`, or of a tensor together with its name `text`, its dtype and its shape."""
    if tensor is None:
        return f"{zlib.crc32(text.encode()):08x}"
    kind = f"{text} {tensor.dtype} {tuple(tensor.shape)}"
    return f"{zlib.crc32(_bytes(tensor), zlib.crc32(kind.encode())):08x}"


# --- tensors


def difference(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str | None:
    """Return the first way in which stored tensors do not fit the expected ones; None if they fit.

    They fit if they have the same names, shapes and dtypes, and are finite. A tensor may be infinite or NaN if the
    expected one is too, as a buffer that masks attention is.
    """
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        if name not in stored:
            return f"expected {name} of shape {shape}; got nothing"
        if (other := stored[name]).shape != tensor.shape:
            return f"expected {name} of shape {shape}; got {tuple(other.shape)}"
        if other.dtype != tensor.dtype:
            return f"expected {name} of dtype {tensor.dtype}; got {other.dtype}"
        if not is_finite(other) and is_finite(tensor):
            return f"expected finite values in {name}; got NaN or infinity"
    extra = sorted(set(stored) - set(expected))
    return f"expected no {extra[0]}; got shape {tuple(stored[extra[0]].shape)}" if extra else None


def is_finite(x: Tensor) -> bool:
    """Return whether all values are finite."""
    return bool(torch.isfinite(x.float() if x.is_floating_point() and x.element_size() == 1 else x).all())


@torch.no_grad()
def restore(tensors: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Copy the stored values into the tensors of the same names.

    Raises:
        ValueError: the stored tensors do not fit, see `difference`; nothing is copied then.
    """
    if text := difference(tensors, stored):
        raise ValueError(f"the checkpoint does not fit the model: {text}; use a new run")
    for name, tensor in tensors.items():
        tensor.copy_(place_like(stored[name], tensor))


# --- optimisers


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an optimiser: named tensors, and the rest as JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, moments in state["state"].items():
        for name, value in moments.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}/{name}"] = value
    return tensors, {"kind": type(optimizer).__name__, "param_groups": state["param_groups"], "scalars": scalars}


def unpack_optimizer(
    optimizer: Optimizer, tensors: dict[str, Tensor], info: Mapping[str, Any], steps: int = MOST_STEPS
) -> None:
    """Restore the state that `pack_optimizer` returned.

    The state must have the names, shapes and dtypes of the state that the optimiser makes in its first step, because
    native kernels do not check the moments that they read. A parameter that never had a gradient has no state.

    Args:
        optimizer: before its first step.
        tensors, info: from `pack_optimizer`.
        steps: number of steps that the optimiser made; a stored step counter above it is refused.

    Raises:
        ValueError: the state belongs to another kind of optimiser or to other parameters; a moment or a setting is
            missing, not finite, or of another shape or type than the optimiser's own.
    """
    own = type(optimizer).__name__
    if (kind := info.get("kind", own)) != own:
        raise ValueError(f"the optimiser must be {kind}, as in the checkpoint; got {own}")
    members = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(scalars := info.get("scalars", {}), dict):
        raise ValueError(f"the optimiser's scalars in the checkpoint must be a mapping; got {scalars!r}")
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        number, _, name = key.partition("/")
        if not number.isdecimal() or int(number) >= len(members):
            raise ValueError(
                f"the optimiser state in the checkpoint must be of parameters 0 to {len(members) - 1}; got {key}"
            )
        state.setdefault(int(number), {})[name] = value
    for index, (group, parameter) in enumerate(members):
        moments, expected = state.get(index, {}), _first_state(optimizer, group, parameter)
        if expected and not state and steps:
            raise ValueError(f"the checkpoint has no moments of {own} after {steps} steps: it is incomplete")
        if moments and (text := _state_difference(expected, moments, steps)):
            raise ValueError(f"the checkpoint must have the state that {own} keeps of parameter {index}: {text}")
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = place_like(value, parameter)
    settings = _settings(optimizer.state_dict()["param_groups"], info.get("param_groups"))
    optimizer.load_state_dict({"state": state, "param_groups": settings})


def _first_state(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return the state of a parameter after a first step, made by a copy of the optimiser with a zero gradient."""
    copy = object.__new__(type(optimizer))
    copy.__dict__.update(optimizer.__dict__)
    single = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
    single.grad = torch.zeros_like(single)
    made = optimizer.state.get(parameter, {})  # by the optimiser's constructor
    initial = {name: whole(value).clone() if isinstance(value, Tensor) else value for name, value in made.items()}
    copy.state, copy.param_groups = defaultdict(dict, {single: initial}), [{**group, "params": [single]}]
    type(optimizer).step(copy)
    return dict(copy.state[single])


def _state_difference(expected: Mapping[str, Any], stored: Mapping[str, Any], steps: int) -> str | None:
    """Return how the stored state of a parameter differs from `expected`, the state of a first step; None if alike."""
    tensors, others = (
        {name: value for name, value in state.items() if isinstance(value, Tensor)} for state in (expected, stored)
    )
    if text := difference(tensors, others):
        return text
    for name, value in expected.items():
        if name not in tensors and value is not None and not _is_like(stored.get(name), value):
            return f"expected {name} like {value!r}; got {stored.get(name)!r}"
    count = float(stored.get("step", 0))  # torch's name for the counter
    return None if count.is_integer() and 0 <= count <= steps else f"expected a step from 0 to {steps}; got {count:g}"


def _settings(own: Sequence[dict[str, Any]], stored: Any) -> list[dict[str, Any]]:
    """Return the stored settings of each parameter group; settings that an older torch lacked are taken from `own`."""
    if not isinstance(stored, list) or len(stored) != len(own) or not all(isinstance(group, dict) for group in stored):
        raise ValueError(f"the checkpoint must have the settings of {len(own)} groups of parameters; got {stored!r}")
    settings = [{**group, **other} for group, other in zip(own, stored, strict=True)]
    for index, (group, other) in enumerate(zip(own, settings, strict=True)):
        expected, params = group["params"], other["params"]
        if isinstance(params, list) and params != expected:
            order = " in another order" if len(params) == len(expected) else ""
            raise ValueError(
                f"the optimiser state in the checkpoint is for {len(params)} parameters{order} in group {index}; the "
                f"optimiser has {len(expected)}: use the model and optimiser of the checkpoint, or a new run"
            )
        for name, value in group.items():
            check_like(f"the optimiser's {name} in the checkpoint", other[name], value)
    return settings


# --- information


def check_like(name: str, value: Any, own: Any) -> None:
    """Raise ValueError if a stored value has another structure than `own`, or a number that is not finite."""
    if not _is_like(value, own):
        raise ValueError(f"{name} must be like {own!r}; got {value!r}")


def _is_like(value: Any, own: Any) -> bool:
    """Return whether a value has the structure of `own`, and only finite numbers.

    Where `own` is a boolean or None, the value may be a boolean, None or a string.
    """
    if isinstance(own, dict):
        return isinstance(value, dict) and value.keys() == own.keys() and all(_is_like(value[k], own[k]) for k in own)
    if isinstance(own, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) == len(own) and all(map(_is_like, value, own))
    if own is None or isinstance(own, bool):
        return value is None or isinstance(value, (bool, str))
    if isinstance(own, (int, float)):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, type(own))
