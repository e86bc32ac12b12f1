"""Objects from configurations, checked before anything is built.

In a configuration each node with a `_target_` is a constructor with its arguments. The configuration of a run may come
from somebody else, so only classes of this library, torch.nn and torch.optim are built, unless the caller names further
packages in `trust`. Before anything is built, `check` compares the whole configuration with the annotations of the
constructors: every value and every nested `_target_` must match the annotation of the argument that it is passed to.
"""

import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue
from torch import nn

from scoresde.arguments import Extended, annotations_of, describe, fits, fits_call, item_annotation, keys_of, matches
from scoresde.arguments import check as check_value
from scoresde.run_config import join

TORCH_PACKAGES = ("torch.nn.", "torch.optim.")
UNKNOWN = (InterpolationResolutionError, MissingMandatoryValue)
# Values where an annotation is missing or says Any: nothing but modules is built there.
ARBITRARY = nn.Module | bool | int | Extended | str | list | dict | None


def instantiate(config: Any, trust: Sequence[str] = (), role: Any = object, **arguments: Any) -> Any:
    """Build the object that a configuration describes; return None for None.

    Args:
        config: a node with `_target_`, which may have nested ones.
        trust: further packages whose targets may be built, besides this library and torch.
        role: the annotation that the object must match.
        arguments: further arguments of the constructor, as objects.

    Raises:
        ValueError: a target is not allowed or does not exist, an argument does not match its annotation (see `check`),
            or a constructor rejects its arguments.
    """
    check(config, role, trust)
    for target in targets(config):  # including targets that `check` does not reach
        _check(target, trust)
    try:
        return hydra.utils.instantiate(config, _convert_="all", **arguments)
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__ or error
        target = config.get("_target_")
        raise ValueError(f"cannot build {target}: {cause}" if target else str(cause)) from error


def check(config: Any, role: Any = object, trust: Sequence[str] = ()) -> None:
    """Check a configuration before anything is built from it.

    Values that are missing, and interpolations of missing values, are not checked.

    Args:
        config: a node or a value.
        role: the annotation that `config` must match. For a TypedDict or `Annotated[dict, function]`, each value of a
            node without `_target_` must match the annotation of its key in the TypedDict, or of the function's argument
            with the same name as the key.
        trust: see `instantiate`. Targets of these packages fit everywhere.

    Raises:
        ValueError: a target is not allowed, does not exist or does not fit its place, or a value does not match its
            annotation. The message names the key.
    """
    node = OmegaConf.create(config) if isinstance(config, (dict, list)) else config
    _check_types(_key(node), node, role, trust)


def targets(config: Any) -> Iterator[str]:
    """Yield every `_target_` in a configuration."""
    if isinstance(config, (DictConfig, dict)):
        for key, value in config.items():
            if key == "_target_":
                yield str(value)
            yield from targets(value)
    elif isinstance(config, (ListConfig, list, tuple)):
        for value in config:
            yield from targets(value)


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the key or index and the value of each entry of a node, except missing values."""
    if not OmegaConf.is_config(node) or not node:
        return
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        with suppress(*UNKNOWN):
            yield key, node[key]


def _check(target: str, trust: Sequence[str], where: str = "") -> None:
    """Raise ValueError unless a target is in `trust`, or is a public class or network preset of scoresde or torch."""
    if any(target == package or target.startswith(f"{package}.") for package in trust):
        return
    if not target.startswith(("scoresde.", *TORCH_PACKAGES)):
        package = target.split(".")[0]
        raise ValueError(
            f"{where}target {target!r} is outside scoresde, torch.nn and torch.optim; "
            f"if you trust it, set trust=[{package}]"
        )
    try:
        value = pkgutil.resolve_name(target)
    except Exception as error:
        raise ValueError(f"{where}target {target!r} does not exist: {error}") from error
    module = getattr(value, "__module__", "") or ""
    if any(part.startswith("_") for part in target.split(".")):
        raise ValueError(f"{where}target {target!r} is private: name a public class")
    is_preset = callable(value) and module.startswith("scoresde.networks.")  # a function that makes a network
    if not (isinstance(value, type) or is_preset) or not module.startswith(("scoresde.", *TORCH_PACKAGES)):
        raise ValueError(f"{where}target {target!r} is not a class of scoresde, torch.nn or torch.optim")


def _check_types(key: str, value: Any, role: Any, trust: Sequence[str]) -> None:
    """Check a value of a configuration, and all values in it, against an annotation; see `check`."""
    role = ARBITRARY if role is Any else role
    if isinstance(value, DictConfig) and "_target_" in value:
        _check_target(key, value, role, trust)
    elif isinstance(value, DictConfig) and value:
        if not matches({}, role):
            got = f"a mapping without _target_: {', '.join(map(str, value))}"
            raise ValueError(f"{key or 'the object'} must be {describe(role)}; got {got}")
        _check_arguments(value, keys_of(role), object if role is object else Any, trust)
    elif OmegaConf.is_list(value) and any(OmegaConf.is_config(item) for _, item in _items(value)):
        for name, item in _items(value):
            _check_types(f"{key}[{name}]", item, item_annotation(role), trust)
    else:
        with suppress(*UNKNOWN):
            check_value(key, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value, role)


def _check_target(key: str, node: DictConfig, role: Any, trust: Sequence[str]) -> None:
    """Check that the target of a node fits the annotation `role`, and that its arguments match their annotations."""
    if node["_target_"] is None:
        raise ValueError(f"{join(key, '_target_')} must be the name of a class; got null")
    target = str(node["_target_"])
    _check(target, trust, f"{key}: " if key else "")
    if not target.startswith(("scoresde.", *TORCH_PACKAGES)):  # a package in `trust`, whose targets fit everywhere
        _check_arguments(node, {}, object, trust)
        return
    function = pkgutil.resolve_name(target)
    product = function if isinstance(function, type) else annotations_of(function).get("return", Any)
    is_partial = node.get("_partial_", False)
    if not (fits_call(product, role) if is_partial else fits(product, role)):
        is_partial_missing = not is_partial and role is not object and fits_call(product, role)
        hint = ": set _partial_: true" if is_partial_missing else ""
        got = f"{target}{' with _partial_: true' if is_partial else ''}"
        raise ValueError(f"{key or 'the object'} must be {describe(role)}; got {got}{hint}")
    annotations = {**annotations_of(product), **annotations_of(function), "_partial_": bool, "_recursive_": bool}
    _check_arguments(node, annotations, Any, trust)
    names = list(inspect.signature(function).parameters)
    for i, (_, item) in enumerate(_items(node.get("_args_"))):
        _check_types(f"{_key(node, '_args_')}[{i}]", item, annotations.get(names[min(i, len(names) - 1)], Any), trust)


def _check_arguments(node: DictConfig, annotations: Mapping[str, Any], default: Any, trust: Sequence[str]) -> None:
    """Check each value of a node against `annotations[key]`, or against `default` if this has no entry for the key."""
    for name, value in _items(node):
        if name not in ("_target_", "_args_"):
            _check_types(_key(node, name), value, annotations.get(str(name), default), trust)


def _key(node: Any, name: Any = None) -> str:
    """Return the dotted key of the value `name` of a node; if the value is an interpolation ${a.b}, the key a.b."""
    if not OmegaConf.is_config(node):
        return ""
    source = None
    if name is not None and OmegaConf.is_interpolation(node, name):
        raw: Any = OmegaConf.to_container(node, resolve=False)
        source = re.fullmatch(r"\$\{(\w[\w.]*)\}", str(raw[name]))
    return source[1] if source else str(node._get_full_key(name))
