"""`scoresde report`."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import Dataset

from scoresde import build, data
from scoresde.cli.common import check_run, config_directory, flatten
from scoresde.cli.output import Record, config_dir, print_rows
from scoresde.cli.overrides import literal
from scoresde.report import FilmSettings, Source, write_report
from scoresde.report.facts import Facts

BESIDE = ("run", "trust", "hydra", "held_out")  # parts of a configuration that change nothing of what is learned
MISSING = "???"  # what has no default
GROUPS = ("data", "network", "sde", "prediction", "loss", "sampler", "optimizer", "trainer")


def report(config: DictConfig) -> Record:
    """Write a run as one HTML page: what came of it, and how to have it again."""
    path = check_run(config.run)
    of_run = build.read_config(path)
    refuse_resolvers(of_run, path)
    plain: dict[str, Any] = OmegaConf.to_container(of_run, resolve=True)  # type: ignore[assignment]
    training = training_of(plain)
    trust = [f"trust={written(list(config.trust))}"] if config.trust else []
    film = (
        FilmSettings(config.film_samples, config.film_steps, config.film_frames, config.seed) if config.film else None
    )
    split = str((Facts(path, plain).likelihood or {}).get("split", "test"))  # of the figure in the headline
    source = Source(
        path=path,
        config=plain,
        config_text=OmegaConf.to_yaml(OmegaConf.create(plain)),
        run=model_of(path, config),
        named=[f"run={literal(str(path))}", *trust],
        data={split: data_of(of_run, split, config.trust)},
        train=None if training is None else ["scoresde", "train", *config_dir(), *training],
        film=film,
        device=config.device,
    )
    page = write_report(source, None if config.out is None else Path(config.out))
    paths = {"report": page}
    print_rows({**paths, "size": f"{page.stat().st_size / 1e6:.1f} MB"})
    return {"run": path, "rows": [], "paths": paths}


def model_of(path: Path, config: DictConfig) -> build.Run | str:
    """The run's model, or why there is none: it has no checkpoint yet."""
    try:
        return build.load(path, config.weights, config.trust, config.device)
    except FileNotFoundError as error:
        return str(error)


def data_of(config: DictConfig, split: str, trust: Sequence[str]) -> Dataset | str:
    """A split of the run's data, or why it is not to be had; nothing is downloaded for a report."""
    if (node := (config.get("data") or {}).get(split)) is None:
        return f"the run's configuration names no {split} data"
    try:
        return build.instantiate(OmegaConf.merge(node, offline(str(node.get("_target_")))), trust)
    except (ValueError, OSError, ImportError) as error:
        return f"the {split} data is not to be had ({error})"


def offline(name: str) -> dict[str, bool]:
    """The arguments with which a dataset of this library does not download anything."""
    found = getattr(data, name.rpartition(".")[2], None) if name.startswith("scoresde.data.") else None
    return {"download": False} if found is not None and "download" in inspect.signature(found).parameters else {}


def refuse_resolvers(config: DictConfig, path: Path) -> None:
    """See that a configuration says what it means by itself: the page shows it, and goes to others.

    Raises:
        ValueError: a resolver in it, which may put the value of an environment variable into the page.
    """
    unresolved: Any = OmegaConf.to_container(config, resolve=False)
    for key, value in flatten(unresolved).items():
        if re.search(r"\$\{[^}]*(:|\$\{)", str(value)):
            raise ValueError(
                f"a configuration without resolvers expected in {path / build.CONFIG}; got {key}: {value}, whose value "
                "depends on the machine and would be shown: write the value itself"
            )


# --- the command of a training


