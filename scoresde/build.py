"""Models and data maps from configurations, and trained models from the directories of runs.

`instantiation` checks a configuration and builds its objects; this module puts them together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError
from torch import Tensor, nn

from scoresde import hub, sharing
from scoresde.arguments import check_memory
from scoresde.classifier import NoisyClassifier
from scoresde.configured import one_line
from scoresde.contrastive import ContrastiveModel
from scoresde.dequantization import DataMap, Dequantization, Variational
from scoresde.flowmaps import DenoisingGenerator, FlowMap
from scoresde.instantiation import TORCH_PACKAGES, check, instantiate, targets
from scoresde.networks import add_lora
from scoresde.pipelines import Autoencoder, CascadeStage, Density, Embedder, Latents
from scoresde.predictions import Prediction
from scoresde.protocols import CaptionEncoder, Transform
from scoresde.run_config import CONFIG, changed_setting, own_parts, plain, read_config, refuse_own_parts
from scoresde.score import ScoreModel
from scoresde.sdes import SDE
from scoresde.tensors import available
from scoresde.training import checkpoint, distributed
from scoresde.training.learned_dequantization import DEQUANTIZATION
from scoresde.training.posthoc_ema import AVERAGES, reconstruct
from scoresde.training.power_profiles import WIDEST
from scoresde.training.trainer import CHECKPOINT

KINDS: dict[type, tuple[str, str]] = {  # of models: what they are, and the function that loads their runs
    ScoreModel: ("a score model", "load"),
    NoisyClassifier: ("a classifier", "load_classifier"),
    ContrastiveModel: ("a contrastive model", "load_embedder"),
    Autoencoder: ("an autoencoder", "load_autoencoder"),
}


@dataclass(repr=False)
class Run:
    """A trained model with its transform, configuration and directory.

    Attributes:
        model: the score model in eval mode, with the weights that the caller of `load` chose.
        transform: maps data to model space.
        config: the configuration of the training run.
        path: the run's directory; for a model built by `assemble`, the file or folder with the original weights.
        dequantization: the dequantisation of integer grey levels; None for continuous data.
        trained_on_levels: whether the model was trained on the grey levels themselves, without dequantisation.
        text: maps captions to conditions, `run.model.given(run.text(["..."]))`; None if the data have no captions.
        weights: "ema", "raw" or a relative width: the weights of the model, see `load`.
        state_shape, data_shape: shapes `*` of a state and of a sample in data units; they differ for latents.
    """

    model: ScoreModel
    transform: Transform
    config: DictConfig
    path: Path
    dequantization: Dequantization | None = None
    trained_on_levels: bool = False
    text: CaptionEncoder | None = None
    weights: str | float = "ema"

    @property
    def data_map(self) -> DataMap:
        """The map from data to states in model space, and back."""
        return DataMap(self.transform, self.dequantization)

    push_to_hub = sharing.push_to_hub

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, model={one_line(self.model)}, transform={self.transform})"

    @property
    def stage(self) -> CascadeStage:
        """The model as a stage of a `pipelines.Cascade`."""
        loss: Any = self.config.get("loss")
        loss = instantiate(loss) if loss is not None and "resolutions" in loss else None
        split = (None, 0.0) if loss is None else (loss.resolutions, loss.augmentation)
        return CascadeStage(self.model, self.transform, tuple(self.config.data.shape), self.dequantization, *split)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.config.data.shape)

    @property
    def data_shape(self) -> tuple[int, ...]:
        return getattr(self.transform, "data_shape", None) or self.state_shape


def build_model(
    config: DictConfig, trust: Sequence[str] = (), network: Any = None
) -> ScoreModel | NoisyClassifier | ContrastiveModel | Autoencoder:
    """Build the untrained model of a configuration from its network, SDE and prediction type.

    It is a score model; a noise-conditional classifier if the configuration has `classifier: true`; a contrastive model
    if it has `contrastive: true`; a flow map if it has `flow_map`, further arguments of `FlowMap`; a denoising
    generator if it has `generator`, further arguments of `DenoisingGenerator`; or an autoencoder, without SDE, if it
    has `autoencoder`, further arguments of `Autoencoder`. With `lora`, the network has adapters of this rank.
    `network` replaces the network of the configuration.

    Raises:
        ValueError: only Python can build a part of the model (`scoresde.fitting`), or the network is for states with
            more dimensions than `data.shape` has; see also `instantiate`.
    """
    refuse_own_parts(own_parts(config), ("network",) if network is not None else ())
    try:
        if network is None:
            check(config.network, nn.Module, trust)
            check_memory("network", _bytes_of(config.network))
            network = instantiate(config.network, trust, nn.Module)
    except InterpolationKeyError as error:
        shape = OmegaConf.select(config, "data.shape")
        raise ValueError(
            f"the network must fit states of shape {shape}; got a network for more dimensions "
            f"({str(error).splitlines()[0]}): take network=mlp (any shape), series, images or volumes"
        ) from error
    if (node := config.get("autoencoder")) is not None:
        further = {key: value for key, value in plain(node).items() if key != "density"}
        return Autoencoder(network, instantiate(node.get("density"), trust, Density | None), **further)
    sde = instantiate(config.sde, trust, SDE)
    prediction, learned = instantiate(config.prediction, trust, Prediction), bool(config.get("learned_variance", False))
    if config.get("classifier"):
        return NoisyClassifier(network, sde, prediction)
    if config.get("contrastive"):
        return ContrastiveModel(network, sde, prediction)
    conditional = config.get("conditional") or ()
    if config.get("flow_map") is not None:
        model: Any = FlowMap(network, sde, prediction, conditional=conditional, **plain(config.flow_map))
    elif config.get("generator") is not None:
        model = DenoisingGenerator(network, sde, prediction, conditional=conditional, **plain(config.generator))
    else:
        model = ScoreModel(network, sde, prediction, learned, conditional)
    if rank := config.get("lora"):
        add_lora(model.network, rank)
    return model


def _bytes_of(config: DictConfig) -> int:
    """Return the bytes that a network's tensors take, without allocating them; 0 for networks of other packages."""
    if any(not target.startswith(("scoresde.", *TORCH_PACKAGES)) for target in targets(config)):
        return 0
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            network = hydra.utils.instantiate(config, _convert_="all")
        return sum(tensor.nbytes for tensor in network.state_dict().values())
    except Exception:  # the caller builds the network next, and reports the error
        return 0


