"""The U-Net of the score-SDE family, in the manner of DDPM++ (2011.13456, appendix H).

    x --input--> down[res] blocks --> middle --> up[res] blocks --output--> F

Every resolution has its blocks, named by it (`down.8x8.block0.residual`, `up.4x4.block1.attention`), so that a state
dict reads like the architecture. Skips carry every block's output from the way down to the way up.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.networks.layers import ResidualBlock, SelfAttention, TimeEmbedding, convolution, group_norm
from scoresde.protocols import Condition


class FourierInput(nn.Module):
    """Appends sin and cos of 2 pi f x for each frequency f to the channels (2107.00630, appendix C).

    They let a network see where within a grey level a value lies, which a likelihood depends on.
    """

    def __init__(self, frequencies: Sequence[float]):
        super().__init__()
        self.frequencies = tuple(float(f) for f in frequencies)

    def forward(self, x: Tensor) -> Tensor:
        phases = [2 * torch.pi * f * x for f in self.frequencies]
        return torch.cat([x, *(wave(phase) for phase in phases for wave in (torch.sin, torch.cos))], dim=1)


class Block(nn.Module):
    """A residual block, followed by self-attention where `attend` is set."""

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        time_features: int,
        heads: int = 1,
        dropout: float = 0.0,
        attend: bool = False,
        resample: str | None = None,
    ):
        super().__init__()
        self.residual = ResidualBlock(dims, in_channels, out_channels, time_features, resample, dropout)
        self.attention = SelfAttention(dims, out_channels, heads) if attend else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.attention(self.residual(x, time))


class UNet(nn.Module):
    """A noise-conditional U-Net on (B, C, *space) with one, two or three spatial dimensions.

    Args:
        image_size: length of the spatial sides at the input; must halve len(multipliers) - 1 times.
        channels: of the state.
        width: channels at the input resolution.
        multipliers: of the width, one per resolution, from the input down.
        blocks: residual blocks per resolution.
        attention: resolutions (side lengths) whose blocks are followed by self-attention.
        heads: of the self-attention.
        dropout: in the residual blocks.
        time_scale: highest frequency of the time embedding, see `PositionalEmbedding`.
        input_frequencies: of sin and cos of the input, in cycles per unit, appended to the channels.
        cond_features: length of the condition vector, 0 without.
        dims: spatial dimensions.
        out_channels: of the output, if not those of the state (logits of a `LevelHead`).

    Raises:
        ValueError: an image size that does not halve as often as needed, or attention at a resolution there is not.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        heads: int = 1,
        dropout: float = 0.1,
        time_scale: float = 1000.0,
        input_frequencies: Sequence[float] = (),
        cond_features: int = 0,
        dims: int = 2,
        out_channels: int | None = None,
    ):
        super().__init__()
        if dims not in (1, 2, 3):
            raise ValueError(f"dims of 1, 2 or 3 expected; got dims = {dims}")
        if blocks < 1 or len(multipliers) < 1:
            raise ValueError(f"one block and one multiplier or more expected; got {blocks}, {list(multipliers)}")
        self.image_size, self.channels, self.dims = image_size, channels, dims
        sizes = [image_size >> level for level in range(len(multipliers))]
        if image_size % (1 << (len(multipliers) - 1)):
            raise ValueError(f"an image size that halves {len(multipliers) - 1} times expected; got {image_size}")
        if not set(attention) <= set(sizes):
            raise ValueError(f"attention at resolutions among {sizes} expected; got {list(attention)}")
        features = 4 * width
        self.time = TimeEmbedding(width, features, time_scale, cond_features)
        self.fourier = FourierInput(input_frequencies)
        self.input = convolution(dims, channels * (1 + 2 * len(input_frequencies)), width)

        block = partial(Block, dims, time_features=features, heads=heads, dropout=dropout)

        names = ["x".join([str(size)] * dims) for size in sizes]
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        current, skips = width, [width]
        levels = list(zip(names, sizes, multipliers, strict=True))
        for i, (name, size, multiplier) in enumerate(levels):
            out, attend = multiplier * width, size in attention
            stage = nn.ModuleDict()
            for j in range(blocks):
                stage[f"block{j}"] = block(current if j == 0 else out, out, attend=attend)
            if i + 1 < len(levels):
                stage["downsample"] = block(out, out, resample="down")
            skips += [out] * len(stage)
            self.down[name], current = stage, out
        self.middle = nn.ModuleDict({"block0": block(current, current, attend=True), "block1": block(current, current)})
        for i, (name, size, multiplier) in reversed(list(enumerate(levels))):
            out, attend = multiplier * width, size in attention
            stage = nn.ModuleDict()
            for j in range(blocks + 1):
                stage[f"block{j}"] = block((current if j == 0 else out) + skips.pop(), out, attend=attend)
            if i:
                stage["upsample"] = block(out, out, resample="up")
            self.up[name], current = stage, out
        self.norm = group_norm(current)
        self.output = convolution(dims, current, out_channels or channels, scale=0)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """F of the space of x (B, C, *space), at noise labels (B,) and a condition vector (B, cond_features)."""
        expected = (self.channels, *[self.image_size] * self.dims)
        if x.shape[1:] != expected:
            raise ValueError(f"a state (B, {', '.join(map(str, expected))}) expected; got {tuple(x.shape)}")
        if cond is not None and not isinstance(cond, Tensor):
            raise TypeError(f"a condition vector (a tensor) or None expected; got {type(cond).__name__}")
        time = self.time(c_noise, cond)
        hidden = self.input(self.fourier(x))
        skips = [hidden]
        for stage in self.down.children():
            for block in stage.children():
                hidden = block(hidden, time)
                skips.append(hidden)
        for block in self.middle.children():
            hidden = block(hidden, time)
        for stage in self.up.children():
            for name, block in stage.named_children():
                joined = hidden if name == "upsample" else torch.cat([hidden, skips.pop()], dim=1)
                hidden = block(joined, time)
        return self.output(F.silu(self.norm(hidden)))
