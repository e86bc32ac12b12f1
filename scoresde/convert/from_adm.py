"""Weights of openai/guided-diffusion (ADM, 2105.05233) and openai/improved-diffusion (2102.09672).

A state dict of `UNetModel`, as these projects save it, becomes a run; one of `EncoderUNetModel`, the classifier of
classifier guidance, becomes a `NoisyClassifier`. Names and shapes of the tensors determine the architecture; the rest
is in a configuration, see `adm_settings`.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.build import Run
from scoresde.classifier import NoisyClassifier
from scoresde.convert.adm_settings import FORM, AdmSettings
from scoresde.convert.adm_weights import POOLS, State, translate
from scoresde.convert.files import is_state_dict, load_config, load_tensors
from scoresde.convert.runs import assemble_unet, image_data

Config = Mapping[str, Any] | str | Path | None


def adm(path: str | Path, config: Config = None) -> Run:
    """Return the diffusion model of a `UNetModel` as a run; step i of its N steps is at time i/(N - 1).

    Args:
        path: a state dict saved by `torch.save` or as safetensors, such as `ema_0.9999_500000.pt`.
        config: a configuration (see `adm_settings`), the path of a JSON file with one, or None for `<stem>.config.json`
            beside the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no configuration, it does not agree with the weights, or the weights are those of another
            network; the message names the first difference.
    """
    path = Path(path)
    state, settings = _read(path, config, is_classifier=False)
    network, known = architecture(state, settings)
    inputs, outputs = known["in_channels"], len(_tensor(state, "out.2.weight", 4))
    if outputs not in (inputs, 2 * inputs):
        raise ValueError(
            f"the network must have as many output as input channels, or twice as many for a learned variance; got "
            f"{inputs} in, {outputs} out: networks for super-resolution cannot be converted"
        )
    settings.check({**known, "out_channels": outputs, "learn_sigma": outputs == 2 * inputs})
    node = {"_target_": "scoresde.networks.UNet", **network, "out_channels": outputs}
    shared = _shared(settings, network) | {
        "name": "adm",
        "learned_variance": outputs == 2 * inputs,
        "conditional": ["label"] if known["num_classes"] else None,
        "network": {**node, "classes": known["num_classes"] or 0},
    }
    return assemble_unet(shared, lambda network: translate(state, network, settings.new_order, {}), path)


def adm_classifier(path: str | Path, config: Config = None) -> NoisyClassifier:
    """Return the noise-conditional classifier of an `EncoderUNetModel`; step i of its N steps is at time i/(N - 1).

        classifier = ss.convert.adm_classifier("64x64_classifier.pt")
        guided = ss.guidance.Classifier(model, classifier, label=3)

    Args:
        path: a state dict saved by `torch.save` or as safetensors.
        config: a configuration (see `convert.adm_settings`), the path of a JSON file with one, or None for
            `<stem>.config.json` beside the checkpoint. Without a diffusion it has the linear schedule of 1,000 steps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no configuration, it does not agree with the weights, or the weights are those of another
            network; the message names the first difference.
    """
    classifier: Any = classifier_run(path, config).model
    return classifier


def classifier_run(path: str | Path, config: Config = None) -> Run:
    """Return the classifier of `adm_classifier` with its configuration, for `save_run`."""
    path = Path(path)
    state, settings = _read(path, config, is_classifier=True)
    network, known = architecture(state, settings)
    name, pool, classes = _pool(state)
    settings.check({**known, "out_channels": classes, "pool": name})
    node = {"_target_": "scoresde.networks.EncoderUNet", **network, "classes": classes, "pool": pool}
    shared = _shared(settings, network) | {"name": "adm_classifier", "classifier": True, "network": node}
    return assemble_unet(shared, lambda network: translate(state, network, settings.new_order, POOLS[name][2]), path)


def _read(path: Path, config: Config, is_classifier: bool) -> tuple[State, AdmSettings]:
    """Return the weights and the settings of a checkpoint."""
    state = load_tensors(path)
    if not is_state_dict(state) or "input_blocks.0.0.weight" not in state:
        raise ValueError(f"{path} must hold a state dict of guided-diffusion or improved-diffusion (input_blocks, ...)")
    if any(name.startswith("output_blocks.") for name in state) == is_classifier:
        got, fix = ("a UNetModel", "adm") if is_classifier else ("a classifier, EncoderUNetModel", "adm_classifier")
        raise ValueError(f"{path} holds the weights of {got}: use scoresde.convert.{fix}")
    loaded = load_config(path, config, "the settings of the network, see scoresde.convert.adm_settings")
    if loaded is None:
        raise ValueError(
            f"a configuration must be given, because the weights do not tell the image size, the number of attention "
            f"heads, the order of their channels and the noise schedule; {path.stem}.config.json does not exist: write "
            f"it, or pass {FORM}"
        )
    return state, AdmSettings(loaded, is_classifier)


def _shared(settings: AdmSettings, network: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nodes `sde`, `prediction` and `data` of a run's configuration."""
    size = network["image_size"]
    return {**settings.process(), "data": image_data((network["channels"], size, size), -1.0, 1.0)}