def build_data_map(data: DictConfig, trust: Sequence[str] = ()) -> DataMap:
    """Build the map from data to model states, from the transform and the dequantisation of a configuration."""
    transform = instantiate(data.get("transform"), trust, Transform | None)
    return DataMap(transform, instantiate(data.get("dequantization"), trust, Dequantization | None))


def assemble(config: Mapping[str, Any], state: Mapping[str, Tensor], path: str | Path) -> Run:
    """Return a run with this configuration and the weights of a network that was trained elsewhere.

    Args:
        config: the configuration of a run, with at least `sde`, `prediction`, `network` and `data`.
        state: the network's state dict, in any floating-point dtype.
        path: the file or folder that the weights come from.

    Raises:
        ValueError: the weights do not fit the configuration.
    """
    tree = OmegaConf.create(dict(config))
    model: Any = build_model(tree)
    weights = {f"network.{name}": value for name, value in state.items()}
    expected = model.state_dict()
    for name in weights.keys() & expected.keys():
        if weights[name].is_floating_point() and expected[name].is_floating_point():
            weights[name] = weights[name].to(expected[name].dtype)
    _check_fit(expected, weights, Path(path))
    model.load_state_dict(weights)
    return _run(model.eval(), tree, Path(path), ())


def load(
    path: str | Path,
    weights: str | float = "ema",
    trust: Sequence[str] = (),
    device: str = "cpu",
    model: Any = None,
    transform: Transform | None = None,
) -> Run:
    """Load a run that `scoresde train`, `scoresde convert` or `scoresde.fit` wrote.

        run = ss.load("runs/digits")
        x = ss.samplers.DDIM()(run.model, shape=(16, *run.state_shape), seeds=range(16)).x
        images = run.transform.inverse(x)  # in the units of the data

    Args:
        path: the directory of the run, or `hf://user/name` or `hf://user/name@revision` for a run on the Hugging Face
            hub, see `scoresde.hub`.
        weights: "ema" for the averaged weights, "raw" for the weights of the last step, or sigma_rel, the relative
            width of a power-function average (2312.02696), as a number or a string. This average is reconstructed from
            the run's snapshots, see `scoresde.training.posthoc_ema.reconstruct`.
        trust: packages whose classes the configuration may name, see `instantiate`.
        device: the device of the model.
        model: a model of your own class, which gets the weights of the run; or its network, if only the network is of
            your own class. Default: the model that the configuration describes.
        transform: a transform of your own class. Default: that of the configuration.

    Raises:
        FileNotFoundError: there is no run, no checkpoint, or no snapshot of power-function averages.
        ValueError: `weights` is invalid; sigma_rel is outside (0, 0.2887), or the snapshots cannot be combined to this
            width; the checkpoint does not fit the configuration or the model; or a part of the run is of your own
            class and is not given.
    """
    path = directory(path)
    loaded, config = _load(path, weights, trust, device, model)
    if model is None:
        _check_kind(loaded, ScoreModel, path)
    own = own_parts(config)
    if transform is None and "transform" in own:
        raise ValueError(
            f"the transform of {path}, {own['transform']}, is of a class of your own: pass it, "
            "ss.load(path, transform=transform)"
        )
    return replace(_run(loaded, config, path, trust, transform), weights=weights)


