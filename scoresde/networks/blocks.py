"""The blocks of the U-Net: residual blocks, attention and resampling."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Count, Positive, Share, checked
from scoresde.networks.layers import (
    attend,
    checkpointed,
    context_mask,
    convolution,
    group_norm,
    linear,
    split_heads,
)
from scoresde.networks.magnitude_blocks import MagnitudeAttention, MagnitudeResidualBlock
from scoresde.networks.magnitude_layers import MagnitudeStyle
from scoresde.networks.resampling import Resample, ResampledConvolution


@checked
@dataclass(frozen=True)
class BlockStyle:
    """The choices that all blocks of a U-Net share; the defaults are those of DDPM++.

    Args:
        heads: number of attention heads, unless `head_channels` is given.
        heads_up: number of attention heads on the way up; None for `heads`.
        head_channels: channels of each attention head; the number of heads is then channels / head_channels.
        attend_every: if True, every block on the way up attends, at the resolutions with attention (ADM); if False,
            only the last block of each of these resolutions does.
        dropout: dropout probability in the residual blocks.
        fir: taps of the resampling filter, (1, 3, 3, 1) for NCSN++; None averages pairs and repeats values.
        skip_rescale: if True, divide the sum of a skip connection and its update by 2^(1/2).
        scale_shift: if True, the time features scale and shift the output of the second normalisation (ADM); if False,
            they are added to its input.
        project_skip: if True, a residual block that resamples applies a 1 x 1 convolution to its skip connection even
            if the number of channels stays the same; if False (ADM), only if that number changes.
        group_size: smallest number of channels per group of the group normalisations, which have at most 32 groups. A
            normalisation with one channel per group removes the added time features; `scale_shift` avoids this.
        norm_eps: constant added to the variance in the normalisations.
        attention_block: the class of the attention of a block, `Attention` by default, or `SpatialTransformer`.
        magnitude: settings of magnitude-preserving layers (EDM2, 2312.02696), see `MagnitudeStyle`; None for layers
            with biases and normalisations. Residual blocks, attention, the input, the output and the embeddings then
            preserve magnitudes, and `skip_rescale`, `scale_shift`, `project_skip`, `group_size` and `norm_eps` have no
            effect on them. A block with fewer channels than `head_channels` has no attention.
        checkpointing: if True, recompute the activations of the blocks in the backward pass instead of storing them.
    """

    heads: Count = 1
    heads_up: Count | None = None
    head_channels: Count | None = None
    attend_every: bool = False
    dropout: Share = 0.1
    fir: Sequence[float] | None = None
    skip_rescale: bool = True
    scale_shift: bool = False
    project_skip: bool = True
    group_size: Count = 4
    norm_eps: Positive = 1e-6
    attention_block: Callable[..., nn.Module] | None = None
    magnitude: MagnitudeStyle | None = None
    checkpointing: bool = False


@dataclass(frozen=True)
class NetworkStyle(BlockStyle):
    """A `BlockStyle` with the settings that follow from the network around the blocks.

    Args:
        dims: number of spatial dimensions.
        time_features: length of the time features; 0 for blocks that do not depend on time.
        context_features: length of the context vectors; 0 for none.
        is_up: whether the block is in the middle or on the way up.
    """

    dims: int = 2
    time_features: int = 0
    context_features: int = 0
    is_up: bool = False

    def norm(self, channels: int) -> nn.GroupNorm:
        """Return a group normalisation for this number of channels."""
        return group_norm(channels, self.group_size, self.norm_eps)

    def heads_of(self, channels: int) -> int:
        """Return the number of attention heads for this number of channels.

        Raises:
            ValueError: the number of channels is not a multiple of the number of heads.
        """
        heads = channels // self.head_channels if self.head_channels else self.heads
        if heads < 1 or channels % heads:
            raise ValueError(
                f"the number of attention heads must be at least 1 and divide the number of channels; got {channels} "
                f"channels and {heads} heads: change the width of the network, heads or head_channels"
            )
        return heads

    def join(self, skip: Tensor, update: Tensor) -> Tensor:
        """Return skip + update; if `skip_rescale`, divide by 2^(1/2), so that the variance does not grow with depth."""
        return (skip + update) * math.sqrt(0.5) if self.skip_rescale else skip + update


class ResidualBlock(nn.Module):
    """Norm, SiLU, resample, convolve, add the time features; norm, SiLU, dropout, convolve; add to the skip connection.

    With resampling it is BigGAN's block (2011.13456, appendix H), without it DDPM's (2006.11239). With `scale_shift` it
    is ADM's, where the time features scale and shift the second normalisation, norm(h) (1 + scale) + shift (2105.05233,
    section 3.1).

    Args:
        style: the settings that all blocks share.
        in_channels, out_channels: channels of the input and of the output.
        resample: "down" halves the resolution, "up" doubles it, None keeps it.
    """

    def __init__(self, style: NetworkStyle, in_channels: int, out_channels: int, resample: str | None = None):
        super().__init__()
        self.style, dims = style, style.dims
        self.resample = Resample(dims, resample, style.fir) if resample else None
        self.norm1, self.conv1 = style.norm(in_channels), convolution(dims, in_channels, out_channels)
        self.time = linear(style.time_features, out_channels * (1 + style.scale_shift)) if style.time_features else None
        self.norm2, self.dropout = style.norm(out_channels), nn.Dropout(style.dropout)
        self.conv2 = convolution(dims, out_channels, out_channels, scale=0.0)
        project = in_channels != out_channels or (resample is not None and style.project_skip)
        self.skip = convolution(dims, in_channels, out_channels, kernel=1) if project else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        hidden = F.silu(self.norm1(x))
        if self.resample is not None:
            hidden, x = self.resample(hidden), self.resample(x)
        hidden = self._normalise_with_time(self.conv1(hidden), time)
        hidden = self.conv2(self.dropout(F.silu(hidden)))
        return self.style.join(x if self.skip is None else self.skip(x), hidden)

    def _normalise_with_time(self, hidden: Tensor, time: Tensor | None) -> Tensor:
        if self.time is None:
            return self.norm2(hidden)
        features = self.time(time)
        features = features.reshape(*features.shape, *(1,) * self.style.dims)
        if not self.style.scale_shift:
            return self.norm2(hidden + features)
        scale, shift = features.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm2(hidden), 1 + scale)


class Attention(nn.Module):
    """Multi-head attention from all positions to all positions, or to context vectors, with a skip connection.

    Sources: attention 1706.03762; over the positions of an image 2006.11239; to a context 2112.10752, section 3.3.

    Args:
        style: the settings that all blocks share.
        channels: channels of the input and of the output.
        context_features: length of a context vector; 0 for self-attention.

    Raises:
        ValueError: `channels` is not a multiple of the number of heads.
    """

    def __init__(self, style: NetworkStyle, channels: int, context_features: int = 0):
        super().__init__()
        self.heads = style.heads_of(channels)
        self.style, self.norm = style, style.norm(channels)
        if context_features:
            self.query = convolution(style.dims, channels, channels, kernel=1)
            self.context = linear(context_features, 2 * channels)
        else:
            # The weights of query, key and value have the variance 0.1 / channels, as in the code of 2011.13456.
            self.qkv = convolution(style.dims, channels, 3 * channels, kernel=1, scale=0.2)
        self.out = convolution(style.dims, channels, channels, kernel=1, scale=0.0)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend from x (B, C, *space) to itself, or to context vectors (B, L, context_features).

        Context vectors that hold NaN are left out. A sample whose context vectors all hold NaN stays unchanged.
        """
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        if context is None:
            update = _pointwise(self.out, attend(*split_heads(_pointwise(self.qkv, tokens), 3, self.heads)))
        else:
            mask, is_null = context_mask(context)
            (query,) = split_heads(_pointwise(self.query, tokens), 1, self.heads)
            key, value = split_heads(self.context(context.nan_to_num()), 2, self.heads)
            update = _pointwise(self.out, attend(query, key, value, mask))
        joined = self.style.join(x, update.transpose(1, 2).reshape(x.shape))
        return joined if context is None else torch.where(is_null.reshape(-1, *(1,) * (x.ndim - 1)), x, joined)