def architecture(state: State, settings: AdmSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of our network, and the original settings that follow from the weights.

    The arguments are those that `UNet` and `EncoderUNet` share, in one flat dict (see `networks.configuration`). The
    settings are named like the arguments of the constructor in guided-diffusion.

    Raises:
        ValueError: the weights are those of another network, or a setting that they do not determine is missing.
    """
    first, (features, base) = (
        _tensor(state, "input_blocks.0.0.weight", 4),
        _tensor(state, "time_embed.0.weight", 2).shape,
    )
    width, channels = first.shape[:2]
    resampling, blocks = _resampling(state, settings)
    starts = range(1, 1 + max(_indices(state, "input_blocks")), blocks + 1)
    outputs = [_tensor(state, f"input_blocks.{n}.0.in_layers.2.weight", 4).shape[0] for n in starts]
    if any(out % width for out in outputs):
        raise ValueError(
            "the channels at each resolution must be multiples of the channels of the first convolution, "
            f"{width}; got {outputs}"
        )
    attends = [level for level, n in enumerate(starts) if f"input_blocks.{n}.1.norm.weight" in state]
    label = state.get("label_emb.weight")
    known = {
        "in_channels": channels,
        "model_channels": base,
        "num_res_blocks": blocks,
        "channel_mult": [out / base for out in outputs],
        "attention_resolutions": [1 << level for level in attends],
        "num_classes": None if label is None else label.shape[0],
        "class_cond": label is not None,
        "use_scale_shift_norm": len(_tensor(state, "middle_block.0.emb_layers.1.weight", 2)) == 2 * outputs[-1],
        "resblock_updown": resampling == "residual",
    }
    if len(outputs) == 1:
        del known["resblock_updown"]
    elif resampling != "residual":
        known["conv_resample"] = resampling == "convolution"
    size = settings.image_size or _image_size(state, len(outputs))
    centred = {"_target_": "scoresde.networks.convolution_resampling", "_partial_": True, "centred": True}
    network = {
        "image_size": size,
        "channels": channels,
        "width": width,
        "multipliers": [out // width for out in outputs],
        "blocks": blocks,
        "attention": [size >> level for level in attends],
        "resample": centred if resampling == "convolution" else resampling,
        "embedding": "adm",
        "embedding_width": base,
        "time_scale": 1.0,
        "time_features": features,
        "attend_every": True,
        "dropout": float(settings.values.get("dropout", 0.0)),
        "skip_rescale": False,
        "scale_shift": known["use_scale_shift_norm"],
        "project_skip": False,
        "group_size": 1,
        "norm_eps": 1e-5,
    }
    return {**network, **settings.heads}, known


def _resampling(state: State, settings: AdmSettings) -> tuple[str, int]:
    """Return the kind of resampling ("convolution", "plain" or "residual") and the number of blocks per resolution."""
    indices = _indices(state, "input_blocks")
    last, ups = max(indices), _indices(state, "output_blocks", r"[12]\.in_layers")
    convolutions, gaps = _indices(state, "input_blocks", r"0\.op"), set(range(last)) - indices
    if convolutions or gaps:
        kind, blocks = ("convolution", min(convolutions) - 1) if convolutions else ("plain", min(gaps) - 1)
    elif ups or _indices(state, "output_blocks"):
        kind, blocks = "residual", min(ups, default=last)
    elif (stated := settings.values.get("num_res_blocks")) is not None:
        kind, blocks = "residual", int(stated)
    else:
        raise ValueError(
            "num_res_blocks must be given, because the weights of a classifier with residual resampling do not tell "
            "it; got none: add num_res_blocks to the configuration"
        )
    if blocks < 1 or (last + 1) % (blocks + 1):
        raise ValueError(
            f"num_res_blocks must fit the {last + 1} input blocks of the weights; got {blocks}: correct the "
            "configuration"
        )
    return kind, blocks


def _indices(state: State, part: str, rest: str = "") -> set[int]:
    """Return the indices i for which `state` has a name that begins with `part.i.rest`; `rest` is a regex."""
    matches = (re.match(rf"{part}\.(\d+)\.{rest}", name) for name in state)
    return {int(match[1]) for match in matches if match}


def _image_size(state: State, levels: int) -> int:
    """Return the side of the images, from the number of positions in a classifier's attention pool."""
    positions = state.get("out.2.positional_embedding")
    if positions is None:
        raise ValueError(f"image_size must be given, because the weights do not tell it; got none: pass {FORM}")
    return math.isqrt(positions.shape[1] - 1) << (levels - 1)


def _pool(state: State) -> tuple[str, dict[str, Any], int]:
    """Return guided-diffusion's name for the classifier's pool, our node `pool`, and the number of classes."""
    if "out.2.positional_embedding" in state:
        name = "attention"
    elif state.get("out.0.weight", torch.empty(0)).ndim == 1:
        name = "adaptive"
    else:
        name = "spatial_v2" if "out.1.weight" in state else "spatial"
    kind, arguments, names = POOLS[name]
    if kind == "SkipPool":
        arguments = {**arguments, "hidden": len(_tensor(state, "out.0.weight", 2))}
    last = f"{names['linear']}.weight"
    if last not in state:
        raise ValueError(f"expected {last}, the last layer of the classifier's pool; got none")
    return name, {"_target_": f"scoresde.networks.{kind}", "_partial_": True, **arguments}, len(state[last])


def _tensor(state: State, name: str, dims: int) -> Tensor:
    """Return the tensor `name`; raise ValueError if it is missing or does not have `dims` dimensions."""
    value = state.get(name)
    if value is None or value.ndim != dims:
        got = "none" if value is None else f"the shape {tuple(value.shape)}"
        raise ValueError(f"expected {name} with {dims} dimensions; got {got}")
    return value
