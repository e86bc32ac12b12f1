"""Read, write and compare the configurations of runs (`config.yaml`), including those of older versions.

`scoresde train` writes `config.yaml` before the first step, and stores the same settings in every checkpoint. Comparing
the two finds a file that was replaced, edited or copied from another run: a checkpoint is loaded only if the settings
that define the model agree, and training resumes only if all settings that affect the weights agree.
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from scoresde.atomic_files import replace_atomically
from scoresde.networks.configuration import with_parts
from scoresde.text import TOKENIZER

CONFIG = "config.yaml"
OWN = "own"  # names of the classes of the parts that only Python can build, by part
MOST_CHARACTERS = 1_000_000  # of a configuration, with its aliases and interpolations written out
TOKENS = "scoresde.text.Tokens"
LATENTS = "scoresde.evaluation.trained_latents.TrainedLatents"
AUTOENCODER = "autoencoder"  # directory in a run of latents with their autoencoder, if it was downloaded with them
TRAINED = "# scoresde train "  # beginning of the first line of a configuration that `scoresde train` wrote
RENAMED = {  # targets in the configurations of older runs, and their names now
    "scoresde.predictions.Karras": "scoresde.predictions.KarrasPreconditioning",
    "scoresde.losses.Karras": "scoresde.losses.KarrasWeighting",
    "scoresde.samplers.Karras": "scoresde.samplers.KarrasGrid",
    "scoresde.metrics.Classifier": "scoresde.metrics.ClassifierFeatures",
}
# A resumed run may change these parts, and these settings of the trainer: they do not affect the weights.
FREE_PARTS = ("held_out", "sampler", "trust", "hydra", "device", "run", "conditional", "class_names", "column_names")
FREE_SETTINGS = ["steps", "log_every", "checkpoint_every", "preview_every", "evaluate_every", "accumulate", "compile"]
FREE_SETTINGS += ["channels_last", "workers", "parallel", "wandb", "device"]
FREE_DATA = ("data.transform.run", "data.transform.cache")  # of latents: a digest identifies their autoencoder
MEASURED = ("data.validation.", "data.test.")  # held-out data, which do not affect the weights either
MODEL_PARTS = ["network", "sde", "prediction", "learned_variance", "conditional", "classifier", "contrastive"]
MODEL_PARTS += ["flow_map", "generator", "autoencoder", "lora", "data.shape", "data.transform", "data.training"]


def read_config(path: Path) -> DictConfig:
    """Read the configuration of a run; `_target_` names of older versions are replaced by the present ones.

    Raises:
        FileNotFoundError: there is no run at this path.
        ValueError: the file is not YAML, is not a mapping, or has more than `MOST_CHARACTERS` characters.
    """
    file = path / CONFIG
    if not file.is_file():
        raise no_run(path)
    try:
        _check_size(file, _aliased_size(yaml.compose(file.read_text(), yaml.SafeLoader), {}))
        config = OmegaConf.load(file)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} must be YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{file} is not the configuration of a run: it is not a mapping")
    tree = OmegaConf.to_container(config, resolve=False)
    _check_size(file, _interpolated_size("", tree, dict(nodes(tree)), {}))
    return OmegaConf.create(_with_own_data(_with_own_files(_with_new_names(tree), path), path))


def column_names_of(dataset: Any) -> list[str] | None:
    """Return the names of the columns of a table, which a run records as `column_names`; None for other data."""
    names = getattr(dataset, "names", None)
    return list(map(str, names)) if isinstance(names, (list, tuple)) else None


def _check_size(file: Path, size: float) -> None:
    """Raise ValueError if the text of a configuration is too long with aliases and interpolations written out."""
    if size > MOST_CHARACTERS:
        raise ValueError(
            f"{file} must have at most {MOST_CHARACTERS:,} characters with its aliases and interpolations written out; "
            f"got {size:.3g}: write the values themselves"
        )


def _aliased_size(node: yaml.Node | None, sizes: dict[int, float]) -> float:
    """Return the characters of a YAML node with its aliases written out; infinity if it contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        value = [] if node is None else node.value
        parts = [part for item in value for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + (len(value) if isinstance(value, str) else sum(_aliased_size(p, sizes) for p in parts))
    return sizes[id(node)]


def _interpolated_size(path: str, value: Any, values: Mapping[str, Any], sizes: dict[str, float]) -> float:
    """Return the characters of a value with its interpolations written out; infinity if they are nested or circular."""
    if path in sizes:
        return sizes[path]
    sizes[path] = math.inf
    if isinstance(value, str):
        others = [key for key in interpolations(path, value) if key in values]
        size = math.inf if re.search(r"\$\{[^}]*\$\{", value) else 1 + len(value)
    else:
        names = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        others, size = [join(path, name) for name in names], 1
    sizes[path] = size + sum(_interpolated_size(key, values[key], values, sizes) for key in others)
    return sizes[path]


def interpolations(path: str, text: str) -> Iterator[str]:
    """Yield the dotted paths that the value at `path` interpolates, as in "${data.shape}" or "${..shape}"."""
    for dots, key in re.findall(r"\$\{(?:[\w.]+:)?(\.*)([^${}:,]+)", text):
        key = re.sub(r"\[(\w+)\]", r".\1", key)
        parents = path.split(".")[: -len(dots)] if dots else []
        yield ".".join([*parents, key])


def nodes(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every node and leaf; the root has the path ""."""
    yield path, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield from nodes(value, join(path, name))


def join(path: str, name: object) -> str:
    """Return the dotted path of the key `name` in the node at `path`."""
    return f"{path}.{name}" if path else str(name)


def _with_new_names(node: Any) -> Any:
    """Return a configuration in which the present `_target_` names replace those of older versions."""
    if isinstance(node, dict):
        renamed = {
            key: RENAMED.get(value, value) if key == "_target_" else _with_new_names(value)
            for key, value in node.items()
        }
        return with_parts(renamed) if str(node.get("_target_")).startswith("scoresde.networks.") else renamed
    return [_with_new_names(value) for value in node] if isinstance(node, list) else node


def _with_own_files(node: Any, path: Path) -> Any:
    """Return a configuration whose tokeniser and autoencoder are those in a run's directory, if it has them.

    The directory may have been moved or copied since the configuration was written.
    """
    if isinstance(node, dict):
        target, own = str(node.get("_target_")), {}
        if target == TOKENS and node.get("file"):
            own = {"file": str(path / TOKENIZER)}
        elif target == LATENTS and (path / AUTOENCODER / CONFIG).is_file():
            own = {"run": str(path / AUTOENCODER)}
        return {key: _with_own_files(value, path) for key, value in node.items()} | own
    return [_with_own_files(value, path) for value in node] if isinstance(node, list) else node


def _with_own_data(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a configuration whose held-out data of `scoresde.fitting` are those in the directory of the run."""
    data: Any = tree.get("data")
    for name in ("validation", "test") if isinstance(data, dict) else ():
        node, file = data.get(name), f"{name}.npz"
        if isinstance(node, dict) and node.get("path") and str(node["path"]) == str(Path(str(tree.get("run"))) / file):
            node["path"] = str(path / file)
    return tree


def no_run(path: Path, hint: str = "") -> FileNotFoundError:
    """Return the FileNotFoundError for a path without a run; `hint` is a text to add to its message."""
    advice = "`scoresde train experiment=digits` makes one"
    return FileNotFoundError(f"no run at {path} (no {CONFIG} in it){hint}; {advice}")


def write_config(config: DictConfig, path: Path, command: Sequence[str] | None = None) -> None:
    """Write a configuration with its interpolations resolved, below a comment that records the training command.

    A command with characters that a YAML comment cannot hold, such as a line break, is not recorded.
    """
    text = OmegaConf.to_yaml(config, resolve=True)
    line = shlex.join(command or [])
    header = f"# {line}\n" if line and line.isprintable() else ""
    replace_atomically(path, lambda file: file.write_text(header + text))


def read_command(run: Path) -> list[str] | None:
    """Return the words of the command that trained a run; None if its configuration does not record it."""
    line = (run / CONFIG).read_text().partition("\n")[0]
    try:
        return shlex.split(line.removeprefix("# ")) if line.startswith(TRAINED) else None
    except ValueError:  # a quote without its end
        return None


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as nested dicts and lists, with its interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def nested(tree: Mapping[str, Any]) -> DictConfig:
    """Return nested dicts and lists as a configuration, the inverse of `plain`."""
    return OmegaConf.create(dict(tree))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted path: leaf} of a nested configuration; an empty dict or list is a leaf."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    if not items:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def changed_setting(before: Mapping[str, Any], now: Mapping[str, Any], model_only: bool = False) -> str | None:
    """Return the first setting that differs between two configurations of a run, with both values; None if none does.

    Args:
        before, now: configurations without interpolations.
        model_only: if True, compare the settings that define the model; if False, all that affect the weights.
    """
    old, new = (flatten(_with_new_names(tree)) for tree in (before, now))
    for key, value in new.items():  # a setting of the trainer that an older version lacked has its default
        old.setdefault(key, value if key.startswith(("trainer.", "condition.")) else None)
    free = {*(f"trainer.{name}" for name in FREE_SETTINGS), "data.sigma_data"}
    for key, value in old.items():
        is_of_model = any(f"{key}.".startswith(f"{part}.") for part in MODEL_PARTS)
        is_free = key in free or key.split(".")[0] in FREE_PARTS or key.endswith("text.file")
        if key in FREE_DATA:
            continue
        is_free = is_free or key.startswith(MEASURED)
        if value != new.get(key) and (is_of_model if model_only else not is_free):
            return f"{key} was {value!r}, now {new.get(key)!r}"
    return None


def own_parts(config: DictConfig) -> Mapping[str, str]:
    """Return the class names of the parts that only Python can build, by part; see `scoresde.fitted_config`."""
    own = config.get(OWN) or {}
    if not isinstance(own, (DictConfig, dict)):
        raise ValueError(f"{OWN} must be a mapping of parts to names of classes; got {own!r}: restore the file")
    return own


def refuse_own_parts(own: Mapping[str, str], given: Sequence[str]) -> None:
    """Raise ValueError if a run has a model or a part of one that only Python can build, and that is not given."""
    for part, name in own.items():
        if part in ("model", "network", "sde", "prediction") and part not in given:
            raise ValueError(
                f"the {part} of this run, {name}, is not of this library, or does not remember its arguments, so the "
                "configuration cannot build it: build it in Python and pass it, ss.load(path, model=model)"
            )