def training_of(config: Mapping[str, Any]) -> list[str] | None:
    """The overrides of `train` that make a run of that configuration; None for one that was not trained here.

    The experiment is the nearest one; options of the groups and single overrides say what is different.
    """
    if any(group not in config for group in GROUPS if group not in BESIDE):
        return None
    loader: ConfigLoader = GlobalHydra.instance().config_loader()
    wanted = leaves(config)
    overrides = [f"experiment={nearest(wanted, loader.get_group_options('experiment'))}"]
    try:
        found, _ = composed(overrides, wanted)
        for group in GROUPS:
            if target(config, group) == target(found, group):
                continue
            options = [name for name in loader.get_group_options(group) if may_be(config, group, name)]
            tried = [[*overrides, f"{group}={option}"] for option in options]
            overrides = min([overrides, *tried], key=lambda some: len(differences(some, wanted)))
            found, _ = composed(overrides, wanted)
        overrides += differences(overrides, wanted)
        composed(overrides, wanted)
    except (HydraException, OmegaConfBaseException):
        return None
    return overrides


def nearest(wanted: Mapping[str, Any], experiments: Sequence[str]) -> str:
    """The experiment that differs from a configuration in the fewest leaves."""
    if (name := wanted.get("name")) in experiments and not differences([f"experiment={name}"], wanted):
        return str(name)
    return min(experiments, key=lambda name: len(differences([f"experiment={name}"], wanted)))


def may_be(config: Mapping[str, Any], group: str, option: str) -> bool:
    """Whether a part of the configuration may come from an option of the group: it names the same class."""
    path = config_directory() / group / f"{option}.yaml"
    if not path.is_file():  # one of the user's own
        return True
    node: Any = OmegaConf.load(path)
    if "defaults" in node:
        return True
    of_option = (node.get("train") or {}).get("_target_") if group == "data" else node.get("_target_")
    return of_option == target(config, group)


def composed(overrides: Sequence[str], wanted: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration of `train` under those overrides, and what it demands, taken from the one that is wanted."""
    config = hydra.compose("train", overrides=list(overrides))
    unresolved: Any = OmegaConf.to_container(config, resolve=False)
    demanded = sorted(key for key, value in leaves(unresolved).items() if value == MISSING)
    for key in demanded:
        OmegaConf.update(config, key, wanted.get(key))
    return OmegaConf.to_container(config, resolve=True), demanded  # type: ignore[return-value]


def differences(overrides: Sequence[str], wanted: Mapping[str, Any]) -> list[str]:
    """The overrides that make a configuration of `train` the wanted one."""
    try:
        config, demanded = composed(overrides, wanted)
    except (HydraException, OmegaConfBaseException):  # an option that does not go with the experiment
        return [*wanted]
    found = leaves(config)
    changed = [f"{key}={written(wanted[key])}" for key in demanded if wanted.get(key) is not None]
    for key, value in wanted.items():
        if key.split(".")[0] in BESIDE or key in demanded or found.get(key, ...) == value:
            continue
        if key.startswith("data.transform.") and found.get(key, ...) is None:
            continue  # computed from the data
        is_new = not any(f"{name}.".startswith(f"{key}.") for name in found)
        changed.append(f"{'+' if is_new else ''}{key}={written(value)}")
    gone = [key for key in found if key not in wanted and key.split(".")[0] not in BESIDE and found[key] is not None]
    gone = [key for key in gone if not any(f"{key}.".startswith(f"{name}.") for name in wanted)]  # given as a whole
    return [*changed, *dict.fromkeys(f"~{_missing(key, wanted)}" for key in gone)]


def _missing(key: str, wanted: Mapping[str, Any]) -> str:
    """The largest part, this key or one that holds it, that a configuration has nothing of."""
    parts = key.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next(path for path in paths if not any(f"{name}.".startswith(f"{path}.") for name in wanted))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What is no mapping, or an empty one, by its dotted path."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        found |= leaves(value, name) if isinstance(value, Mapping) and value else {name: value}
    return found


def written(value: Any) -> str:
    """A value as an override has it: what Hydra reads as that value."""
    if isinstance(value, str):
        return literal(value)
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{written(key)}:{written(part)}' for key, part in value.items())}}}"
    return str(value) if isinstance(value, float) else json.dumps(value)  # inf and nan, which JSON has not


def target(config: Mapping[str, Any], group: str) -> Any:
    """The class that a part of the configuration names; of data, that of its training split."""
    node = config.get(group) or {}
    return (node.get("train") or {}).get("_target_") if group == "data" else node.get("_target_")
