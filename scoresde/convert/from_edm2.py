"""Weights of NVlabs/edm2 (2312.02696): its magnitude-preserving U-Net with EDM's preconditioning (`Precond`).

They are distributed as pickles, which execute code. Export them once, where that code is installed, by

    torch.save(network["ema"].state_dict(), "edm2.pth")

The snapshots that its post-hoc averages give are such networks too. Names and shapes of the tensors determine the
architecture, except for the settings of the following table. They have the defaults of that project unless a JSON file
`<stem>.config.json` has the arguments of the constructor: `{"class": "Precond", "kwargs": {...}}`.

| argument            | default | in the run                                            |
| ------------------- | ------- | ----------------------------------------------------- |
| `sigma_data`        | 0.5     | `predictions.KarrasPreconditioning`                   |
| `channels_per_head` | 64      | `BlockStyle.head_channels`                            |
| `resample_filter`   | [1, 1]  | `BlockStyle.fir`                                      |
| `dropout`           | 0       | `BlockStyle.dropout`                                  |
| `res_balance`       | 0.3     | `MagnitudeStyle.residual`                             |
| `attn_balance`      | 0.3     | `MagnitudeStyle.attention`                            |
| `label_balance`     | 0.5     | `MagnitudeStyle.condition`                            |
| `concat_balance`    | 0.5     | `MagnitudeStyle.concatenation`                        |
| `clip_act`          | 256     | `MagnitudeStyle.clip`                                 |
| `label_dropout`     | 0       | 0: the class is required; otherwise it may be missing |

The run computes in float32, also with `use_fp16`. The noise level sigma is the time of the path `Karras`, and
`model.uncertainty(t)` is u(sigma), the "logvar" of that project. Data of 4 channels are latents, which the run takes as
they are; all others are images with 256 grey levels.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scoresde.arguments import shown
from scoresde.build import Run
from scoresde.convert.files import is_state_dict, load_config, load_tensors
from scoresde.convert.from_edm import State, prefixes, renamed, tensor
from scoresde.convert.runs import assemble_unet, image_data
from scoresde.networks.unet import UNet
from scoresde.tensors import at_least_float32

LATENT_CHANNELS = 4
HEAD_CHANNELS = 64


def edm2(path: str | Path, config: Mapping[str, Any] | str | Path | None = None) -> Run:
    """Return the model of EDM2 weights as a run; its denoised view E[x_0 | x_t] is EDM2's D at the same noise level.

        run = ss.convert.edm2("edm2.pth")  # torch.save(network["ema"].state_dict(), "edm2.pth") in that project
        u = run.model.uncertainty(0.5)     # the learned uncertainty, its "logvar", at sigma = 0.5

    Args:
        path: a state dict saved by `torch.save` or as safetensors.
        config: `{"class": "Precond", "kwargs": {...}}`, the arguments of the constructor; the path of a JSON file with
            them; or None for `<stem>.config.json`. Without that file, the defaults of that project: sigma_data=0.5,
            channels_per_head=64, resample_filter=[1, 1], dropout=0, res_balance=0.3, attn_balance=0.3,
            label_balance=0.5, concat_balance=0.5, clip_act=256, label_dropout=0.

    Returns:
        The run: `run.model` is the model on the path `Karras`, `run.transform` the map from images, or from latents of
            4
        channels, to model space.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights do not fit this network (the message names the first tensor that does not), or the
            configuration contradicts them.
    """
    path = Path(path)
    loaded = load_tensors(path)
    if not is_state_dict(loaded):
        raise ValueError(f"{path} must map names to tensors; export it with torch.save(network.state_dict(), path)")
    state = {name.removeprefix("unet."): at_least_float32(value) for name, value in loaded.items()}
    preconditioning = load_config(path, config, "a preconditioning: a class and its kwargs") or {}
    if (name := preconditioning.get("class", "Precond")) != "Precond":
        raise ValueError(f"the class must be Precond; got {name!r}: networks of the project edm are converted by edm")
    arguments = preconditioning.get("kwargs", {})
    network = architecture(state)
    _check(arguments, network)
    shape = (network["channels"], network["image_size"], network["image_size"])
    is_latent = network["channels"] == LATENT_CHANNELS
    settings = {
        "name": "edm2",
        "sde": {"_target_": "scoresde.sdes.Karras", "t_min": 0.002, "t_max": 80.0},
        "prediction": {
            "_target_": "scoresde.predictions.KarrasPreconditioning",
            "sigma_data": float(arguments.get("sigma_data", 0.5)),
        },
        "network": {**network, **_style(arguments)},
        "conditional": ["label"] if network["classes"] and not arguments.get("label_dropout", 0) else None,
        "data": _latent_data(shape) if is_latent else image_data(shape, -1.0, 1.0),
    }
    return assemble_unet(settings, lambda network: translate(state, network), path)


def _latent_data(shape: Sequence[int]) -> dict[str, Any]:
    """Return the node `data` of a configuration for continuous data in model space."""
    nothing = dict.fromkeys(("train", "validation", "test", "dequantization", "range"))
    return {"shape": list(shape), **nothing, "transform": {"_target_": "scoresde.data.Affine"}}


def architecture(state: State) -> dict[str, Any]:
    """Return the arguments of the network, see `networks.configuration`, from names and shapes of a state dict.

    Raises:
        ValueError: it is the state dict of another network.
    """
    matches = [re.fullmatch(r"enc\.(\d+)x\1_block(\d+)\.conv_res1\.weight", name) for name in state]
    blocks = [(int(match[1]), int(match[2])) for match in matches if match]
    if not blocks or "emb_fourier.freqs" not in state:
        raise ValueError(
            "expected a state dict of EDM2's Precond (unet.emb_fourier.freqs, unet.enc.64x64_block0.conv_res1.weight, "
            f"...); got {', '.join(list(state)[:3])}, ..."
        )
    sides = sorted({side for side, _ in blocks}, reverse=True)
    channels = [tensor(state, f"enc.{side}x{side}_block0.conv_res1.weight", dims=4).shape[0] for side in sides]
    width = math.gcd(*channels)
    time, label = tensor(state, "emb_noise.weight", dims=2), state.get("emb_label.weight")
    return {
        "image_size": sides[0],
        "channels": tensor(state, "out_conv.weight", dims=4).shape[0],
        "width": width,
        "multipliers": [count // width for count in channels],
        "blocks": 1 + max(index for _, index in blocks),
        "attention": [side for side in sides if f"enc.{side}x{side}_block0.attn_qkv.weight" in state],
        "attend_every": True,
        "classes": 0 if label is None else tensor(state, "emb_label.weight", dims=2).shape[1],
        "label": {"_target_": "scoresde.networks.ShiftedFourierEmbedding", "features": time.shape[1]},
        "time_features": time.shape[0],
        "uncertainty": len(state.get("logvar_fourier.freqs", ())),
    }


def _style(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of all blocks, flat arguments of the network, from those of EDM2's constructor."""
    fir, clip = list(arguments.get("resample_filter", (1, 1))), arguments.get("clip_act", 256)
    return {
        "head_channels": arguments.get("channels_per_head", HEAD_CHANNELS),
        "dropout": float(arguments.get("dropout", 0.0)),
        "fir": None if fir == [1, 1] else fir,
        "magnitude": {
            "_target_": "scoresde.networks.MagnitudeStyle",
            "residual": float(arguments.get("res_balance", 0.3)),
            "attention": float(arguments.get("attn_balance", 0.3)),
            "concatenation": float(arguments.get("concat_balance", 0.5)),
            "condition": float(arguments.get("label_balance", 0.5)),
            "clip": None if clip is None else float(clip),
        },
    }


