"""Translate state dicts of guided-diffusion and improved-diffusion to the layer names of our networks.

These two projects number their blocks through all resolutions. A U-Net with L resolutions, l = 0 (the finest) to L - 1,
has at each of them b residual blocks on the way down and b + 1 on the way up. With j from 0, their names at l are:

| in our networks                | in these projects                                              |
| ------------------------------ | -------------------------------------------------------------- |
| block j on the way down        | input_blocks.(1 + l (b + 1) + j)                               |
| downsampling after the blocks  | input_blocks.((l + 1)(b + 1))                                  |
| block j on the way up          | output_blocks.((L - 1 - l)(b + 1) + j)                         |
| upsampling after the blocks    | the last submodule of output_blocks.((L - 1 - l)(b + 1) + b)   |

Two conventions of the tensors differ. In these projects the time features are cosines before sines, and query, key and
value alternate within each head, unless `use_new_attention_order` was set.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from scoresde.networks.blocks import Attention
from scoresde.networks.encoder import Encoder

State = dict[str, Tensor]

# The names of the layers of a residual block and of attention: {name in our networks: name in guided-diffusion}.
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
# {guided-diffusion's name of a pool: (our class, its arguments, {our name of a layer: guided-diffusion's name})}.
POOLS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "adaptive": ("AveragePool", {}, {"norm": "out.0", "linear": "out.3"}),
    "attention": (
        "AttentionPool",
        {},
        {"norm": "out.0", "positions": "out.2.positional_embedding", "qkv": "out.2.qkv_proj", "linear": "out.2.c_proj"},
    ),
    "spatial": ("SkipPool", {"normalise": False}, {"inner": "out.0", "linear": "out.2"}),
    "spatial_v2": ("SkipPool", {"normalise": True}, {"inner": "out.0", "norm": "out.1", "linear": "out.3"}),
}


def layer_names(network: Encoder, pool: Mapping[str, str]) -> dict[str, str]:
    """Return {layer name in our network: name in guided-diffusion}.

    `pool` is such a dict for the layers of a classifier's pool, see `POOLS`; it is empty for a U-Net.
    """
    table = {"time.inner": "time_embed.0", "time.outer": "time_embed.2", "input": "input_blocks.0.0"}
    table |= {f"time.cond.{name}": "label_emb" for name in network.conditions}
    table |= {"output.norm": "out.0", "output.conv": "out.2"} | {f"pool.{name}": there for name, there in pool.items()}
    residuals = {"middle.block0": "middle_block.0", "middle.block1": "middle_block.2"}
    attentions = {"middle.block0": "middle_block.1"}
    stage: Any = network.down[network.levels[0][0]]
    count = stage.count + 1
    for level, (name, _, attends) in enumerate(network.levels):
        first, last = f"down.{name}", f"up.{name}"
        down, up = 1 + level * count, (len(network.levels) - 1 - level) * count
        for j in range(count):
            for here, there in ((first, f"input_blocks.{down + j}"), (last, f"output_blocks.{up + j}")):
                residuals[f"{here}.block{j}"], attentions[f"{here}.block{j}"] = f"{there}.0", f"{there}.1"
        downsample, upsample = f"input_blocks.{down + count - 1}.0", f"output_blocks.{up + count - 1}.{1 + attends}"
        residuals |= {f"{first}.downsample": downsample, f"{last}.upsample": upsample}
        table |= {f"{first}.downsample.conv": f"{downsample}.op", f"{last}.upsample.conv": f"{upsample}.conv"}
    for part, blocks, layers in (("residual", residuals, RESIDUAL), ("attention", attentions, ATTENTION)):
        for block, there in blocks.items():
            table |= {f"{block}.{part}.{name}": f"{there}.{layer}" for name, layer in layers.items()}
    return table


def translate(state: State, network: Encoder, new_order: bool, pool: Mapping[str, str]) -> State:
    """Convert a state dict of guided-diffusion to the state dict of our network.

    Args:
        state: the state dict of guided-diffusion.
        network: our network.
        new_order: whether query, key and value are three blocks of channels; if not, they alternate within each head.
        pool: {name of a layer of the pool: its name in guided-diffusion}, see `POOLS`; empty for a U-Net.

    Raises:
        ValueError: a tensor is missing or has another shape (the message has both names of the first one), or
            `state` has a tensor that our network lacks.
    """
    table, unused, translated = layer_names(network, pool), set(state), {}
    heads = {name: module.heads for name, module in network.named_modules() if isinstance(module, Attention)}
    for name, expected in network.state_dict().items():
        layer, _, part = name.rpartition(".")
        theirs = table[name] if name in table else f"{table[layer]}.{part}"
        value = state.get(theirs)
        unused.discard(theirs)
        if value is not None and theirs.endswith("positional_embedding"):
            value = value.T
        if value is None or _without_ones(value) != _without_ones(expected):
            got = "none" if value is None else tuple(value.shape)
            raise ValueError(
                f"weights differ first at {name} ({theirs} in guided-diffusion): expected shape "
                f"{tuple(expected.shape)}; got {got}"
            )
        attention, is_qkv, _ = name.rpartition(".qkv.")
        if is_qkv and attention in heads and not new_order:
            value = value.unflatten(0, (heads[attention], 3, -1)).transpose(0, 1).flatten(0, 2)
        elif name == "time.inner.weight":  # their time features are cosines before sines
            value = value.roll(value.shape[1] // 2, dims=1)
        translated[name] = value.reshape(expected.shape)
    if unused:
        raise ValueError(f"the weights hold {min(unused)}, which the network does not have")
    return translated


def _without_ones(x: Tensor) -> tuple[int, ...]:
    """Return the shape of x without trailing dimensions of size 1.

    The weights of a linear layer and of convolutions with kernel size 1 then have the same shape.
    """
    shape = list(x.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return tuple(shape)
