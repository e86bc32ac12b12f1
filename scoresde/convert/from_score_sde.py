"""Checkpoints of yang-song/score_sde_pytorch (2011.13456): its DDPM, DDPM++ and NCSN++ networks under VP, sub-VP, VE.

A checkpoint holds `model`, the state dict of a network whose modules are one flat list, `all_modules.0`,
`all_modules.1`, ... in the order in which data passes them; and `ema`, the averages of the trainable parameters as a
list in the same order. `UNet` registers its modules in that order too, so the two are matched one by one. Frozen
tensors (the Fourier frequencies) have no average: they come from `model`.

What the network is asked at time t in [0, 1], and what its output F means there, is that project's score function:

| SDE, labels          | noise label             | score                                     |
| -------------------- | ----------------------- | ----------------------------------------- |
| VP, sub-VP           | 999 t                   | -F / sigma(t)                             |
| VP, discrete         | (N - 1) t, not rounded  | -F / sigma_k, k = floor((N - 1) t)        |
| VE                   | sigma(t)                | F                                         |
| VE, discrete         | k = round((N - 1)(1 - t)) | F, or F / sigma_k for scale_by_sigma    |

with sigma_k in the first case 1 - prod(1 - beta_i), in the second the geometric sequence that falls from sigma_max.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.build import Run, assemble
from scoresde.convert.files import load_tensors
from scoresde.convert.runs import image_data
from scoresde.networks.blocks import Attention, ResidualBlock
from scoresde.networks.embeddings import FourierEmbedding
from scoresde.networks.resampling import ResampledConvolution
from scoresde.networks.unet import UNet
from scoresde.predictions import Noise, Score, SigmaScore
from scoresde.sdes import SDE

Config = Mapping[str, Any]
State = dict[str, Tensor]


class DiscreteVP(Noise):
    """A noise network trained on N steps of DDPM's schedule, as score_sde asks it at any time.

    The label is (N - 1) t, not rounded; the score is -F / sigma_k with k = floor((N - 1) t) and
    sigma_k^2 = 1 - prod_{i <= k} (1 - beta_i), beta_i from beta_min/N to beta_max/N: so F = eps sigma_k / sigma(t).

    Args:
        beta_min, beta_max: as of the SDE.
        steps: N.
    """

    def __init__(self, beta_min: float, beta_max: float, steps: int):
        super().__init__()
        self.steps = steps
        # In float32 as there: at the first labels its rounding is seen in the fifth digit of the score.
        betas = torch.linspace(beta_min / steps, beta_max / steps, steps, dtype=torch.float32)
        self.sigmas = torch.sqrt(1 - torch.cumprod(1 - betas, dim=0)).double()  # no buffer: schedules stay float64

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        return (self.steps - 1) * t

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        # In float32 a node's own label lands on it; the last digit of a float64 product may fall below.
        step = self.c_noise(sde, t).float().long().clamp(0, self.steps - 1)
        return torch.zeros_like(t), self.sigmas.to(t.device)[step] / sde.sigma(t)


class ContinuousVE(SigmaScore):
    """`SigmaScore`, its label in float32 as score_sde computes it: Fourier features show the last digit of sigma."""

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        low, high = (float(sde.sigma(torch.tensor(end, dtype=torch.float64))) for end in (0.0, 1.0))
        return (low * (high / low) ** t.float()).to(t)


class DiscreteVE(Score):
    """A score network trained on N noise levels of VE, as score_sde asks it at any time.

    The label is k = round((N - 1) (1 - t)), 0 for the highest level; the score is F, or F / sigma_k where the network
    was trained with its output divided by sigma_k = sigma_max (sigma_min / sigma_max)^(k / (N - 1)).

    Args:
        sigma_min, sigma_max: as of the SDE.
        steps: N.
        scale_by_sigma: the network's output was divided by sigma_k.
    """

    def __init__(self, sigma_min: float, sigma_max: float, steps: int, scale_by_sigma: bool):
        super().__init__()
        if steps < 2:
            raise ValueError(f"two noise levels or more expected; got {steps}")
        self.sigma_min, self.sigma_max, self.steps, self.scale_by_sigma = sigma_min, sigma_max, steps, scale_by_sigma

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        return ((self.steps - 1) * (1 - t).float()).round().to(t)

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        p, q = super().target(sde, t)
        if self.scale_by_sigma:
            q = q * self.sigma_max * (self.sigma_min / self.sigma_max) ** (self.c_noise(sde, t) / (self.steps - 1))
        return p, q


def score_sde(path: str | Path, config: Config | str | Path | None = None, weights: str = "ema") -> Run:
    """The model of a score_sde_pytorch checkpoint; its score at (x, t) is that project's.

    Args:
        path: the checkpoint, `checkpoint_N.pth`.
        config: its configuration: a JSON dump of the ConfigDict, the path of one, or None for `<stem>.config.json`
            beside the checkpoint (`json.dump(config.to_dict(), file, default=str)` writes one).
        weights: "ema" or "raw".

    Raises:
        FileNotFoundError: no such checkpoint, or no configuration.
        ValueError: a configuration this cannot express, or weights of another shape, the first block named.
    """
    path = Path(path)
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights 'ema' or 'raw' expected; got {weights!r}")
    original = read_config(path, config)
    state = read_weights(path, weights)
    settings = configuration(original)
    with torch.device("meta"):
        network = UNet(**{key: value for key, value in settings["network"].items() if key != "_target_"})
    return assemble(settings, translate(state, network), path)


def read_config(path: Path, config: Config | str | Path | None) -> Config:
    """The configuration of a checkpoint, given or read from the file beside it."""
    if isinstance(config, Mapping):
        return _checked(config, "config")
    file = path.with_name(f"{path.stem}.config.json") if config is None else Path(config)
    if not file.is_file():
        raise FileNotFoundError(
            f"no configuration at {file}; write one with json.dump(config.to_dict(), file, default=str) where the "
            f"checkpoint was trained, or pass config="
        )
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); a dump of the training's configuration expected") from error
    return _checked(found, file)


def _checked(config: Any, source: Any) -> Config:
    if not isinstance(config, Mapping) or not {"data", "model", "training"} <= config.keys():
        raise ValueError(
            f"{source} is not a configuration of score_sde: the sections data, model and training expected"
        )
    return config


def read_weights(path: Path, weights: str = "ema") -> State:
    """The tensors of a checkpoint's `model` without the prefix of DataParallel, raw or with the averages in place."""
    found = load_tensors(path)
    if not isinstance(found, dict) or "model" not in found:
        keys = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"a checkpoint with 'model' expected in {path}; got {keys}")
    if not isinstance(found["model"], dict) or not all(isinstance(value, Tensor) for value in found["model"].values()):
        raise ValueError(f"'model' in {path} with names and tensors expected; got {type(found['model']).__name__}")
    state = {name.removeprefix("module."): value for name, value in found["model"].items()}
    state.pop("sigmas", None)  # the table of noise levels, known from the configuration
    if weights == "raw":
        return state
    ema = found.get("ema")
    averages = ema.get("shadow_params") if isinstance(ema, dict) else None
    trainable = [name for name, value in state.items() if not _frozen(name, value)]
    if averages is None or len(averages) != len(trainable):
        got = "none" if averages is None else str(len(averages))
        raise ValueError(
            f"{len(trainable)} averages in ema.shadow_params of {path} expected; got {got}: weights='raw'?"
        )
    for name, average in zip(trainable, averages, strict=True):
        if average.shape != state[name].shape:
            raise ValueError(f"the average of {name} {tuple(state[name].shape)} expected; got {tuple(average.shape)}")
        state[name] = average
    return state