def load_classifier(
    path: str | Path, weights: str | float = "ema", trust: Sequence[str] = (), device: str = "cpu"
) -> NoisyClassifier:
    """Load a classifier p(y | x_t) that `scoresde train` or `scoresde convert` wrote, for `guidance.Classifier`.

        classifier = ss.load_classifier("runs/digits_classifier")
        logits = classifier(x, t)  # (B, K)

    Args:
        path: the directory of the run.
        weights: "ema", "raw", or the width of a power-function average, see `load`.
        trust: packages whose classes the configuration may name.
        device: the device of the classifier.

    Raises:
        FileNotFoundError: there is no run, or no checkpoint.
        ValueError: the run is that of another kind of model, or the checkpoint does not fit the configuration.
    """
    model, _ = _load(directory(path), weights, trust, device)
    _check_kind(model, NoisyClassifier, path)
    return model


def load_autoencoder(
    path: str | Path, weights: str | float = "ema", trust: Sequence[str] = (), device: str = "cpu"
) -> Latents:
    """Load an autoencoder that `scoresde train` wrote, as a transform of its data to latents without shift and scale.

    Its `autoencoder` encodes and decodes, and `scoresde.evaluation.trained_latents.TrainedLatents` adds shift and
    scale.

    Args:
        path: the directory of the run.
        weights: "ema", "raw", or the width of a power-function average, see `load`.
        trust: packages whose classes the configuration may name.
        device: the device of the autoencoder.

    Raises:
        FileNotFoundError: there is no run, or no checkpoint.
        ValueError: the run is that of another kind of model, or the checkpoint does not fit the configuration.
    """
    model, config = _load(directory(path), weights, trust, device)
    _check_kind(model, Autoencoder, path)
    return Latents(model, build_data_map(config.data, trust).transform)


def load_embedder(
    path: str | Path, weights: str | float = "ema", trust: Sequence[str] = (), device: str = "cpu"
) -> Embedder:
    """Load a contrastive model that `scoresde train` wrote, as the embeddings of data and of conditions.

        embedder = ss.load_embedder("runs/openmoji_contrastive")

    Args:
        path: the directory of the run.
        weights: "ema", "raw", or the width of a power-function average, see `load`.
        trust: packages whose classes the configuration may name.
        device: the device of the model.

    Raises:
        FileNotFoundError: there is no run, or no checkpoint.
        ValueError: the run is that of another kind of model, or the checkpoint does not fit the configuration.
    """
    model, config = _load(directory(path), weights, trust, device)
    _check_kind(model, ContrastiveModel, path)
    text = instantiate(config.data.get("text"), trust, CaptionEncoder | None)
    return Embedder(model, build_data_map(config.data, trust), text)


def _check_kind(model: Any, kind: type, path: str | Path) -> None:
    """Raise ValueError if the run at `path` has a model of another kind."""
    if not isinstance(model, kind):
        own, function = next(texts for base, texts in KINDS.items() if isinstance(model, base))
        raise ValueError(f"{path} must be the run of {KINDS[kind][0]}; got that of {own}: use ss.{function}")


