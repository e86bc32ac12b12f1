"""Why Hydra refused a command: the options and overrides of a verb, against what there is.

Overrides are looked at one after the other: a word without `=`, an option that its group does not have, a group that is
not the verb's, a key that is not in the configuration. The first that is wrong becomes one line, with the name that was
probably meant.
"""

import argparse
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from scoresde.build import CONFIG
from scoresde.cli.completion import named
from scoresde.cli.names import NEAR, meant, of, one_line

FEW = 3  # keys that one line proposes
QUOTE = "quote a value that has special characters, 'key=\"...\"', and write lists without spaces: key=[a,b]"


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments after the verb as Hydra understands them.

    Raises:
        ValueError: an option that there is not, or that lacks its value.
    """
    parser = get_args_parser()
    known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser.error = refuse  # type: ignore[method-assign]
    options, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ValueError(f"no option {unknown[0]}{meant(unknown[0], [*known, '--json'])}")
    return options


def explain(error: Exception, verb: str, overrides: Sequence[str], loader: ConfigLoader) -> str:
    """Why Hydra refused a verb's overrides: the first wrong one among them, or else what Hydra says."""
    given = _Overrides(verb, overrides, loader)
    found = next(given.wrong(), None)
    if found is None and "--multirun" in str(error):
        found = next(given.sweeps(), None)
    return found or one_line(error)


class _Overrides:
    """A verb's overrides, against what there is.

    Args:
        verb: its name, and that of its configuration.
        overrides: as they were typed.
        loader: of configurations.
    """

    def __init__(self, verb: str, overrides: Sequence[str], loader: ConfigLoader):
        self.verb, self.loader = verb, loader
        self.parsed = {text: _parsed(text) for text in overrides}
        self.groups = [group for group in loader.list_groups("") if group != "hydra"]
        self.config = self._compose()
        self.choices = [group for group in self.config["hydra"]["runtime"]["choices"] if "/" not in group]
        self.keys = [key for key in paths(self.config) if key.split(".")[0] != "hydra"]

    def wrong(self) -> Iterator[str]:
        """What is wrong with them, in their order."""
        words = list(self.parsed)
        for text, following in zip(words, [*words, ""][1:], strict=True):
            override = self.parsed[text]
            found: str | None
            if override is None and "=" in text:
                found = f"{text!r} cannot be read as key=value; {QUOTE}"
            elif override is None or not override.key_or_group:
                found = self._word(text, following)
            elif self._options(override.key_or_group):
                found = self._option(override)
            else:
                found = self._key(override)
            if found:
                yield found

    def sweeps(self) -> Iterator[str]:
        """Those that are sweeps, where the option for one is missing."""
        for text, override in self.parsed.items():
            if override is not None and override.is_sweep_override():
                key, _, values = text.partition("=")
                as_list = "" if self._options(key) else f"; as a list it is {key}=[{values}]"
                yield f"{text} is a sweep: add --multirun{as_list}"

    # --- what is there

    def _options(self, group: str) -> list[str]:
        """The options of a group; none where there is no such group."""
        return self.loader.get_group_options(group, ObjectType.CONFIG)

    def _listed(self, group: str) -> str:
        return ", ".join(sorted(self._options(group)))

    def _is_sound(self, override: Override | None) -> bool:
        """Whether it chooses an option that there is."""
        if override is None or override.is_delete():
            return False
        options = self._options(override.key_or_group)
        return bool(options) and all(name in options for name in _names(override))

    def _compose(self) -> Mapping[str, Any]:
        """The configuration with the options that these overrides choose, as far as there are such; not resolved."""
        chosen = [
            f"{override.key_or_group}={_names(override)[0]}"
            for override in self.parsed.values()
            if override is not None and self._is_sound(override) and _names(override)
        ]
        try:
            config = self.loader.load_configuration(self.verb, chosen, RunMode.MULTIRUN)
        except HydraException:  # a group of another verb
            config = self.loader.load_configuration(self.verb, [], RunMode.MULTIRUN)
        return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]

    # --- what is wrong with it

    def _word(self, text: str, following: str) -> str:
        """What a word without `=` was meant to be."""
        found = None
        if text in (*self.choices, *self.keys):
            found = f"{text}={following if following and '=' not in following else '...'}"
        elif groups := [group for group in self.choices if text in self._options(group)]:
            found = f"{'experiment' if 'experiment' in groups else groups[0]}={text}"
        elif "run" in self.keys and (Path(text) / CONFIG).is_file():
            found = shlex.quote(named(text))
        elif near := get_close_matches(text, [*self.choices, *self.keys], n=1, cutoff=NEAR):
            found = f"{near[0]}=..."
        return f"key=value expected; got {text!r}{f'; did you mean {found}?' if found else ''}"

    def _option(self, override: Override) -> str | None:
        """An option that a group does not have, or a group that the verb does not have."""
        group, options = override.key_or_group, self._options(override.key_or_group)
        if not override.is_delete() and not override.is_sweep_override() and override.value() is None:
            return f"an option of group {group} expected, {group}=...; got null; there are: {self._listed(group)}"
        for name in _names(override):
            if name not in options:
                return f"no option {name!r} in group {group}{of(name, sorted(options))}"
        if group in self.groups and group not in self.choices and not override.is_add():
            return f"no group {group} in this verb; its groups: {', '.join(self.choices) or 'none'}"
        return None

    def _key(self, override: Override) -> str | None:
        """A key that the configuration does not have."""
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or key in self.keys or key.split(".")[0] == "hydra":
            return None
        if "/" in key:
            return f"no group {key!r}{meant(key, [f'hydra/{group}' for group in self.loader.list_groups('hydra')])}"
        near = near_keys(key, [*self.keys, *self.choices])
        proposed = f"; did you mean {' or '.join(near)}?" if near else f"; `scoresde {self.verb} --help` lists them."
        adds = "" if override.is_delete() else f" (+{override.input_line} adds it)"
        return f"no key {key!r}{proposed}{adds}"


def _parsed(text: str) -> Override | None:
    """An override as Hydra reads it; None if it does not."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def _names(override: Override) -> list[str]:
    """The options that an override of a group names, those of a sweep included."""
    if override.is_delete():
        return []
    if override.is_sweep_override():
        return list(override.sweep_string_iterator()) if override.is_choice_sweep() else []
    value = override.value()
    return [str(name) for name in (value if isinstance(value, list) else [value]) if name is not None]


def paths(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of a nested configuration, of its nodes and its leaves."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        path = f"{prefix}.{key}" if prefix else str(key)
        yield path
        yield from paths(value, path)


def near_keys(key: str, known: Collection[str]) -> list[str]:
    """The keys that a wrong one may stand for: of its last name or one near it; of these the one in the same node."""
    parent, _, name = key.rpartition(".")
    names = {path: path.rpartition(".")[2] for path in known}
    for wanted in (name, *get_close_matches(name, sorted(set(names.values())), n=1, cutoff=NEAR)):
        found = sorted((path for path in known if names[path] == wanted), key=lambda path: (path.count("."), path))
        parents = {path.rpartition(".")[0]: path for path in found}
        if parent and (near := get_close_matches(parent, parents, n=1, cutoff=NEAR)):
            return [parents[near[0]]]
        if found:
            return found[:FEW]
    return []