def _check(arguments: Mapping[str, Any], network: Mapping[str, Any]) -> None:
    """Raise ValueError if the configuration's arguments contradict the architecture that the weights have."""
    width, sides = network["width"], [network["image_size"] >> level for level in range(len(network["multipliers"]))]
    per_head, counts = arguments.get("channels_per_head", HEAD_CHANNELS), [width * m for m in network["multipliers"]]
    attending = [side for side, count in zip(sides, counts, strict=True) if count >= per_head]
    if missing := set(network["attention"]) - set(attending):
        raise ValueError(
            f"channels_per_head must be at most the number of channels with attention; got {per_head}, "
            f"and fewer channels at resolution {max(missing)}: correct channels_per_head in config['kwargs']"
        )
    known = {
        "img_resolution": network["image_size"],
        "img_channels": network["channels"],
        "label_dim": network["classes"],
        "num_blocks": network["blocks"],
        "attn_resolutions": network["attention"],
        "channel_mult": counts,
        "logvar_channels": network["uncertainty"] or arguments.get("logvar_channels"),
    }
    stated = {name: arguments[name] for name in known if arguments.get(name) is not None}
    if "attn_resolutions" in stated:
        stated["attn_resolutions"] = [side for side in attending if side in stated["attn_resolutions"]]
    if "channel_mult" in stated and "model_channels" not in arguments:
        del stated["channel_mult"]
    elif "channel_mult" in stated:
        stated["channel_mult"] = [arguments["model_channels"] * factor for factor in stated["channel_mult"]]
    for name, value in stated.items():
        if value != known[name]:
            what = "model_channels times channel_mult" if name == "channel_mult" else name
            raise ValueError(
                f"{what} must agree with the weights, which have {shown(known[name])}; got {shown(value)}: correct the "
                "configuration"
            )


# The names of the parts of a block in our networks and in EDM2's.
BLOCK_PARTS = {
    "residual.conv1": "conv_res0",
    "residual.time.gain": "emb_gain",
    "residual.time": "emb_linear",
    "residual.conv2": "conv_res1",
    "residual.skip": "conv_skip",
    "attention.qkv": "attn_qkv",
    "attention.out": "attn_proj",
}


def translate(state: State, network: UNet) -> State:
    """Convert a state dict of EDM2 to the state dict of our network.

    A class is a row of our embedding; in EDM2 it is a column of a matrix. A gain has the shape (1,); in EDM2 it is ().

    Raises:
        ValueError: a tensor is missing or has another shape (the message has both names of the first one), or
            `state` has a tensor that our network lacks.
    """
    table = {
        "time.position.frequencies": "emb_fourier.freqs",
        "time.position.phases": "emb_fourier.phases",
        "time.inner": "emb_noise",
        "time.cond.label": "emb_label",
        "output.gain": "out_gain",
        "output": "out_conv",
        "uncertainty.position.frequencies": "logvar_fourier.freqs",
        "uncertainty.position.phases": "logvar_fourier.phases",
        "uncertainty.linear": "logvar_linear",
    }
    sides = [size[-1] for size in network.sizes]
    state = {name: value.T if name == "emb_label.weight" else torch.atleast_1d(value) for name, value in state.items()}
    table |= {here: there for here, there in prefixes(sides, is_adm=False).items() if here not in table}
    return renamed(state, network, table, BLOCK_PARTS, "EDM2")