def _load(
    path: Path, weights: str | float, trust: Sequence[str], device: str, model: Any = None
) -> tuple[Any, DictConfig]:
    """Return the model of a run in eval mode, and the configuration; `model` as in `load`."""
    sigma_rel = None if weights in ("ema", "raw") else _sigma_rel(weights)
    config = read_config(path)
    if model is None or not hasattr(model, "sde"):
        model = build_model(config, trust, model)
    parts = {"model", "ema"} if weights == "ema" else {"model"}
    groups, info = checkpoint.load(path / CHECKPOINT, parts, needed=["model"])
    if weights == "raw" and info.get("raw") is False:
        raise ValueError(f"{path} has only averaged weights, not those of the last step: pass weights='ema'")
    is_training = "optimizer" in info  # training averages all trained weights; a converted run may have no averages
    if weights == "ema" and is_training and "ema" not in groups:
        raise ValueError(
            f"{path / CHECKPOINT} must have the averaged weights 'ema'; got none, so the file is incomplete: pass "
            "weights=raw for the weights of the last step"
        )
    trained = info.get("config")
    if trained and (change := changed_setting(trained, plain(config), model_only=True)):
        raise ValueError(
            f"{path / CONFIG} must have the settings that {CHECKPOINT} was trained with, but {change}: restore the file"
        )
    averages = groups.get("ema", {})
    if sigma_rel is not None:
        averages = reconstruct(path / AVERAGES, sigma_rel, info.get("step"), extra=[path / CHECKPOINT])
    if weights != "raw" and is_training:
        _check_fit({name: p for name, p in model.named_parameters() if p.requires_grad}, averages, path / CHECKPOINT)
    state, own = {**groups["model"], **averages}, model.state_dict()
    _check_fit(own, state, path / CHECKPOINT)
    model.load_state_dict({name: distributed.sharded_like(x, own[name]) for name, x in state.items()})
    return model.to(available(device)).eval(), config


def directory(path: str | Path) -> Path:
    """Return the directory of a run, downloaded first if `path` is its address on the Hugging Face hub."""
    return hub.download(path, sharing.FILES) if hub.is_address(path) else Path(path)


def _sigma_rel(weights: str | float) -> float:
    """Return `weights` as the number sigma_rel; raise ValueError if it is not a number between 0 and 0.2887."""
    try:
        sigma_rel = math.nan if isinstance(weights, bool) else float(weights)
    except (TypeError, ValueError):
        sigma_rel = math.nan
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(
            f"weights must be 'ema', 'raw', or the sigma_rel of a power-function average, a number between 0 and "
            f"{WIDEST:.4f} such as 0.08; got {weights!r}"
        )
    return sigma_rel


def _run(
    model: ScoreModel, config: DictConfig, path: Path, trust: Sequence[str], transform: Transform | None = None
) -> Run:
    """Return the `Run` of a model whose weights are loaded."""
    data, training = build_data_map(config.data, trust), config.data.get("training")
    on_levels = training is not None and training.get("dequantization") is None
    text = instantiate(config.data.get("text"), trust, CaptionEncoder | None)
    return Run(model, transform or data.transform, config, path, data.dequantization, on_levels, text)


def load_dequantization(run: Run) -> Variational:
    """Load the dequantisation that `scoresde dequantize` learned for a run, without gradient, on the model's device.

    Raises:
        FileNotFoundError: no dequantisation was learned for this run.
        ValueError: the file is not a learned dequantisation of this library.
    """
    path = run.path / DEQUANTIZATION
    if not path.is_file():
        raise FileNotFoundError(f"no learned dequantisation at {path}; `scoresde dequantize run={run.path}` learns one")
    groups, info = checkpoint.load(path)
    try:
        dequantization, state = Variational(**info["arguments"]), groups["dequantization"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a learned dequantisation of this library ({error!r})") from error
    _check_fit(dequantization.state_dict(), state, path)
    dequantization.load_state_dict(state)
    device = next((p.device for p in run.model.parameters()), torch.device("cpu"))
    return dequantization.to(device).eval().requires_grad_(False)


def _check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Path) -> None:
    """Raise ValueError with the first difference if the stored tensors `state` do not fit those of the model."""
    if text := checkpoint.difference(expected, state):
        raise ValueError(f"the weights in {source} do not fit the model of the configuration: {text}")
