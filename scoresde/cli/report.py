"""`scoresde report`."""

import inspect
import json
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
from scoresde.cli.common import config_directory
from scoresde.cli.names import check_run
from scoresde.cli.output import Record, say
from scoresde.report import FilmSettings, Source, write_report
from scoresde.report.facts import Facts

BESIDE = ("run", "trust", "hydra", "held_out")  # parts of a configuration that change nothing of what is learned
GROUPS = ("data", "network", "sde", "prediction", "loss", "sampler", "optimizer", "trainer")


def report(config: DictConfig) -> Record:
    """Write a run as one HTML page: what came of it, and how to have it again."""
    path = check_run(config.run)
    of_run = build.read_config(path)
    plain: dict[str, Any] = OmegaConf.to_container(of_run, resolve=True)  # type: ignore[assignment]
    film = (
        FilmSettings(config.film_samples, config.film_steps, config.film_frames, config.seed) if config.film else None
    )
    split = str((Facts(path, plain).likelihood or {}).get("split", "test"))  # of the figure in the headline
    source = Source(
        path=path,
        config=plain,
        config_text=OmegaConf.to_yaml(OmegaConf.create(plain)),
        run=model_of(path, config),
        data={split: data_of(of_run, split, config.trust)},
        train=train_command(plain),
        film=film,
        device=config.device,
    )
    written = write_report(source, None if config.out is None else Path(config.out))
    paths = {"report": written}
    say({**paths, "size": f"{written.stat().st_size / 1e6:.1f} MB"})
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


# --- the command of a training


def train_command(config: Mapping[str, Any]) -> list[str] | None:
    """The words of the command that makes a run of that configuration; None if `scoresde train` has no such experiment.

    The experiment is the one of the run's name; options of the groups and single overrides say what is different.
    """
    loader: ConfigLoader = GlobalHydra.instance().config_loader()
    name = config.get("name")
    if "trainer" not in config or name not in loader.get_group_options("experiment"):
        return None
    wanted = leaves(config)
    overrides = [f"experiment={name}"]
    try:
        for group in GROUPS:
            if target(config, group) == target(composed(overrides, wanted)[0], group):
                continue
            options = [name for name in loader.get_group_options(group) if may_be(config, group, name)]
            tried = [[*overrides, f"{group}={option}"] for option in options]
            overrides = min([overrides, *tried], key=lambda some: len(differences(some, wanted)))
        overrides += differences(overrides, wanted)
    except (HydraException, OmegaConfBaseException):
        return None
    return ["scoresde", "train", *overrides]


def may_be(config: Mapping[str, Any], group: str, option: str) -> bool:
    """Whether a part of the configuration may come from an option of the group: it names the same class."""
    path = config_directory() / group / f"{option}.yaml"
    if not path.is_file():  # one of the user's own
        return True
    node: Any = OmegaConf.load(path)
    if "defaults" in node:
        return True
    named = (node.get("train") or {}).get("_target_") if group == "data" else node.get("_target_")
    return named == target(config, group)


def composed(overrides: Sequence[str], wanted: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration of `train` under those overrides, and what it demands, taken from the one that is wanted."""
    config = hydra.compose("train", overrides=list(overrides))
    demanded = sorted(OmegaConf.missing_keys(config))
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
    """A value as an override has it."""
    if isinstance(value, str):
        return value if value and all(c.isalnum() or c in "_-./" for c in value) else f"'{value}'"
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    return json.dumps(value)


def target(config: Mapping[str, Any], group: str) -> Any:
    """The class that a part of the configuration names; of data, that of its training split."""
    node = config.get(group) or {}
    return (node.get("train") or {}).get("_target_") if group == "data" else node.get("_target_")
