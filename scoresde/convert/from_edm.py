"""Weights of NVlabs/edm (2206.00364): its DDPM++ and NCSN++ (`SongUNet`) and ADM (`DhariwalUNet`) networks.

They are distributed as pickles, which execute code. Export them once, where that code is installed, by

    torch.save(network["ema"].state_dict(), "edm.pth")

The file then holds only tensors, and their names and shapes determine the architecture. The preconditioning is
`EDMPrecond` unless a JSON file `<stem>.config.json` names another class and the arguments of its constructor:
`{"class": "VPPrecond", "kwargs": {...}}`. In the table, F is the output of the network, and M the number of noise
labels of `VPPrecond`, by default 1,000.

| preconditioning | SDE                 | F                                   | noise label    |
| --------------- | ------------------- | ----------------------------------- | -------------- |
| `EDMPrecond`    | `Karras`, sigma = t | `predictions.KarrasPreconditioning` | log(sigma) / 4 |
| `VPPrecond`     | `VP`                | eps                                 | (M - 1) t      |
| `VEPrecond`     | `Karras`, sigma = t | -eps                                | log(sigma / 2) |
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.build import Run
from scoresde.convert.files import is_state_dict, load_config, load_tensors
from scoresde.convert.runs import assemble_unet, image_data
from scoresde.networks.blocks import Attention
from scoresde.networks.magnitude_blocks import MagnitudeAttention
from scoresde.networks.unet import UNet
from scoresde.predictions import Prediction
from scoresde.sdes import SDE
from scoresde.tensors import at_least_float32

State = dict[str, Tensor]


class NegativeNoise(Prediction):
    """Network output F = -eps, with noise label log(sigma/2): EDM's version of VE networks (2206.00364, table 1).

    The factor 1/2 appears because EDM's data are in [-1, 1], but those of 2011.13456 are in [0, 1].
    """

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.log(0.5 * sde.sigma(t))

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), -torch.ones_like(t)


def edm(path: str | Path, config: Mapping[str, Any] | str | Path | None = None) -> Run:
    """Return the model of EDM weights as a run; its denoised view E[x_0 | x_t] is EDM's D at the same noise level.

    Args:
        path: a state dict saved by `torch.save` or as safetensors.
        config: `{"class": ..., "kwargs": ...}` of the preconditioning, the path of a JSON file with them, or None for
            `<stem>.config.json`; without that file, EDMPrecond with its defaults.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights do not fit these networks (the message names the first tensor that does not), or the
            preconditioning is unknown.
    """
    path = Path(path)
    loaded = load_tensors(path)
    if not is_state_dict(loaded):
        raise ValueError(f"{path} must map names to tensors; export it with torch.save(network.state_dict(), path)")
    state = {name.removeprefix("model."): value for name, value in loaded.items()}
    network = architecture(state)
    preconditioning = load_config(path, config, "a preconditioning: a class and its kwargs") or {}
    arguments = preconditioning.get("kwargs", {})
    sde, prediction = _path_and_prediction(preconditioning.get("class", "EDMPrecond"), arguments)
    settings = {
        "name": "edm",
        "sde": sde,
        "prediction": prediction,
        "network": {**network, "dropout": float(arguments.get("dropout", 0.1))},
        "conditional": ["label"] if network["classes"] and not arguments.get("label_dropout", 0) else None,
        "data": image_data((network["channels"], network["image_size"], network["image_size"]), -1.0, 1.0),
    }
    return assemble_unet(settings, lambda network: translate(state, network), path)


def _path_and_prediction(name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration's nodes `sde` and `prediction` for a preconditioning."""
    if name == "EDMPrecond":
        sigma_data = arguments.get("sigma_data", 0.5)
        prediction = {"_target_": "scoresde.predictions.KarrasPreconditioning", "sigma_data": sigma_data}
        return {"_target_": "scoresde.sdes.Karras", "t_min": 0.002, "t_max": 80.0}, prediction
    if name == "VEPrecond":
        ends = {"t_min": arguments.get("sigma_min", 0.02), "t_max": arguments.get("sigma_max", 100.0)}
        return {"_target_": "scoresde.sdes.Karras", **ends}, {"_target_": f"{__name__}.NegativeNoise"}
    if name == "VPPrecond":
        low = arguments.get("beta_min", 0.1)
        betas = {"beta_min": low, "beta_max": low + arguments.get("beta_d", 19.9)}
        labels = [0.0, float(arguments.get("M", 1000) - 1)]
        return (
            {"_target_": "scoresde.sdes.VP", **betas, "t_min": arguments.get("epsilon_t", 1e-5)},
            {"_target_": "scoresde.predictions.Discrete", "prediction": "noise", "labels": labels},
        )
    raise ValueError(f"the preconditioning must be one of EDMPrecond, VPPrecond, VEPrecond; got {name!r}")