def _frozen(name: str, value: Tensor) -> bool:
    """Whether this is the matrix of Fourier frequencies, the one tensor that does not train."""
    return name == "all_modules.0.W" and value.ndim == 1


def configuration(config: Config) -> dict[str, Any]:
    """Our configuration of a model, from that project's.

    Raises:
        ValueError: a network, SDE or option that is not of this family.
    """
    data, model, training = (_Section(name, config[name]) for name in ("data", "model", "training"))
    kind, continuous = training["sde"].lower(), bool(training["continuous"])
    return {
        "name": f"score_sde_{model['name']}",
        "sde": _sde(kind, model),
        "prediction": _prediction(kind, continuous, model),
        "network": _network(kind, continuous, data, model),
        "data": _data(data),
    }


class _Section(dict):
    """A section of a configuration, which says what it lacks."""

    def __init__(self, name: str, values: Config):
        super().__init__(values)
        self.name = name

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.name}.{key} expected in the configuration; got nothing of that name")

    def choice(self, key: str, choices: Mapping[str, Any]) -> Any:
        """What the name that is given stands for."""
        value = str(self[key]).lower()
        if value not in choices:
            raise ValueError(f"{self.name}.{key} among {', '.join(choices)} expected; got {self[key]!r}")
        return choices[value]


