"""Keys of a configuration: which keys a verb reads, and which known key is nearest to an unknown key.

A key is read by the verb, by the constructor of the `_target_` beside it, or by an interpolation `${key}`. Any other
key has no effect, so `check_keys` refuses it.
"""

import inspect
import pkgutil
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scoresde.cli.common import SPLITS, config_directory
from scoresde.cli.completion import BASE
from scoresde.cli.suggestions import NEAR
from scoresde.evaluation.dataset_likelihood import evaluate_likelihood
from scoresde.training.validation import HeldOut

MAX_KEYS = 3  # in a suggestion
HYDRA = ("_target_", "_args_", "_convert_", "_partial_", "_recursive_")  # keys beside a target that Hydra reads
OPTIONAL = ("name", "learned_variance")  # keys that an experiment may set
MAPS = ("transform", "dequantization")
DATA = ("shape", "range", "sigma_data", "training", *SPLITS, *MAPS)
Node = Mapping[str, Any]


def parameters(function: Callable[..., Any]) -> set[str] | None:
    """Return the names of the arguments of a function or a class; None if it accepts any name."""
    arguments = inspect.signature(function).parameters.values()
    if any(argument.kind is argument.VAR_KEYWORD for argument in arguments):
        return None
    return {argument.name for argument in arguments}


NODES: dict[str, set[str] | None] = {  # the keys of the nodes that have no `_target_`
    "data": set(DATA),
    "data.training": set(MAPS),
    "likelihood": parameters(evaluate_likelihood),
    "held_out": parameters(HeldOut),
}


def check_keys(verb: str, config: DictConfig, choices: Mapping[str, str]) -> None:
    """Raise ValueError for the first key of a configuration that is not read; the message suggests the nearest key.

    Args:
        verb: the verb that reads the configuration.
        config: the configuration.
        choices: the chosen option of each Hydra config group. A key that the chosen `data` option of this library
            declares counts as read, even if overrides replaced all interpolations of it.
    """
    nodes = list(_nodes(_tree(config)))
    declared = {f"data.{key}" for key in _keys(f"data/{choices.get('data')}")}
    interpolated = [key for path, value in nodes if isinstance(value, str) for key in _interpolations(path, value)]
    for path, node in nodes:
        names = _names(verb, path, node) if isinstance(node, dict) else None
        for key in (_join(path, name) for name in node if name not in names) if names is not None else ():
            is_read = any(f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.") for other in interpolated)
            if not (is_read or key in declared):
                known = {other for other, _ in nodes if other and not f"{other}.".startswith(f"{key}.")}
                raise ValueError(unknown(key, known, could_have(verb, config)))


def could_have(verb: str, config: DictConfig) -> set[str]:
    """Return the dotted paths of all keys that would be read if they were in the nodes of a configuration."""
    keys: set[str] = set()
    for path, node in _nodes(_tree(config)):
        names = _names(verb, path, node) if isinstance(node, dict) else None
        keys |= {_join(path, name) for name in names or ()}
    return keys


def key_paths(config: DictConfig) -> list[str]:
    """Return the dotted paths of all nodes and leaves of a configuration, without those of Hydra."""
    return sorted({path for path, _ in _nodes(_tree(config)) if path})


def unknown(key: str, *known: Collection[str]) -> str:
    """Return the message on an unknown key, with the nearest keys from the first collection that has similar keys."""
    near = next(filter(None, (nearest_keys(key, keys) for keys in known)), [])
    return f"no key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else "; --help lists them all")


def nearest_keys(key: str, known: Collection[str]) -> list[str]:
    """Return the known keys whose last name is nearest to that of an unknown key; the nearest path if it has dots."""
    near = get_close_matches(_last(key), {_last(path) for path in known}, n=1, cutoff=NEAR)
    paths = sorted((path for path in known if _last(path) in near), key=lambda path: (path.count("."), path))
    return get_close_matches(key, paths, n=1, cutoff=NEAR) if "." in key else paths[:MAX_KEYS]


def _names(verb: str, path: str, node: Node) -> set[str] | None:
    """Return the names of the keys that are read in a node; None if any key is."""
    if "_target_" in node:
        names = _arguments(str(node["_target_"]))
        return None if names is None else names.union(HYDRA)
    return NODES.get(path) if path else _settings(verb)


def _arguments(target: str) -> set[str] | None:
    """Return the arguments of a target; None if it is not of this library or PyTorch, or does not exist."""
    if not target.startswith(("scoresde.", "torch.")):
        return None
    try:
        return parameters(pkgutil.resolve_name(target))
    except (ImportError, AttributeError, TypeError, ValueError):  # `build.instantiate` says what is wrong
        return None


def _settings(verb: str) -> set[str]:
    """Return the settings and Hydra config groups of a verb."""
    settings: set[str] = set()
    for name in (BASE, verb):
        keys = _keys(name)
        groups = (entry for entry in keys.get("defaults", ()) if isinstance(entry, dict))
        settings = settings.union(keys, *groups)
    return settings.union(OPTIONAL) if "experiment" in settings else settings


def _keys(name: str) -> dict[str, Any]:
    """Return the content of the configuration of this library that is called `name`; {} if there is none."""
    path = config_directory() / f"{name}.yaml"
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else {}  # type: ignore[return-value]


def _tree(config: DictConfig) -> dict[str, Any]:
    tree = OmegaConf.to_container(config, resolve=False)
    return {str(key): value for key, value in tree.items() if key != "hydra"}  # type: ignore[union-attr]


def _nodes(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every node and leaf; the root has the path ""."""
    yield path, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield from _nodes(value, _join(path, name))


def _interpolations(path: str, text: str) -> Iterator[str]:
    """Yield the dotted paths that the value at `path` interpolates, as in "${data.shape}" or "${..shape}"."""
    for dots, key in re.findall(r"\$\{(\.*)([^${}:]+)\}", text):
        key = re.sub(r"\[(\w+)\]", r".\1", key)
        parents = path.split(".")[: -len(dots)] if dots else []
        yield ".".join([*parents, key])


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _last(path: str) -> str:
    return path.rpartition(".")[2]
