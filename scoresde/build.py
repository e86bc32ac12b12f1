"""From a configuration to objects, and from a run's directory to its model.

A configuration is data: each node with a `_target_` is a constructor and its arguments. A run's configuration may come
from elsewhere, so only targets of this library and the classes of torch.nn and torch.optim are built, unless the caller
names further packages in `trust`.
"""

import math
import pkgutil
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from scoresde.dequantization import DataMap, Dequantization, Variational
from scoresde.networks.configuration import with_parts
from scoresde.protocols import Transform
from scoresde.score import ScoreModel
from scoresde.tensors import available
from scoresde.training import checkpoint
from scoresde.training.learned_dequantization import DEQUANTIZATION
from scoresde.training.posthoc import AVERAGES, reconstruct
from scoresde.training.power import WIDEST
from scoresde.training.trainer import CHECKPOINT

CONFIG = "config.yaml"
TRAINED = "# scoresde train "  # beginning of the first line of a configuration that `scoresde train` wrote
TORCH_PACKAGES = ("torch.nn.", "torch.optim.")
RENAMED = {  # targets in the configurations of older runs
    "scoresde.predictions.Karras": "scoresde.predictions.KarrasPreconditioning",
    "scoresde.losses.Karras": "scoresde.losses.KarrasWeighting",
    "scoresde.samplers.Karras": "scoresde.samplers.KarrasGrid",
    "scoresde.metrics.Classifier": "scoresde.metrics.ClassifierFeatures",
}


@dataclass
class Run:
    """A trained model: with its averaged weights, in eval mode; its transform; its configuration; its directory; the
    dequantisation of its data, None for continuous data; whether it was trained on the levels as they are instead."""

    model: ScoreModel
    transform: Transform
    config: DictConfig
    path: Path
    dequantization: Dequantization | None = None
    trained_on_levels: bool = False

    @property
    def data_map(self) -> DataMap:
        """From its data to states of its model, and back."""
        return DataMap(self.transform, self.dequantization)


def instantiate(config: Any, trust: Sequence[str] = (), **arguments: Any) -> Any:
    """The object that a configuration describes; None for None.

    Args:
        config: a node with `_target_`, nested ones included.
        trust: packages beside this library and torch whose targets may be built.
        arguments: further arguments of the constructor, objects rather than configuration.

    Raises:
        ValueError: a target that is not allowed or does not exist, or arguments that its constructor refuses.
    """
    for target in _targets(config):
        _check(target, trust)
    try:
        return hydra.utils.instantiate(config, _convert_="all", **arguments)
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__ or error
        target = config.get("_target_")
        raise ValueError(f"cannot build {target}: {cause}" if target else str(cause)) from error


def build_model(config: DictConfig, trust: Sequence[str] = ()) -> ScoreModel:
    """The score model of a run's configuration: its network, SDE and prediction type, untrained."""
    network, sde = instantiate(config.network, trust), instantiate(config.sde, trust)
    prediction, learned = instantiate(config.prediction, trust), bool(config.get("learned_variance", False))
    return ScoreModel(network, sde, prediction, learned)


def assemble(config: Mapping[str, Any], state: Mapping[str, Tensor], path: str | Path) -> Run:
    """A run that was not trained here, of a configuration and the weights of its network.

    Args:
        config: as a run's configuration, at least `sde`, `prediction`, `network` and `data`.
        state: the network's state dict.
        path: where it comes from.

    Raises:
        ValueError: weights that do not fit the configuration.
    """
    tree = OmegaConf.create(dict(config))
    model = build_model(tree)
    weights = {f"network.{name}": value for name, value in state.items()}
    _check_shapes(model, weights, Path(path))
    model.load_state_dict(weights)
    return _run(model.eval(), tree, Path(path), ())


def load(path: str | Path, weights: str | float = "ema", trust: Sequence[str] = (), device: str = "cpu") -> Run:
    """A run that `scoresde train` made.

    Args:
        path: the run's directory.
        weights: "ema", the averaged weights, or "raw", those of the last step; or a number, as such or as text: the
            sigma_rel of a power-function average, made of what the run stored of them (2312.02696), see
            `scoresde.training.posthoc.reconstruct`.
        trust: packages whose classes its configuration may name, see `instantiate`.
        device: for the model.

    Raises:
        FileNotFoundError: no run there, or none with a checkpoint yet; or no power-function averages in it.
        ValueError: another name of weights, a sigma_rel out of (0, 0.2887) or out of reach of what was stored, or a
            checkpoint that does not fit the configuration.
    """
    path = Path(path)
    sigma_rel = None if weights in ("ema", "raw") else _sigma_rel(weights)
    config = read_config(path)
    model = build_model(config, trust)
    groups, info = checkpoint.load(path / CHECKPOINT, {"model", "ema"} if weights == "ema" else {"model"})
    averages = groups.get("ema", {})
    if sigma_rel is not None:
        averages = reconstruct(path / AVERAGES, sigma_rel, info.get("step"), extra=[path / CHECKPOINT])
    state = {**groups["model"], **averages}
    _check_shapes(model, state, path / CHECKPOINT)
    model.load_state_dict(state)
    return _run(model.to(available(device)).eval(), config, path, trust)


def _sigma_rel(weights: str | float) -> float:
    """The width of the average that a choice of weights names."""
    try:
        width = math.nan if isinstance(weights, bool) else float(weights)
    except (TypeError, ValueError):
        width = math.nan
    if not 0 < width < WIDEST:
        raise ValueError(
            f"weights 'ema' or 'raw' expected; got {weights!r}, nor is that the sigma_rel of a power-function average: "
            f"a number between 0 and {WIDEST:.4f} such as 0.08"
        )
    return width