def architecture(state: State) -> dict[str, Any]:
    """Return the arguments of the network, see `networks.configuration`, from names and shapes of a state dict.

    Raises:
        ValueError: it is the state dict of another network.
    """
    matches = [re.fullmatch(r"enc\.(\d+)x\1_block(\d+)\.conv1\.weight", name) for name in state]
    blocks = [(int(match[1]), int(match[2])) for match in matches if match]
    if not blocks or "map_layer0.weight" not in state:
        raise ValueError(
            f"expected a state dict of EDM's SongUNet or DhariwalUNet (map_layer0, enc.32x32_block0, ...); "
            f"got {', '.join(list(state)[:3])}, ..."
        )
    sides = sorted({side for side, _ in blocks}, reverse=True)
    names, is_adm = [f"{side}x{side}" for side in sides], "out_norm.weight" in state
    first = tensor(state, f"enc.{names[0]}_conv.weight", dims=4)
    features, noise_features = tensor(state, "map_layer0.weight", dims=2).shape
    width = noise_features if is_adm else first.shape[0]
    if features != 4 * width:
        raise ValueError(f"channel_mult_emb must be 4, for 4 x {width} time features; got {features} time features")
    network: dict[str, Any] = {
        "image_size": sides[0],
        "channels": first.shape[1],
        "width": width,
        "multipliers": [tensor(state, f"enc.{name}_block0.conv1.weight", dims=4).shape[0] // width for name in names],
        "blocks": 1 + max(index for _, index in blocks),
        "attention": [
            side for side, name in zip(sides, names, strict=True) if f"enc.{name}_block0.qkv.weight" in state
        ],
        "classes": tensor(state, "map_label.weight", dims=2).shape[1] if "map_label.weight" in state else 0,
        "time_scale": 1.0,
    }
    if is_adm:
        block = {"attend_every": True, "head_channels": 64, "skip_rescale": False, "scale_shift": True}
        return {**network, **block, "embedding": "adm", "project_skip": False, "norm_eps": 1e-5}
    pyramids = [kind for kind in ("skip", "residual") if any(f"aux_{kind}." in name for name in state)]
    fir = None
    if len(names) > 1:  # the network normalises the filter, so that a factor does not matter
        taps = tensor(state, f"enc.{names[1]}_down.conv0.resample_filter", dims=4)[0, 0].sum(dim=0)
        fir = (taps / taps[0]).tolist()
    return {
        **network,
        "embedding": "fourier" if "map_noise.freqs" in state else "positional",
        "embedding_width": noise_features,
        "cond_join": "input",
        "fir": fir,
        "input_pyramid": pyramids[0] if pyramids else None,
        "output_pyramid": "skip" if len(names) > 1 and f"dec.{names[-1]}_aux_norm.weight" in state else None,
    }


def tensor(state: State, name: str, dims: int) -> Tensor:
    """Return the tensor `name`; raise ValueError if it is missing or does not have `dims` dimensions."""
    value = state.get(name)
    if value is None or value.ndim != dims:
        got = "none" if value is None else f"the shape {tuple(value.shape)}"
        raise ValueError(f"expected {name} with {dims} dimensions; got {got}")
    return value


# The names of the parts of a block in our networks and in EDM's.
BLOCK_PARTS = {
    "residual.norm1": "norm0",
    "residual.conv1": "conv0",
    "residual.time": "affine",
    "residual.norm2": "norm1",
    "residual.conv2": "conv1",
    "residual.skip": "skip",
    "attention.norm": "norm2",
    "attention.qkv": "qkv",
    "attention.out": "proj",
}


def prefixes(sides: Sequence[int], is_adm: bool) -> dict[str, str]:
    """Return {beginning of a name in our state dict: beginning in EDM's}; `sides` are the resolutions, finest first."""
    names = [f"{side}x{side}" for side in sides]
    table = {
        "time.position.frequencies": "map_noise.freqs",
        "time.inner": "map_layer0",
        "time.outer": "map_layer1",
        "time.cond.label": "map_label",
        "input": f"enc.{names[0]}_conv",
        "middle.block": f"dec.{names[-1]}_in",
        "output.": "out_" if is_adm else f"dec.{names[0]}_aux_",
    }
    for name in names:
        table |= {f"down.{name}.block": f"enc.{name}_block", f"up.{name}.block": f"dec.{name}_block"}
        table[f"up.{name}.pyramid.head."] = f"dec.{name}_aux_"
    for finer, coarser in pairwise(names):
        table |= {
            f"down.{finer}.downsample": f"enc.{coarser}_down",
            f"down.{finer}.pyramid.project": f"enc.{coarser}_aux_skip",
            f"down.{finer}.pyramid.resample.conv": f"enc.{coarser}_aux_residual",
            f"up.{coarser}.upsample": f"dec.{finer}_up",
        }
    return table


def translate(state: State, network: UNet) -> State:
    """Convert a state dict of EDM to the state dict of our network.

    Raises:
        ValueError: a tensor is missing or has another shape (the message has both names of the first one), or
            `state` has a tensor that our network lacks.
    """
    is_adm = "out_norm.weight" in state
    state = {
        name: value
        for name, value in _fold_embeddings(state, is_adm).items()
        if not name.endswith("resample_filter") and name != "map_augment.weight"
    }
    return renamed(state, network, prefixes([size[-1] for size in network.sizes], is_adm), BLOCK_PARTS, "EDM")


def renamed(state: State, network: UNet, table: Mapping[str, str], parts: Mapping[str, str], project: str) -> State:
    """Return a state dict of another project under the names of our network.

    Args:
        state: the state dict; query, key and value alternate within each head of an attention.
        network: our network.
        table: {beginning of a name in our state dict: beginning in theirs}; the first match counts.
        parts: the names of the parts of a block in our networks and in theirs.
        project: the name of the project, for messages.

    Raises:
        ValueError: a tensor is missing or has another shape, or `state` has a tensor that our network lacks.
    """
    unused, translated = set(state), dict[str, Tensor]()
    kinds = (Attention, MagnitudeAttention)
    heads = {name: module.heads for name, module in network.named_modules() if isinstance(module, kinds)}
    for name, expected in network.state_dict().items():
        theirs = next(there + name.removeprefix(here) for here, there in table.items() if name.startswith(here))
        for here, there in parts.items():
            theirs = theirs.replace(here, there)
        value = state.get(theirs)
        unused.discard(theirs)
        if value is None or value.shape != expected.shape:
            got = "none" if value is None else tuple(value.shape)
            raise ValueError(
                f"weights differ first at {name} ({theirs} in {project}): expected shape {tuple(expected.shape)}; "
                f"got {got}"
            )
        block, is_qkv, _ = name.partition(".qkv.")
        # Our query, key and value follow one another.
        translated[name] = value.unflatten(0, (heads[block], -1, 3)).movedim(2, 0).flatten(0, 2) if is_qkv else value
    if unused:
        raise ValueError(f"the weights hold {min(unused)}, which the network does not have")
    return translated


def _fold_embeddings(state: State, is_adm: bool) -> State:
    """Return the state dict with the embeddings of label and noise in the form of this library.

    In this library a class is a row of an embedding. EDM multiplies a matrix by a one-hot vector, which SongUNet scales
    by the root of the number of classes. EDM's bias, added with every class and without a class, becomes part of the
    next layer's bias. ADM's time features are cosines before sines: the columns that multiply them are swapped.
    """
    state = {name: at_least_float32(tensor) for name, tensor in state.items()}
    label, bias = state.get("map_label.weight"), state.pop("map_label.bias", None)
    if label is not None:
        state["map_label.weight"] = label.T * (1 if is_adm else math.sqrt(label.shape[1]))
    inner = state["map_layer0.weight"]
    if bias is not None:
        if bias.shape != inner.shape[1:]:
            raise ValueError(f"expected map_label.bias with shape {tuple(inner.shape[1:])}; got {tuple(bias.shape)}")
        ours = tensor(state, "map_layer0.bias", dims=1)
        state["map_layer0.bias"] = (ours.double() + inner.double() @ bias.double()).to(ours.dtype)
    if is_adm:
        state["map_layer0.weight"] = inner.roll(inner.shape[1] // 2, dims=1)
    return state
