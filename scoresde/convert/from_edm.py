"""Weights of NVlabs/edm (2206.00364): its DDPM++ and NCSN++ (`SongUNet`) and ADM (`DhariwalUNet`) networks.

They are distributed as pickles, which execute code; exported once where that code is installed, by

    torch.save(network["ema"].state_dict(), "edm.pth")

they are tensors alone. Names and shapes tell the architecture; the preconditioning is `EDMPrecond` unless a JSON file
says otherwise: `{"class": "VPPrecond", "kwargs": {...}}`, its constructor's arguments, in `<stem>.config.json`.

| preconditioning | SDE                      | F                         | noise label      |
| --------------- | ------------------------ | ------------------------- | ---------------- |
| `EDMPrecond`    | `Karras`, sigma = t      | `predictions.KarrasPreconditioning`      | log(sigma) / 4   |
| `VPPrecond`     | `VP`                     | eps                       | (M - 1) t        |
| `VEPrecond`     | `Karras`, sigma = t      | -eps                      | log(sigma / 2)   |
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.build import Run, assemble
from scoresde.convert.files import load_tensors
from scoresde.convert.runs import image_data
from scoresde.networks.blocks import Attention
from scoresde.networks.unet import UNet
from scoresde.predictions import Prediction
from scoresde.sdes import SDE

State = dict[str, Tensor]


class NegativeNoise(Prediction):
    """F = -eps with the label log(sigma/2): EDM's rendering of the VE networks (2206.00364, table 1).

    Their data are in [-1, 1], where those of 2011.13456 were in [0, 1]: hence the half.
    """

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.log(0.5 * sde.sigma(t))

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), -torch.ones_like(t)


def edm(path: str | Path, config: Mapping[str, Any] | str | Path | None = None) -> Run:
    """The model of EDM weights; its denoised view is that of the original at t = sigma.

    Args:
        path: a state dict saved by torch.save, or as safetensors.
        config: `{"class": ..., "kwargs": ...}` of the preconditioning, a JSON file with them, or None for
            `<stem>.config.json` where there is one, and for EDMPrecond with its defaults where there is not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights that are not of these networks, the first block named, or another preconditioning.
    """
    path = Path(path)
    found = load_tensors(path)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"a state dict, names and tensors, expected in {path}; export one with network.state_dict()")
    state = {name.removeprefix("model."): value for name, value in found.items()}
    network = architecture(state)
    sde, prediction, dropout = preconditioning(_read_config(path, config))
    shape = (network["channels"], network["image_size"], network["image_size"])
    settings = {
        "name": "edm",
        "sde": sde,
        "prediction": prediction,
        "network": {"_target_": "scoresde.networks.UNet", **network, "dropout": dropout},
        "data": image_data(shape, -1.0, 1.0),
    }
    with torch.device("meta"):
        built = UNet(**network)
    return assemble(settings, translate(state, built), path)


def _read_config(path: Path, config: Mapping[str, Any] | str | Path | None) -> Mapping[str, Any]:
    """The preconditioning's class and arguments, given, read, or EDM's defaults."""
    if isinstance(config, Mapping):
        return config
    file = path.with_name(f"{path.stem}.config.json") if config is None else Path(config)
    if config is None and not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); a class and its kwargs expected") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{file} is not a preconditioning: a class and its kwargs expected; got {type(found).__name__}"
        )
    return found


def preconditioning(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], float]:
    """The nodes of SDE and prediction type, and the dropout of the network.

    Raises:
        ValueError: another class than those of the module's table.
    """
    name, arguments = config.get("class", "EDMPrecond"), config.get("kwargs", {})
    dropout = float(arguments.get("dropout", 0.1))
    if name == "EDMPrecond":
        sde = {"_target_": "scoresde.sdes.Karras", "t_min": 0.002, "t_max": 80.0}
        return (
            sde,
            {"_target_": "scoresde.predictions.KarrasPreconditioning", "sigma_data": arguments.get("sigma_data", 0.5)},
            dropout,
        )
    if name == "VEPrecond":
        ends = {"t_min": arguments.get("sigma_min", 0.02), "t_max": arguments.get("sigma_max", 100.0)}
        return {"_target_": "scoresde.sdes.Karras", **ends}, {"_target_": f"{__name__}.NegativeNoise"}, dropout
    if name == "VPPrecond":
        low, last = arguments.get("beta_min", 0.1), float(arguments.get("M", 1000) - 1)
        high = low + arguments.get("beta_d", 19.9)
        start = arguments.get("epsilon_t", 1e-5)
        sde = {"_target_": "scoresde.sdes.VP", "beta_min": low, "beta_max": high, "t_min": start}
        labels = {"_target_": "scoresde.predictions.Discrete", "prediction": "noise", "labels": [0.0, last]}
        return sde, labels, dropout
    raise ValueError(f"a preconditioning among EDMPrecond, VPPrecond, VEPrecond expected; got {name!r}")


def architecture(state: State) -> dict[str, Any]:
    """The arguments of `UNet` that names and shapes of a state dict tell.

    Raises:
        ValueError: a state dict of another network.
    """
    blocks = [re.fullmatch(r"enc\.(\d+)x\1_block(\d+)\.conv1\.weight", name) for name in state]
    found = [(int(match[1]), int(match[2])) for match in blocks if match]
    if not found or "map_layer0.weight" not in state:
        raise ValueError(
            f"a state dict of EDM's SongUNet or DhariwalUNet expected (map_layer0, enc.32x32_block0, ...); "
            f"got {', '.join(list(state)[:3])}, ..."
        )
    sizes, adm = sorted({size for size, _ in found}, reverse=True), "out_norm.weight" in state
    first = _part(state, f"enc.{_square(sizes[0])}_conv.weight", dims=4)
    noise_features = _part(state, "map_layer0.weight", dims=2).shape[1]
    width = noise_features if adm else first.shape[0]
    if state["map_layer0.weight"].shape[0] != 4 * width:
        raise ValueError(
            f"an embedding of 4 x {width} features expected; got {state['map_layer0.weight'].shape[0]}: "
            f"channel_mult_emb other than 4 is not supported"
        )
    network: dict[str, Any] = {
        "image_size": sizes[0],
        "channels": first.shape[1],
        "width": width,
        "multipliers": [_part(state, f"enc.{_square(s)}_block0.conv1.weight", dims=4).shape[0] // width for s in sizes],
        "blocks": 1 + max(index for _, index in found),
        "attention": [size for size in sizes if f"enc.{_square(size)}_block0.qkv.weight" in state],
        "classes": _part(state, "map_label.weight", dims=2).shape[1] if "map_label.weight" in state else 0,
        "time_scale": 1.0,
    }
    if adm:
        block = {"attend_every": True, "head_channels": 64, "skip_rescale": False, "scale_shift": True}
        return {**network, **block, "embedding": "adm", "project_skip": False, "norm_eps": 1e-5}
    fourier = "map_noise.freqs" in state
    return {
        **network,
        "embedding": "fourier" if fourier else "positional",
        "embedding_width": noise_features,
        "cond_join": "input",
        "fir": _taps(state, sizes),
        "input_pyramid": _pyramid(state, "enc", {"aux_skip": "skip", "aux_residual": "residual"}),
        "output_pyramid": "skip" if f"dec.{_square(sizes[-1])}_aux_norm.weight" in state and len(sizes) > 1 else None,
    }


def _part(state: State, name: str, dims: int) -> Tensor:
    """A tensor that there must be."""
    value = state.get(name)
    if value is None or value.ndim != dims:
        got = "nothing of that name" if value is None else tuple(value.shape)
        raise ValueError(f"weights with {name}, of {dims} dimensions, expected; got {got}")
    return value


def _square(size: int) -> str:
    return f"{size}x{size}"


def _taps(state: State, sizes: list[int]) -> list[float] | None:
    """The taps of the resampling filter, up to a factor; None for a network that does not resample."""
    if len(sizes) == 1:
        return None
    taps = _part(state, f"enc.{_square(sizes[1])}_down.conv0.resample_filter", dims=4)[0, 0].sum(dim=0)
    return (taps / taps[0]).tolist()


def _pyramid(state: State, side: str, kinds: Mapping[str, str]) -> str | None:
    """The kind of pyramid whose part is in the state dict."""
    return next((kind for part, kind in kinds.items() if any(f"{part}." in name for name in state)), None)


RENAMED = {
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


def translate(state: State, network: UNet) -> State:
    """The state dict of our network from that of EDM's.

    Raises:
        ValueError: the first tensor that differs, by both its names, or one that the network has not.
    """
    state = _folded(state, adm="out_norm.weight" in state)
    unused = {name for name in state if not name.endswith("resample_filter")} - {"map_augment.weight"}
    heads = {name: module.heads for name, module in network.named_modules() if isinstance(module, Attention)}
    translated: State = {}
    for name, expected in network.state_dict().items():
        theirs = original_name(name, network, state)
        value = state.get(theirs)
        unused.discard(theirs)
        if value is None or value.shape != expected.shape:
            got = "nothing of that name" if value is None else tuple(value.shape)
            raise ValueError(
                f"weights differ first at {name} ({theirs} there): {tuple(expected.shape)} expected, got {got}"
            )
        block, is_qkv, _ = name.partition(".qkv.")
        translated[name] = _separated(value, heads[block]) if is_qkv else value
    if unused:
        raise ValueError(f"weights hold {min(unused)}, which the network has not")
    return translated


def original_name(name: str, network: UNet, state: State) -> str:
    """EDM's name of one of our tensors."""
    sizes = [_square(size[-1]) for size in network.sizes]
    part, _, parameter = name.rpartition(".")
    fixed = {
        "time.position": "map_noise",
        "time.inner": "map_layer0",
        "time.outer": "map_layer1",
        "time.cond.label": "map_label",
        "input": f"enc.{sizes[0]}_conv",
        "output.norm": "out_norm" if "out_norm.weight" in state else f"dec.{sizes[0]}_aux_norm",
        "output.conv": "out_conv" if "out_conv.weight" in state else f"dec.{sizes[0]}_aux_conv",
    }
    if part in fixed:
        return f"{fixed[part]}.{'freqs' if parameter == 'frequencies' else parameter}"
    side, *inner = part.split(".")
    if side == "middle":
        block, *rest = inner
        return f"dec.{sizes[-1]}_in{block.removeprefix('block')}.{RENAMED['.'.join(rest)]}.{parameter}"
    size, block, *rest = inner
    coarser, finer = sizes[min(sizes.index(size) + 1, len(sizes) - 1)], sizes[max(sizes.index(size) - 1, 0)]
    stage = "enc" if side == "down" else "dec"
    if block == "pyramid":
        kind = {"resample": "aux_residual", "project": "aux_skip", "head": f"aux_{rest[-1]}"}[rest[0]]
        return f"{stage}.{size if side == 'up' else coarser}_{kind}.{parameter}"
    where = {"downsample": f"{coarser}_down", "upsample": f"{finer}_up"}.get(block, f"{size}_{block}")
    return f"{stage}.{where}.{RENAMED['.'.join(rest)]}.{parameter}"


def _folded(state: State, adm: bool) -> State:
    """The embedding of label and noise in our form.

    A class is a row of an embedding, where they multiply a one-hot vector, scaled by the root of the classes in
    SongUNet; its bias there, added for every class and none, goes on into the next layer's. ADM's features are cosines
    before sines: the columns that read them change places.
    """
    state = dict(state)
    label, bias = state.get("map_label.weight"), state.pop("map_label.bias", None)
    if label is not None:
        state["map_label.weight"] = label.T * (1 if adm else math.sqrt(label.shape[1]))
    if bias is not None:
        inner = state["map_layer0.weight"]
        if bias.shape != inner.shape[1:]:
            raise ValueError(f"map_label.bias {tuple(inner.shape[1:])} expected; got {tuple(bias.shape)}")
        ours = _part(state, "map_layer0.bias", dims=1)
        state["map_layer0.bias"] = (ours.double() + inner.double() @ bias.double()).to(ours.dtype)
    if adm:
        state["map_layer0.weight"] = state["map_layer0.weight"].roll(state["map_layer0.weight"].shape[1] // 2, dims=1)
    return state


def _separated(value: Tensor, heads: int) -> Tensor:
    """Query, key and value one after the other, where they alternate within each head."""
    return value.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)
