"""Parse options and overrides of a command; name the first wrong override, and suggest what was probably meant.

Hydra decides whether the overrides of a verb (a subcommand of `scoresde`) are valid. If it refuses them,
`first_mistake` looks for the reason: a word without `=`, an unknown option of a Hydra config group, a group of another
verb, a key that the configuration lacks, or a sweep without `--multirun`.
"""

import argparse
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from scoresde.cli.common import config_directory
from scoresde.cli.completion import OPTIONS, own_groups
from scoresde.cli.keys import could_have, key_paths, unknown
from scoresde.cli.suggestions import NEAR, did_you_mean
from scoresde.run_config import CONFIG


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Separate the options after a verb from the overrides among them.

    Raises:
        ValueError: an option is unknown, or its value is missing or invalid.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names in (("--json",), ("--help", "-h"), ("--hydra-help",), ("--multirun", "-m"), ("--resolve",)):
        parser.add_argument(*names, action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--package", "-p")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--info", "-i", nargs="?", choices=("all", "config", "defaults", "plugins", "searchpath"))
    parser.add_argument("overrides", nargs="*")
    try:
        options, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown:
        raise ValueError(f"no option {unknown[0]}{did_you_mean(unknown[0], OPTIONS)}")
    if options.config_dir is not None and not Path(options.config_dir).is_dir():
        raise ValueError(f"--config-dir must be a directory; got {options.config_dir!r}")
    return options


def literal(text: str) -> str:
    """Return the text, in quotes if necessary, so that Hydra reads it as the value of an override."""
    override = parse_override(f"key=[{text}]")
    if override is not None and override.value() == [text]:
        return text
    escaped = re.sub(r'(\\*)("|\Z)', lambda match: 2 * match[1] + ('\\"' if match[2] else ""), text)
    return f'"{escaped}"'


def parse_override(text: str) -> Override | None:
    """Return an override as Hydra parses it; None if Hydra cannot parse it."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


@contextmanager
def configurations(verb: str, config_dir: str | None) -> Iterator[tuple[Callable[..., Any], Callable[..., list]]]:
    """Yield two functions: from overrides to the configuration of a verb, and from a config group to its options."""
    paths = [] if config_dir is None else [Path(config_dir).absolute()]
    listed = ",".join(literal(f"file://{path}") for path in [*paths, *own_groups(config_directory(), verb)])
    search = [f"hydra.searchpath=[{listed}]"] if listed else []
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        yield (
            lambda *overrides: loader.load_configuration(verb, [*search, *overrides], RunMode.MULTIRUN),
            cache(lambda group: sorted(loader.get_group_options(group, config_name=verb, overrides=search))),
        )


def first_mistake(verb: str, overrides: Sequence[str], multirun: bool, config_dir: str | None) -> str | None:
    """Return a message on the first wrong override, with what was probably meant; None if all are valid."""
    with configurations(verb, config_dir) as (compose, options):
        default = compose()
        groups = [group for group in default.hydra.runtime.choices if "/" not in group]
        parsed = [parse_override(text) for text in overrides]
        named = [(override.key_or_group, option_names(override)) for override in parsed if override is not None]
        chosen = [f"{g}={names[0]}" for g, names in named if names and g in groups and names[0] in options(g)]
        config = compose(*chosen) if chosen else default
        keys = key_paths(config)
        for text, override, following in zip(overrides, parsed, [*overrides[1:], ""], strict=False):
            key = "" if override is None else override.key_or_group
            if override is None or not key:
                return not_an_override(text, following, {group: options(group) for group in groups}, keys)
            known, is_new = options(key), override.is_add() or override.is_force_add()
            for name in option_names(override) if known else ():
                if name not in known:
                    return f"no option {name!r} in group {key}{did_you_mean(name, known, lists_all=True)}"
            if known and not (is_new or key in groups or "/" in key):
                return f"{verb} has no group {key!r}; the groups of {verb}: {', '.join(groups) or 'none'}"
            if not (known or is_new or key in keys or key.startswith("hydra.")):
                group = key.partition(".")[0]
                if group in groups and key != group and OmegaConf.select(config, group) is None:
                    chosen_first = did_you_mean("", [f"{group}={name}" for name in options(group)], lists_all=True)
                    return f"no key {key!r}: {group} has no keys without an option{chosen_first}"
                return unknown_key(override, [*keys, *groups], could_have(verb, config))
            if override.is_sweep_override() and not multirun:
                as_list = "" if known else f", or write a list: {key}=[{text.partition('=')[2]}]"
                return f"{text} is a sweep over several values: add --multirun{as_list}"
    return None


def not_an_override(text: str, following: str, groups: Mapping[str, Sequence[str]], keys: Collection[str]) -> str:
    """Return a message on an argument that Hydra cannot parse, or on a word without `=`, with what was meant."""
    if "=" in text[1:]:
        quote = "quote a value that has special characters, 'key=\"...\"', and write lists without spaces: key=[a,b]"
        return f"{text!r} cannot be read as key=value: {quote}"
    value = following if following and "=" not in following else "..."
    suggestions = [f"{group}={text}" for group in ("experiment", *groups) if text in groups.get(group, ())]
    suggestions += [f"run={text}"] if "run" in keys and (Path(text) / CONFIG).is_file() else []
    suggestions += [f"{near}={value}" for near in get_close_matches(text, [*groups, *keys], n=1, cutoff=NEAR)]
    return f"an override must be key=value; got {text!r}" + (f"; did you mean {suggestions[0]}?" if suggestions else "")


def unknown_key(override: Override, keys: Collection[str], addable: Collection[str]) -> str:
    """Return a message on a key or group that the configuration lacks, with what was meant or how to add it."""
    key = override.key_or_group
    if key in addable and not override.is_delete():
        return f"no key {key!r} in the configuration: +{override.input_line} adds it"
    if "/" in key:
        near = get_close_matches(key, ["hydra/launcher", "hydra/sweeper"], n=1, cutoff=NEAR)
        return f"no group {key!r}" + (f"; did you mean {near[0]}?" if near else "; --help lists them all")
    return unknown(key, keys, addable)


def option_names(override: Override) -> list[str]:
    """Return the options that an override of a config group names: one option, or those of a list or a sweep."""
    if override.is_delete():
        return []
    if override.is_sweep_override():
        return list(override.sweep_string_iterator()) if override.is_choice_sweep() else []
    value = override.value()
    return ["null" if name is None else str(name) for name in (value if isinstance(value, list) else [value])]
