"""Conversion of flat configurations of a `UNet` to nested ones, grouped into the parts that `UNet` takes.

A flat configuration lists all arguments of the network and its parts at one level. Those of older runs are flat, and so
are those that the converters in `scoresde.convert` build.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from scoresde.networks.encoder import PARTS

NETWORKS = "scoresde.networks."
MODULES = {
    "resample": {
        "residual": "residual_resampling",
        "convolution": "convolution_resampling",
        "plain": "filter_resampling",
    },
    "input_pyramid": {"skip": "InputSkip", "residual": "InputResidual"},
    "output_pyramid": {"skip": "OutputSkip", "residual": "OutputResidual"},
}
LABEL = ("embedding", "embedding_width", "time_scale", "fourier_scale")


def with_parts(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a network, with the arguments of a `UNet` or `EncoderUNet` grouped into its parts.

    Args:
        flat: `_target_`, the arguments of `UNet` and the fields of its parts. `resample`, `input_pyramid` and
            `output_pyramid` are names from `MODULES`. The arguments of older runs are also accepted: `dims`, `combine`
            ("sum" or "cat"), `embedding` ("positional", "adm", "fourier" or "fourier_log"), `embedding_width`,
            `time_scale` and `fourier_scale`.
    """
    node = dict(flat)
    for name, modules in MODULES.items():
        if module := modules.get(str(node.get(name))):
            node[name] = {"_target_": NETWORKS + module, "_partial_": True}
    if node.pop("combine", "sum") == "cat" and flat.get("input_pyramid") == "skip":
        node["input_pyramid"]["concatenate"] = True
    if "image_size" in node and (dims := node.pop("dims", None)) and isinstance(node["image_size"], int):
        node["image_size"] = [node["image_size"]] * dims
    is_classifier = node["_target_"] == NETWORKS + "EncoderUNet"
    if not is_classifier and node["_target_"] != NETWORKS + "UNet":
        return node
    for part, kind in PARTS.items():
        names = [field.name for field in fields(kind) if field.name in node]
        if is_classifier and "classes" in names:  # its logits, not a condition
            names.remove("classes")
        if names:
            node[part] = {"_target_": NETWORKS + kind.__name__, **{name: node.pop(name) for name in names}}
            node.setdefault("attention", [16])
    label = {name: node.pop(name) for name in LABEL if name in node}
    embedding = label.get("embedding", "positional")
    features = label.get("embedding_width") or node.get("width", 128)
    if "fourier" in embedding:
        arguments = {"scale": label.get("fourier_scale", 16.0), "log": embedding == "fourier_log"}
        node["label"] = {"_target_": NETWORKS + "FourierEmbedding", "features": features, **arguments}
    elif label:
        arguments = {"scale": label.get("time_scale", 1000.0), "endpoint": embedding == "positional"}
        node["label"] = {"_target_": NETWORKS + "PositionalEmbedding", "features": features, **arguments}
    return node