def _data(data: Config) -> dict[str, Any]:
    """The data node: the range the model was trained in, and the dataset where it is one of ours."""
    name, size = str(data["dataset"]).lower(), data["image_size"]
    node = image_data((data["num_channels"], size, size), -1.0 if data["centered"] else 0.0, 1.0, LEVELS.get(name, 256))
    return {**node, **DATASETS.get(name, {})}


def _sde(kind: str, model: Config) -> dict[str, Any]:
    if kind in ("vpsde", "subvpsde"):
        name = "VP" if kind == "vpsde" else "SubVP"
        return {"_target_": f"scoresde.sdes.{name}", "beta_min": model["beta_min"], "beta_max": model["beta_max"]}
    if kind == "vesde":
        return {"_target_": "scoresde.sdes.VE", "sigma_min": model["sigma_min"], "sigma_max": model["sigma_max"]}
    raise ValueError(f"training.sde 'vpsde', 'subvpsde' or 'vesde' expected; got {kind!r}")


def _prediction(kind: str, continuous: bool, model: Config) -> dict[str, Any]:
    here, steps = f"{__name__}.", model["num_scales"]
    if kind == "vesde" and continuous:
        return {"_target_": here + "ContinuousVE"}
    if kind == "vesde":
        levels = {"sigma_min": model["sigma_min"], "sigma_max": model["sigma_max"]}
        scaled = bool(model["scale_by_sigma"])
        return {"_target_": here + "DiscreteVE", **levels, "steps": steps, "scale_by_sigma": scaled}
    if kind == "vpsde" and not continuous:
        betas = {"beta_min": model["beta_min"], "beta_max": model["beta_max"]}
        return {"_target_": here + "DiscreteVP", **betas, "steps": steps}
    return {"_target_": "scoresde.predictions.Discrete", "prediction": "noise", "labels": [0.0, 999.0]}


def _network(kind: str, continuous: bool, data: Config, model: _Section) -> dict[str, Any]:
    name = model["name"].lower()
    if name not in ("ddpm", "ncsnpp"):
        raise ValueError(
            f"model.name 'ddpm' or 'ncsnpp' expected; got {model['name']!r}: NCSN and NCSNv2 are not U-Nets"
        )
    if model["nonlinearity"].lower() != "swish" or not model["conditional"]:
        raise ValueError(
            f"model.nonlinearity 'swish' and model.conditional true, as published, expected; got "
            f"{model['nonlinearity']!r}, {model['conditional']!r}"
        )
    size, levels = data["image_size"], len(model["ch_mult"])
    sizes = [size >> level for level in range(levels)]
    fourier = name == "ncsnpp" and model.choice("embedding_type", {"positional": False, "fourier": True})
    if fourier and not continuous:
        raise ValueError("model.embedding_type 'positional' expected with discrete labels; got 'fourier'")
    divides = bool(model["scale_by_sigma"]) and not (kind == "vesde" and not continuous)
    if divides and not fourier:
        raise ValueError(
            "scale_by_sigma expected only with Fourier features, or discrete VE; this network's is neither"
        )
    network = {
        "_target_": "scoresde.networks.UNet",
        "image_size": size,
        "channels": data["num_channels"],
        "width": model["nf"],
        "multipliers": list(model["ch_mult"]),
        "blocks": model["num_res_blocks"],
        "attention": [resolution for resolution in model["attn_resolutions"] if resolution in sizes],
        "dropout": model["dropout"],
        "time_scale": 1.0,
        "scale_by_sigma": divides,
        "centered": bool(data["centered"]),
    }
    plain = "convolution" if model["resamp_with_conv"] else "plain"
    if name == "ddpm":
        return {**network, "resample": plain, "skip_rescale": False, "group_size": 1}
    if fourier:
        width = 2 * model["nf"]
        network |= {"embedding": "fourier_log", "embedding_width": width, "fourier_scale": model["fourier_scale"]}
    return {
        **network,
        "resample": model.choice("resblock_type", {"biggan": "residual", "ddpm": plain}),
        "fir": list(model["fir_kernel"]) if model["fir"] else None,
        "skip_rescale": bool(model["skip_rescale"]),
        "input_pyramid": model.choice(
            "progressive_input", {"none": None, "residual": "residual", "input_skip": "skip"}
        ),
        "output_pyramid": model.choice("progressive", {"none": None, "residual": "residual", "output_skip": "skip"}),
        "combine": model["progressive_combine"].lower(),
    }