def _pointwise(conv: Any, tokens: Tensor) -> Tensor:
    """Apply a convolution of width 1 to tokens (B, positions, channels) as a linear layer, which is faster."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


class Block(nn.Module):
    """A residual block; if `attends`, self-attention follows, then attention to the context if there is one."""

    def __init__(
        self,
        style: NetworkStyle,
        in_channels: int,
        out_channels: int,
        attends: bool = False,
        resample: str | None = None,
    ):
        super().__init__()
        preserves = style.magnitude is not None
        residual, attention = (MagnitudeResidualBlock, MagnitudeAttention) if preserves else (ResidualBlock, Attention)
        attends = attends and not (preserves and style.head_channels and out_channels < style.head_channels)
        self.residual = residual(style, in_channels, out_channels, resample)
        self.attention = (style.attention_block or attention)(style, out_channels) if attends else None
        has_context = attends and style.context_features > 0 and style.attention_block is None
        self.cross = Attention(style, out_channels, style.context_features) if has_context else None
        self.checkpointing, self.clip = style.checkpointing, style.magnitude.clip if style.magnitude else None

    def forward(self, x: Tensor, time: Tensor | None, context: Tensor | None = None) -> Tensor:
        hidden = checkpointed(self.residual, x, time, active=self.checkpointing)
        if self.attention is not None:
            hidden = checkpointed(self.attention, hidden, None if self.cross else context, active=self.checkpointing)
        if self.cross is not None and context is not None:
            hidden = checkpointed(self.cross, hidden, context, active=self.checkpointing)
        return hidden if self.clip is None else hidden.clamp(-self.clip, self.clip)


def residual_resampling(style: NetworkStyle, channels: int, direction: str) -> Block:
    """Return a residual block that halves or doubles the resolution (BigGAN, DDPM++, NCSN++ and ADM)."""
    return Block(style, channels, channels, resample=direction)


def convolution_resampling(
    style: NetworkStyle, channels: int, direction: str, centred: bool = False
) -> ResampledConvolution:
    """Return a convolution that halves or doubles the resolution (DDPM; improved DDPM and ADM if `centred`)."""
    return ResampledConvolution(style.dims, channels, channels, direction, style.fir, centred)


def filter_resampling(style: NetworkStyle, channels: int, direction: str) -> Resample:
    """Return the resampling filter `style.fir` without a convolution; it has no parameters."""
    return Resample(style.dims, direction, style.fir)


class Head(nn.Module):
    """Norm, SiLU, convolve: maps features to an image or to other features."""

    def __init__(self, style: NetworkStyle, in_channels: int, out_channels: int, scale: float = 0.0):
        super().__init__()
        self.norm = style.norm(in_channels)
        self.conv = convolution(style.dims, in_channels, out_channels, scale=scale)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(hidden)))