def _run(model: ScoreModel, config: DictConfig, path: Path, trust: Sequence[str]) -> Run:
    """A run of a model that has its weights."""
    data = config.data
    transform, way = (instantiate(data.get(part), trust) for part in ("transform", "dequantization"))
    on_levels = data.get("training") is not None and data.training.get("dequantization") is None
    return Run(model, transform, config, path, way, on_levels)


def load_dequantization(run: Run) -> Variational:
    """The dequantisation that `scoresde dequantize` learned for a run, without gradient, on the device of its model.

    Raises:
        FileNotFoundError: none was learned yet.
        ValueError: a file that is no such dequantisation.
    """
    path = run.path / DEQUANTIZATION
    if not path.is_file():
        raise FileNotFoundError(
            f"no learned dequantisation at {path}; learn one with `scoresde dequantize run={run.path}`"
        )
    groups, info = checkpoint.load(path)
    try:
        dequantization = Variational(**info["arguments"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a dequantisation of this library ({error!r})") from error
    state = groups.get("dequantization", {})
    _check_shapes(dequantization, state, path)
    dequantization.load_state_dict(state)
    device = next((p.device for p in run.model.parameters()), torch.device("cpu"))
    return dequantization.to(device).eval().requires_grad_(False)


def read_config(path: Path) -> DictConfig:
    """The configuration of a run.

    Raises:
        FileNotFoundError: there is no run at that path.
    """
    if not (path / CONFIG).is_file():
        raise no_run(path)
    config = OmegaConf.load(path / CONFIG)
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path / CONFIG} is not a run's configuration: a mapping expected")
    return OmegaConf.create(_with_new_names(OmegaConf.to_container(config, resolve=False)))


def _with_new_names(node: Any) -> Any:
    """The configuration with targets of older versions under their new names."""
    if isinstance(node, dict):
        renamed = {
            key: RENAMED.get(value, value) if key == "_target_" else _with_new_names(value)
            for key, value in node.items()
        }
        return with_parts(renamed) if str(node.get("_target_")).startswith("scoresde.networks.") else renamed
    return [_with_new_names(value) for value in node] if isinstance(node, list) else node


def no_run(path: Path, hint: str = "") -> FileNotFoundError:
    """The error of a path at which there is no run, with a hint at another one."""
    way = "`scoresde train experiment=digits` makes one"
    return FileNotFoundError(f"no run at {path} (no {CONFIG} in it){hint}; {way}")


def write_config(config: DictConfig, path: Path, command: Sequence[str] | None = None) -> None:
    """Write a configuration, its interpolations resolved, with the command that trained it as a comment.

    A command with characters that a YAML comment cannot hold, a line break for example, is not recorded.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(OmegaConf.to_container(config, resolve=True)))
    line = shlex.join(command or [])
    header = f"# {line}\n" if line and line.isprintable() else ""
    checkpoint.replace_atomically(path, lambda file: file.write_text(header + text))


def read_command(run: Path) -> list[str] | None:
    """Return the words of the command that trained a run; None if its configuration does not record it."""
    line = (run / CONFIG).read_text().partition("\n")[0]
    try:
        return shlex.split(line.removeprefix("# ")) if line.startswith(TRAINED) else None
    except ValueError:  # a quote without its end
        return None


def _check_shapes(model: torch.nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Name the first difference between a model and a state dict."""
    for name, tensor in model.state_dict().items():
        if name not in state or state[name].shape != tensor.shape:
            found = tuple(state[name].shape) if name in state else "nothing"
            raise ValueError(
                f"{source} does not fit its configuration: {name} {tuple(tensor.shape)} expected, got {found}"
            )
    if extra := sorted(set(state) - set(model.state_dict())):
        raise ValueError(f"{source} does not fit its configuration: it holds {extra[0]}, which the model has not")


def _targets(config: Any) -> Iterator[str]:
    """Every `_target_` in a configuration."""
    if isinstance(config, (DictConfig, dict)):
        for key, value in config.items():
            if key == "_target_":
                yield str(value)
            yield from _targets(value)
    elif isinstance(config, (ListConfig, list, tuple)):
        for value in config:
            yield from _targets(value)


def _check(target: str, trust: Sequence[str]) -> None:
    """Refuse a target outside the allowed packages, or that reaches out of them through an import of theirs."""
    if any(target == package or target.startswith(f"{package}.") for package in trust):
        return
    if not target.startswith(("scoresde.", *TORCH_PACKAGES)):
        package = target.split(".")[0]
        raise ValueError(
            f"target {target!r} is outside scoresde, torch.nn and torch.optim; if you trust it, say trust=[{package}]"
        )
    try:
        found = pkgutil.resolve_name(target)
    except Exception as error:
        raise ValueError(f"target {target!r} does not exist: {error}") from error
    home = getattr(found, "__module__", "") or ""
    if any(part.startswith("_") for part in target.split(".")):
        raise ValueError(f"target {target!r} is private")
    preset = callable(found) and home.startswith("scoresde.networks.")
    if not (isinstance(found, type) or preset) or not home.startswith(("scoresde.", *TORCH_PACKAGES)):
        raise ValueError(f"target {target!r} is not a class of scoresde, torch.nn or torch.optim")
