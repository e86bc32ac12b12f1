"""Checkpoints of yang-song/score_sde_pytorch (2011.13456): its DDPM, DDPM++ and NCSN++ networks under VP, sub-VP, VE.

A checkpoint holds `model`, the state dict of a network whose modules are one flat list, `all_modules.0`,
`all_modules.1`, ... in the order in which data passes them; and `ema`, the averages of the trainable parameters as a
list in the same order. `UNet` registers its modules in that order too, so the two are matched one by one. Frozen
tensors (the Fourier frequencies) have no average and come from `model`.

The score function of that project defines the noise label at time t in [0, 1] and the meaning of the output F:

| SDE, labels          | noise label             | score                                     |
| -------------------- | ----------------------- | ----------------------------------------- |
| VP, sub-VP           | 999 t                   | -F / sigma(t)                             |
| VP, discrete         | (N - 1) t, not rounded  | -F / sigma_k, k = floor((N - 1) t)        |
| VE                   | sigma(t)                | F                                         |
| VE, discrete         | k = round((N - 1)(1 - t)) | F, or F / sigma_k for scale_by_sigma    |

with sigma_k^2 = 1 - prod(1 - beta_i) for VP, and sigma_k the geometric sequence that falls from sigma_max for VE.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import build
from scoresde.convert.files import is_state_dict, load_config, load_tensors
from scoresde.convert.runs import assemble_unet, image_data
from scoresde.predictions import Noise, Score, SigmaScore
from scoresde.sdes import SDE

State = dict[str, Tensor]


class DiscreteVP(Noise):
    """A noise network trained on N steps of DDPM's schedule, evaluated at any time as score_sde does.

    The noise label is (N - 1) t, not rounded. With F the output of the network, the score is -F / sigma_k, where
    k = floor((N - 1) t), sigma_k^2 = 1 - prod_{i <= k} (1 - beta_i), and the N betas are evenly spaced from beta_min/N
    to beta_max/N; hence F = eps sigma_k / sigma(t).

    Args:
        beta_min, beta_max: the arguments of the VP SDE.
        steps: N.
    """

    def __init__(self, beta_min: float, beta_max: float, steps: int):
        super().__init__()
        self.steps = steps
        # In float32 as in score_sde: the rounding changes the fifth digit of the score at the first labels.
        betas = torch.linspace(beta_min / steps, beta_max / steps, steps, dtype=torch.float32)
        self.sigmas = torch.sqrt(1 - torch.cumprod(1 - betas, dim=0)).double()  # no buffer: schedules stay float64

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        return (self.steps - 1) * t

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        # In float32 the label of a node is an integer; in float64 rounding can put it just below the integer.
        step = self.c_noise(sde, t).float().long().clamp(0, self.steps - 1)
        return torch.zeros_like(t), self.sigmas.to(t.device)[step] / sde.sigma(t)


class ContinuousVE(SigmaScore):
    """`predictions.SigmaScore` with its label in float32, as in score_sde: Fourier features amplify rounding errors."""

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        low, high = (float(sde.sigma(torch.tensor(end, dtype=torch.float64))) for end in (0.0, 1.0))
        return (low * (high / low) ** t.float()).to(t)


class DiscreteVE(Score):
    """A score network trained on N noise levels of VE, evaluated at any time as score_sde does.

    The network's label is the index k = round((N - 1) (1 - t)), 0 for the highest noise level. With F the output of the
    network, the score is F, or F / sigma_k if the network was trained with the output divided by
    sigma_k = sigma_max (sigma_min / sigma_max)^(k / (N - 1)).

    Args:
        sigma_min, sigma_max: the arguments of the VE SDE.
        steps: N.
        scale_by_sigma: whether the score is F / sigma_k (True) or F (False).
    """

    def __init__(self, sigma_min: float, sigma_max: float, steps: int, scale_by_sigma: bool):
        super().__init__()
        if steps < 2:
            raise ValueError(f"steps must be at least 2; got {steps}")
        self.sigma_min, self.sigma_max, self.steps, self.scale_by_sigma = sigma_min, sigma_max, steps, scale_by_sigma

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        return ((self.steps - 1) * (1 - t).float()).round().to(t)

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        p, q = super().target(sde, t)
        if self.scale_by_sigma:
            q = q * self.sigma_max * (self.sigma_min / self.sigma_max) ** (self.c_noise(sde, t) / (self.steps - 1))
        return p, q


def score_sde(
    path: str | Path, config: Mapping[str, Any] | str | Path | None = None, weights: str = "ema"
) -> build.Run:
    """Return the model of a score_sde_pytorch checkpoint as a run; the score at (x, t) equals that of score_sde.

    Args:
        path: the checkpoint, `checkpoint_N.pth`.
        config: the configuration of the checkpoint: the ConfigDict as a dict, the path of a JSON file with it, or None
            for `<stem>.config.json` beside the checkpoint (`json.dump(config.to_dict(), file, default=str)` writes it).
        weights: "ema" for the averaged weights, or "raw".

    Raises:
        FileNotFoundError: there is no such checkpoint, or no configuration.
        ValueError: a setting of the configuration has no counterpart in this library, or the weights differ in shape;
            the message names the first tensor that differs.
    """
    path = Path(path)
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights must be 'ema' or 'raw'; got {weights!r}")
    original = load_config(path, config, "a dump of the training's configuration")
    if original is None:
        raise FileNotFoundError(
            f"no configuration at {path.with_name(f'{path.stem}.config.json')}; write one with "
            f"json.dump(config.to_dict(), file, default=str) where the checkpoint was trained, or pass config="
        )
    state = load_weights(path, weights)
    return assemble_unet(configuration(original), lambda network: translate(state, network), path)


def load_weights(path: Path, weights: str = "ema") -> State:
    """Return the raw or averaged tensors of a checkpoint, by their names in `model` without DataParallel's prefix."""
    checkpoint = load_tensors(path)
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    model, ema = checkpoint.get("model"), checkpoint.get("ema")
    if not is_state_dict(model):
        raise ValueError(f"{path} is not a checkpoint of score_sde: it has no state dict under 'model'")
    state = {name.removeprefix("module."): value for name, value in model.items()}
    state.pop("sigmas", None)  # the table of noise levels follows from the configuration
    if weights == "raw":
        return state
    # Every tensor has an average, except the matrix of Fourier frequencies, which does not train.
    trainable = [name for name, value in state.items() if name != "all_modules.0.W" or value.ndim != 1]
    averages = ema.get("shadow_params") if isinstance(ema, dict) else None
    if averages is None or len(averages) != len(trainable):
        raise ValueError(
            f"ema.shadow_params of {path} must hold {len(trainable)} averages; got "
            f"{'none' if averages is None else len(averages)}; pass weights='raw' to use the raw weights"
        )
    return {**state, **dict(zip(trainable, averages, strict=True))}


