"""The blocks of the U-Net: residual, attention, and the pyramids that carry the image itself along."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.networks.layers import attend, checkpointed, convolution, group_norm, linear
from scoresde.networks.resampling import Resample, ResampledConvolution


@dataclass(frozen=True)
class Style:
    """What all blocks of a network share; the fields are explained in `UNet`."""

    dims: int = 2
    time_features: int = 0
    heads: int = 1
    head_channels: int | None = None
    dropout: float = 0.0
    fir: Sequence[float] | None = None
    skip_rescale: bool = True
    scale_shift: bool = False
    project_skip: bool = True
    group_size: int = 4
    norm_eps: float = 1e-6
    context_features: int = 0
    checkpointing: bool = False

    def norm(self, channels: int) -> nn.GroupNorm:
        """Group normalisation of that many channels."""
        return group_norm(channels, self.group_size, self.norm_eps)

    def join(self, skip: Tensor, update: Tensor) -> Tensor:
        """skip + update, divided by 2^(1/2) where the skips are rescaled, so that depth does not grow the variance."""
        return (skip + update) * math.sqrt(0.5) if self.skip_rescale else skip + update


class ResidualBlock(nn.Module):
    """norm, SiLU, resample, convolve, add the time; norm, SiLU, dropout, convolve; join the skip.

    BigGAN's block (2011.13456, appendix H), DDPM's without resampling (2006.11239), ADM's with `scale_shift`: there the
    time features scale and shift the second normalisation, norm(h) (1 + scale) + shift (2105.05233, section 3.1).

    Args:
        style: what all blocks share.
        in_channels, out_channels: of input and output.
        resample: "down" halves the resolution, "up" doubles it; None keeps it.
    """

    def __init__(self, style: Style, in_channels: int, out_channels: int, resample: str | None = None):
        super().__init__()
        self.style, dims = style, style.dims
        self.resample = Resample(dims, resample, style.fir) if resample else None
        self.norm1, self.conv1 = style.norm(in_channels), convolution(dims, in_channels, out_channels)
        self.time = linear(style.time_features, out_channels * (2 if style.scale_shift else 1))
        self.norm2, self.dropout = style.norm(out_channels), nn.Dropout(style.dropout)
        self.conv2 = convolution(dims, out_channels, out_channels, scale=0.0)
        project = in_channels != out_channels or (resample is not None and style.project_skip)
        self.skip = convolution(dims, in_channels, out_channels, kernel=1) if project else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = F.silu(self.norm1(x))
        if self.resample is not None:
            hidden, x = self.resample(hidden), self.resample(x)
        hidden = self._timed(self.conv1(hidden), time)
        hidden = self.conv2(self.dropout(F.silu(hidden)))
        return self.style.join(x if self.skip is None else self.skip(x), hidden)

    def _timed(self, hidden: Tensor, time: Tensor) -> Tensor:
        """The second normalisation, of `hidden` with the time features added to it or modulating it."""
        features = self.time(time)
        features = features.reshape(*features.shape, *(1,) * self.style.dims)
        if not self.style.scale_shift:
            return self.norm2(hidden + features)
        scale, shift = features.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm2(hidden), 1 + scale)


class Attention(nn.Module):
    """Multi-head attention of all positions to all positions, or to a sequence of context vectors, joined to its input.

    (1706.03762; over the positions of an image, 2006.11239; to a context, 2112.10752, section 3.3.)

    Args:
        style: what all blocks share.
        channels: of input and output.
        context_features: length of a context vector; 0 for self-attention.
    """

    def __init__(self, style: Style, channels: int, context_features: int = 0):
        super().__init__()
        self.heads = channels // style.head_channels if style.head_channels else style.heads
        if self.heads < 1 or channels % self.heads:
            raise ValueError(f"channels divisible by heads expected; got {channels} channels, {self.heads} heads")
        self.style, self.norm = style, style.norm(channels)
        if context_features:
            self.query = convolution(style.dims, channels, channels, kernel=1)
            self.context = linear(context_features, 2 * channels)
        else:
            # Of query, key and value each the variance 0.1 / channels of 2011.13456's code.
            self.qkv = convolution(style.dims, channels, 3 * channels, kernel=1, scale=0.2)
        self.out = convolution(style.dims, channels, channels, kernel=1, scale=0.0)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, C, *space) and, for attention to a context, its vectors (B, L, context_features)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        if context is None:
            query, key, value = self._split(_pointwise(self.qkv, tokens), 3)
        else:
            (query,) = self._split(_pointwise(self.query, tokens), 1)
            key, value = self._split(self.context(context), 2)
        mixed = attend(query, key, value).transpose(1, 2).flatten(2)
        return self.style.join(x, _pointwise(self.out, mixed).transpose(1, 2).reshape(x.shape))

    def _split(self, features: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, positions, parts C) to `parts` tensors (B, heads, positions, C / heads)."""
        return features.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _pointwise(conv: Any, tokens: Tensor) -> Tensor:
    """A convolution of width 1 on tokens (B, positions, channels): as a linear layer, which is faster on them."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


class Block(nn.Module):
    """A residual block; where `attend` is set, self-attention after it, and attention to a context if there is one."""

    def __init__(
        self, style: Style, in_channels: int, out_channels: int, attend: bool = False, resample: str | None = None
    ):
        super().__init__()
        self.residual = ResidualBlock(style, in_channels, out_channels, resample)
        self.attention = Attention(style, out_channels) if attend else None
        cross = attend and style.context_features > 0
        self.cross = Attention(style, out_channels, style.context_features) if cross else None
        self.checkpointing = style.checkpointing

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = checkpointed(self.residual, x, time, active=self.checkpointing)
        if self.attention is not None:
            hidden = checkpointed(self.attention, hidden, active=self.checkpointing)
        if self.cross is not None and context is not None:
            hidden = checkpointed(self.cross, hidden, context, active=self.checkpointing)
        return hidden


class InputSkip(nn.Module):
    """The input, downsampled to each resolution, projected and added to the features or put before them.

    ("input skip" of 2011.13456, appendix H, after StyleGAN2, 1912.04958.)
    """

    def __init__(self, style: Style, image_channels: int, channels: int, combine: str):
        super().__init__()
        self.combine, self.resample = combine, Resample(style.dims, "down", style.fir)
        self.project = convolution(style.dims, image_channels, channels, kernel=1)

    def forward(self, hidden: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """Features and pyramid of the resolution that `hidden` has just reached."""
        pyramid = self.resample(pyramid)
        image = self.project(pyramid)
        return torch.cat([image, hidden], dim=1) if self.combine == "cat" else image + hidden, pyramid


class InputResidual(nn.Module):
    """The pyramid, downsampled by a convolution, joined with the features; their sum is both ("residual" input)."""

    def __init__(self, style: Style, image_channels: int, channels: int):
        super().__init__()
        self.style = style
        self.resample = ResampledConvolution(style.dims, image_channels, channels, "down", style.fir)

    def forward(self, hidden: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        joined = self.style.join(self.resample(pyramid), hidden)
        return joined, joined


class Head(nn.Module):
    """norm, SiLU, convolve: from features to an image, or to features again."""

    def __init__(self, style: Style, in_channels: int, out_channels: int, scale: float = 0.0):
        super().__init__()
        self.norm = style.norm(in_channels)
        self.conv = convolution(style.dims, in_channels, out_channels, scale=scale)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(hidden)))


class OutputSkip(nn.Module):
    """An image from the features of each resolution, added to the image of the coarser ones ("output skip")."""

    def __init__(self, style: Style, image_channels: int, channels: int):
        super().__init__()
        self.resample, self.head = Resample(style.dims, "up", style.fir), Head(style, channels, image_channels)

    def forward(self, hidden: Tensor, pyramid: Tensor | None) -> tuple[Tensor, Tensor]:
        image = self.head(hidden)
        return hidden, image if pyramid is None else self.resample(pyramid) + image


class OutputResidual(nn.Module):
    """The pyramid, upsampled by a convolution, joined with the features; their sum is both ("residual" output)."""

    def __init__(self, style: Style, pyramid_channels: int | None, channels: int):
        super().__init__()
        self.style = style
        self.head: nn.Module = nn.Identity()
        self.resample: nn.Module | None = None
        if pyramid_channels is None:  # the coarsest resolution, where the pyramid begins
            self.head = Head(style, channels, channels, scale=1.0)
        else:
            self.resample = ResampledConvolution(style.dims, pyramid_channels, channels, "up", style.fir)

    def forward(self, hidden: Tensor, pyramid: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.resample is None or pyramid is None:
            return hidden, self.head(hidden)
        joined = self.style.join(self.resample(pyramid), hidden)
        return joined, joined