LEVELS = {"digits": 17}
DATASETS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "train": {"_target_": "scoresde.data.CIFAR10", "split": "train", "flip": True},
        "validation": {"_target_": "scoresde.data.CIFAR10", "split": "test"},
        "test": {"_target_": "scoresde.data.CIFAR10", "split": "test"},
    },
    "digits": {
        "train": {"_target_": "scoresde.data.Digits", "split": "fit"},
        "validation": {"_target_": "scoresde.data.Digits", "split": "validation"},
        "test": {"_target_": "scoresde.data.Digits", "split": "test"},
    },
}

# The name of each part of a module in that project; of several, the one there is.
PARTS: dict[type[nn.Module], dict[str, tuple[str, ...]]] = {
    ResidualBlock: {
        "norm1": ("GroupNorm_0",),
        "conv1": ("Conv_0",),
        "time": ("Dense_0",),
        "norm2": ("GroupNorm_1",),
        "conv2": ("Conv_1",),
        "skip": ("Conv_2", "NIN_0"),
    },
    Attention: {"norm": ("GroupNorm_0",), "qkv": ("NIN_qkv",), "out": ("NIN_3",)},
    ResampledConvolution: {"conv": ("Conv_0", "Conv2d_0")},
}
LEAVES = (nn.Linear, nn.GroupNorm, nn.Conv2d, FourierEmbedding)


def units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a network that are one entry of `all_modules`, in order."""
    for name, child in module.named_children():
        if isinstance(child, (*PARTS, *LEAVES)):
            if any(True for _ in child.state_dict()):
                yield prefix + name, child
        else:
            yield from units(child, f"{prefix}{name}.")


def translate(state: State, network: UNet) -> State:
    """The state dict of our network from that of score_sde's.

    Raises:
        ValueError: the first block that differs, by both its names.
    """
    groups: dict[str, State] = {}
    for name, value in state.items():
        index, _, part = name.removeprefix("all_modules.").partition(".")
        groups.setdefault(f"all_modules.{index}", {})[part] = value
    translated: State = {}
    for ours, theirs in zip_longest(units(network), groups.items()):
        if ours is None or theirs is None:
            more = f"{ours[0]}, which the checkpoint lacks" if ours else f"{theirs[0]}, which the network lacks"
            raise ValueError(f"checkpoint and configuration differ: the first block without a counterpart is {more}")
        (block, module), (index, group) = ours, theirs
        found = _renamed(module, group)
        expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        if {name: tuple(value.shape) for name, value in found.items()} != expected:
            shapes = {name: tuple(value.shape) for name, value in group.items()}
            raise ValueError(
                f"checkpoint and configuration differ first at block {block} ({index} of the checkpoint): "
                f"{expected} expected, got {shapes}"
            )
        translated |= {f"{block}.{name}": value for name, value in found.items()}
    return translated


def _renamed(module: nn.Module, group: State) -> State:
    """One module's tensors under our names; what has none keeps its own."""
    group = _as_convolutions(group)
    if isinstance(module, Attention):
        group = _joined(group)
    if isinstance(module, FourierEmbedding):
        return {"frequencies" if name == "W" else name: value for name, value in group.items()}
    if isinstance(module, LEAVES):
        return {name.rpartition(".")[2]: value for name, value in group.items()}
    theirs = {name: ours for ours, names in PARTS[type(module)].items() for name in names}
    renamed = {}
    for name, value in group.items():
        part, _, parameter = name.rpartition(".")
        renamed[f"{theirs.get(part, part)}.{parameter}"] = value
    return renamed


def _as_convolutions(group: State) -> State:
    """Their 1 x 1 layers, W (in, out) and b, as convolutions."""
    found = {}
    for name, value in group.items():
        part, _, parameter = name.rpartition(".")
        if part.startswith("NIN_") and parameter == "W" and value.ndim == 2:
            found[f"{part}.weight"] = value.T[:, :, None, None].contiguous()
        else:
            found[f"{part}.bias" if part.startswith("NIN_") and parameter == "b" else name] = value
    return found


def _joined(group: State) -> State:
    """Query, key and value as one convolution."""
    parts = [f"NIN_{i}" for i in range(3)]
    found = {name: [group[f"{p}.{name}"] for p in parts if f"{p}.{name}" in group] for name in ("weight", "bias")}
    if any(len(values) < 3 or len({value.shape for value in values}) > 1 for values in found.values()):
        return group
    joined = {f"NIN_qkv.{name}": torch.cat(values) for name, values in found.items()}
    return {**{name: value for name, value in group.items() if name.rpartition(".")[0] not in parts}, **joined}