def configuration(original: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run from a configuration of score_sde.

    Raises:
        ValueError: a section is missing, or a network, SDE or setting has no counterpart in this library.
    """
    if not {"data", "model", "training"} <= original.keys():
        raise ValueError(
            f"a configuration of score_sde must have the sections data, model and training; got {list(original)}"
        )
    data, model, training = (_Section(name, original[name]) for name in ("data", "model", "training"))
    sde, constants = training.choice("sde", SDES)
    sde_node = {"_target_": f"scoresde.sdes.{sde}", **{name: model[name] for name in constants}}
    dataset, levels, splits = DATASETS.get(str(data["dataset"]).lower(), ("", 256, ()))
    shape = (data["num_channels"], data["image_size"], data["image_size"])
    data_node = image_data(shape, -1.0 if data["centered"] else 0.0, 1.0, levels)
    for split, arguments in zip(("train", "validation", "test"), splits, strict=False):
        data_node[split] = {"_target_": f"scoresde.data.{dataset}", **arguments}
    is_discrete = not training["continuous"]
    return {
        "name": f"score_sde_{model['name']}",
        "sde": sde_node,
        "prediction": _prediction(sde, is_discrete, model),
        "network": _network(sde, is_discrete, data, model),
        "data": data_node,
    }


class _Section(dict):
    """A section of a score_sde configuration, as a dict that raises ValueError for a missing entry."""

    def __init__(self, name: str, values: Mapping[str, Any]):
        super().__init__(values)
        self.name = name

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"the configuration has no {self.name}.{key}")

    def choice(self, key: str, choices: Mapping[str, Any]) -> Any:
        """Return `choices[value]` for the value of `key` in lower case; raise ValueError if it is not in `choices`."""
        value = str(self[key]).lower()
        if value not in choices:
            raise ValueError(f"{self.name}.{key} must be one of {', '.join(choices)}; got {self[key]!r}")
        return choices[value]


def _prediction(sde: str, is_discrete: bool, model: _Section) -> dict[str, Any]:
    """Return the configuration's node `prediction`."""
    steps = model["num_scales"]
    if sde == "VE" and is_discrete:
        levels = {"sigma_min": model["sigma_min"], "sigma_max": model["sigma_max"], "steps": steps}
        return {"_target_": f"{__name__}.DiscreteVE", **levels, "scale_by_sigma": bool(model["scale_by_sigma"])}
    if sde == "VE":
        return {"_target_": f"{__name__}.ContinuousVE"}
    if sde == "VP" and is_discrete:
        betas = {"beta_min": model["beta_min"], "beta_max": model["beta_max"]}
        return {"_target_": f"{__name__}.DiscreteVP", **betas, "steps": steps}
    return {"_target_": "scoresde.predictions.Discrete", "prediction": "noise", "labels": [0.0, 999.0]}


def _network(sde: str, is_discrete: bool, data: _Section, model: _Section) -> dict[str, Any]:
    """Return the arguments of the network, see `networks.configuration`."""
    is_ncsnpp = model.choice("name", {"ddpm": False, "ncsnpp": True})
    if model["nonlinearity"].lower() != "swish" or not model["conditional"]:
        raise ValueError(
            f"model.nonlinearity must be 'swish' and model.conditional must be true; got {model['nonlinearity']!r} and "
            f"{model['conditional']!r}"
        )
    has_fourier = is_ncsnpp and model.choice("embedding_type", {"positional": False, "fourier": True})
    if has_fourier and is_discrete:
        raise ValueError(
            "model.embedding_type must be 'positional' if training.continuous is false (discrete noise labels); got "
            "'fourier'"
        )
    scale_by_sigma = bool(model["scale_by_sigma"]) and not (sde == "VE" and is_discrete)
    if scale_by_sigma and not has_fourier:
        raise ValueError(
            "model.scale_by_sigma must be false without Fourier features, except for discrete VE; got true"
        )
    size, plain = data["image_size"], "convolution" if model["resamp_with_conv"] else "plain"
    sizes = [size >> level for level in range(len(model["ch_mult"]))]
    network: dict[str, Any] = {
        "image_size": size,
        "channels": data["num_channels"],
        "width": model["nf"],
        "multipliers": list(model["ch_mult"]),
        "blocks": model["num_res_blocks"],
        "attention": [resolution for resolution in model["attn_resolutions"] if resolution in sizes],
        "dropout": model["dropout"],
        "time_scale": 1.0,
        "scale_by_sigma": scale_by_sigma,
        "centered": bool(data["centered"]),
    }
    if not is_ncsnpp:
        return {**network, "resample": plain, "skip_rescale": False, "group_size": 1}
    if has_fourier:
        embedding = {"embedding": "fourier_log", "fourier_scale": model["fourier_scale"]}
        network |= {**embedding, "embedding_width": 2 * model["nf"]}
    return {
        **network,
        "resample": model.choice("resblock_type", {"biggan": "residual", "ddpm": plain}),
        "fir": list(model["fir_kernel"]) if model["fir"] else None,
        "skip_rescale": bool(model["skip_rescale"]),
        "input_pyramid": model.choice(
            "progressive_input", {"none": None, "residual": "residual", "input_skip": "skip"}
        ),
        "output_pyramid": model.choice("progressive", {"none": None, "residual": "residual", "output_skip": "skip"}),
        "combine": model.choice("progressive_combine", {"sum": "sum", "cat": "cat"}),
    }


SDES = {
    "vpsde": ("VP", ("beta_min", "beta_max")),
    "subvpsde": ("SubVP", ("beta_min", "beta_max")),
    "vesde": ("VE", ("sigma_min", "sigma_max")),
}
# The datasets of this library: class, number of grey levels, and the splits for training, validation and test.
DATASETS: dict[str, tuple[str, int, tuple[dict[str, Any], ...]]] = {
    "cifar10": ("CIFAR10", 256, ({"split": "train", "flip": True}, {"split": "test"}, {"split": "test"})),
    "digits": ("Digits", 17, ({"split": "fit"}, {"split": "validation"}, {"split": "test"})),
}


def translate(state: State, network: nn.Module) -> State:
    """Return the state dict of our network from that of score_sde's; both list their tensors in the same order.

    Raises:
        ValueError: the two differ; the message has both names of the first tensor that differs.
    """
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for name, value in state.items():
        block, is_pointwise, part = name.partition(".NIN_")
        if is_pointwise and part.endswith(".W") and value.ndim == 2:  # (in, out); in our network a 1 x 1 convolution
            value = value.T[:, :, None, None].contiguous()
        if f"{block}.NIN_2.W" in state and part[0] in "012":  # query, key and value are one convolution in our network
            name = f"{block}.NIN_0-2.{part[2:]}"
        groups[name].append(value)
    ours, translated = network.state_dict(), {}
    for (name, expected), (original, values) in zip(ours.items(), groups.items(), strict=False):
        shapes = [tuple(value.shape) for value in values]
        joined = torch.stack(values).reshape(-1, *shapes[0][1:]) if len(set(shapes)) == 1 else values[0]
        if joined.shape != expected.shape or name.endswith(".bias") != original.endswith((".b", ".bias")):
            raise ValueError(
                f"checkpoint and configuration differ first at {name} ({original} in the checkpoint): expected shape "
                f"{tuple(expected.shape)}; got {', '.join(map(str, shapes))}"
            )
        translated[name] = joined
    if extra := [*ours][len(groups) :] or [*groups][len(ours) :]:
        surplus = "model" if len(ours) > len(groups) else "checkpoint"
        raise ValueError(f"checkpoint and configuration differ: only the {surplus} has {extra[0]}")
    return translated
