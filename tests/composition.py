"""Faster composition of configurations: most tests of commands compose one, of the same files and overrides.

Importing this module changes Hydra and OmegaConf. The configurations stay the same; a command takes half the time.
"""

import functools
import pickle
from pathlib import Path

import hydra._internal.defaults_list
import omegaconf.base
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

CONF = Path(__file__).resolve().parent.parent / "conf"
PACKAGED = ("pkg://", "structured://", f"file://{CONF}")  # configurations that no test changes

# Hydra composes the configuration of a command twice, once to read hydra.mode alone, which no test sets.
Hydra.get_mode = lambda self, config_name, overrides: None
# Hydra reads this map only to interpolate a defaults list; no defaults list here has an interpolation.
hydra._internal.defaults_list._create_interpolation_map = lambda overrides, defaults_list, self_added: None
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # OmegaConf derives its loader from this one
omegaconf.base.parse = functools.cache(omegaconf.base.parse)  # of an interpolation such as ${data.shape}


def remember(owner, method, key_of):
    """Make a method compute its result once for each key, and return copies. Without a key it computes every time."""
    compute, results = getattr(owner, method), {}

    def recall(*arguments, **options):
        key = key_of(*arguments, **options)
        if key is None:
            return compute(*arguments, **options)
        if key not in results:
            results[key] = pickle.dumps(compute(*arguments, **options))
        return pickle.loads(results[key])

    setattr(owner, method, recall)


def sources(repository):
    """The directories of a repository of configurations; None if a test may change one of them."""
    paths = tuple(f"{source.scheme()}://{source.path}" for source in repository.get_sources())
    return paths if all(path.startswith(PACKAGED) for path in paths) else None


def key_of_file(repository, config_path):
    paths = sources(repository)
    return paths and (paths, config_path)


def key_of_configuration(loader, defaults, repo):
    paths = sources(repo)
    return paths and (paths, repr(defaults))


def copy_of(config, memo, compute=DictConfig.__deepcopy__):
    """A deep copy of a configuration, by pickle (a tenth of the time) where its values are no objects."""
    if memo or config._get_flag("allow_objects"):
        return compute(config, memo)
    parent = config.__dict__["_parent"]
    config.__dict__["_parent"] = None
    try:
        result = pickle.loads(pickle.dumps(config))
    finally:
        config.__dict__["_parent"] = parent
    result.__dict__["_parent"] = parent
    return result


remember(OverridesParser, "parse_rule", lambda parser, text, rule: (text, rule))
remember(ConfigRepository, "load_config", key_of_file)
remember(ConfigLoaderImpl, "_compose_config_from_defaults_list", key_of_configuration)
DictConfig.__deepcopy__ = copy_of
