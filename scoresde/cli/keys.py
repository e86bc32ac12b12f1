"""The keys of a configuration: which of them a verb reads, their types, and the known key nearest to an unknown one.

A key is read by the verb, by the constructor of the `_target_` beside it, or by an interpolation `${key}`. Any other
key has no effect, so `check_keys` refuses it. It also refuses values of another type than the verb (`cli.settings`) or
the constructor says.
"""

import inspect
import pkgutil
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scoresde import build
from scoresde.arguments import annotations_of, check, keys_of, options_name
from scoresde.cli import guidance
from scoresde.cli.common import config_directory
from scoresde.cli.settings import SETTINGS
from scoresde.cli.suggestions import NEAR
from scoresde.run_config import interpolations, join, nodes

MAX_KEYS = 3  # in a suggestion
HYDRA = ("_target_", "_args_", "_convert_", "_partial_", "_recursive_")  # keys beside a target that Hydra reads
Node = Mapping[str, Any]


def check_keys(verb: str, config: DictConfig, choices: Mapping[str, str]) -> None:
    """Check the keys and the values of a configuration, for a verb whose settings have types in `SETTINGS`.

    Args:
        verb: the verb that reads the configuration.
        config: the configuration.
        choices: the chosen option of each Hydra config group. If this library has the chosen option of `data`, the
            keys of that option count as read, even if overrides replaced every interpolation of them.

    Raises:
        ValueError: a key that is not read, with the nearest key that is, or a value of another type.
    """
    if verb not in SETTINGS:
        return
    check("trust", config.trust, annotations_of(SETTINGS[verb])["trust"])
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    for node in guidance.checked_nodes(own.get("guidance"), has_scales=verb == "compare"):
        if node is not None:
            own.guidance = node
        build.check(own, SETTINGS[verb], config.trust)
    values = list(nodes(_tree(config)))
    declared = {f"data.{key}" for key in _keys(f"data/{choices.get('data')}")}
    interpolated = [key for path, value in values if isinstance(value, str) for key in interpolations(path, value)]
    for path, node in values:
        names = _names(verb, path, node) if isinstance(node, dict) else None
        for key in (join(path, name) for name in node if name not in names) if names is not None else ():
            is_read = any(f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.") for other in interpolated)
            if not (is_read or key in declared):
                known = {other for other, _ in values if other and not f"{other}.".startswith(f"{key}.")}
                raise ValueError(unknown(key, known, could_have(verb, config)))


def could_have(verb: str, config: DictConfig) -> set[str]:
    """Return the dotted paths of all keys that a verb can read in the nodes of a configuration, present or not."""
    keys: set[str] = set()
    for path, node in nodes(_tree(config)):
        names = _names(verb, path, node) if isinstance(node, dict) else None
        keys |= {join(path, name) for name in names or ()}
    return keys


def key_paths(config: DictConfig) -> list[str]:
    """Return the dotted paths of all nodes and leaves of a configuration, without those of Hydra."""
    return sorted({path for path, _ in nodes(_tree(config)) if path})


def unknown(key: str, *known: Collection[str]) -> str:
    """Return the message on an unknown key, with the nearest keys from the first collection that has similar keys."""
    near = next(filter(None, (nearest_keys(key, keys) for keys in known)), [])
    return f"no key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else "; --help lists them all")


def nearest_keys(key: str, known: Collection[str]) -> list[str]:
    """Return the known keys whose last name (after the last dot) is nearest to the last name of an unknown key.

    If the unknown key has dots, return only the one of them that is nearest to the whole key; otherwise at most 3.
    """
    near = get_close_matches(_last(key), {_last(path) for path in known}, n=1, cutoff=NEAR)
    paths = sorted((path for path in known if _last(path) in near), key=lambda path: (path.count("."), path))
    return get_close_matches(key, paths, n=1, cutoff=NEAR) if "." in key else paths[:MAX_KEYS]


def _names(verb: str, path: str, node: Node) -> set[str] | None:
    """Return the names of the keys that are read in a node; None if every key is read."""
    if "_target_" in node:
        names = _arguments(str(node["_target_"]))
        return None if names is None else names.union(HYDRA)
    role = SETTINGS[verb]
    for name in filter(None, path.split(".")):
        role = keys_of(role).get(name)
    return set(keys_of(role)) or None


def _arguments(target: str) -> set[str] | None:
    """Return the names of a target's arguments; None if it accepts any, or is not of this library or PyTorch."""
    if not target.startswith(("scoresde.", "torch.")):
        return None
    try:
        function = pkgutil.resolve_name(target)
        names, options = set(inspect.signature(function).parameters), options_name(function)
    except (ImportError, AttributeError, TypeError, ValueError):  # `build.check` says what is wrong
        return None
    further = keys_of(annotations_of(function).get(options)) if options else {}
    return None if options and not further else names.union(further) - {options}


def _keys(name: str) -> dict[str, Any]:
    """Return the content of this library's configuration file `name`.yaml; {} if there is no such file."""
    path = config_directory() / f"{name}.yaml"
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else {}  # type: ignore[return-value]


def _tree(config: DictConfig) -> dict[str, Any]:
    tree = OmegaConf.to_container(config, resolve=False)
    return {str(key): value for key, value in tree.items() if key != "hydra"}  # type: ignore[union-attr]


def _last(path: str) -> str:
    return path.rpartition(".")[2]
