"""Building blocks of the noise-conditional networks, for one, two or three spatial dimensions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_GROUPS = 32


def convolution(dims: int, in_channels: int, out_channels: int, kernel: int = 3, scale: float = 1.0) -> nn.Module:
    """A convolution that keeps the resolution, with fan-average uniform weights times `scale` and zero bias.

    Scale 0 makes a block start as its skip (2011.13456 initialises with a scale of 1e-10).
    """
    conv = CONVOLUTIONS[dims](in_channels, out_channels, kernel, padding=kernel // 2)
    return initialise(conv, scale)


def linear(in_features: int, out_features: int, scale: float = 1.0) -> nn.Module:
    """A linear layer with fan-average uniform weights times `scale` and zero bias."""
    return initialise(nn.Linear(in_features, out_features), scale)


def initialise(layer: nn.Module, scale: float) -> nn.Module:
    """Variance-scaling initialisation of DDPM: uniform, fan average; returns the layer."""
    with torch.no_grad():
        weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
        nn.init.xavier_uniform_(weight, gain=math.sqrt(scale))
        nn.init.zeros_(bias)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with 32 groups, or fewer that divide the channels, of at least four channels each."""
    groups = next(g for g in range(min(MAX_GROUPS, max(channels // 4, 1)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class PositionalEmbedding(nn.Module):
    """sin and cos of the noise label at frequencies from `scale` down to `scale`/10^4, (B,) -> (B, features).

    Transformer embedding as DDPM uses it (2006.11239, appendix B): scale 1000 for a label in [0, 1].
    """

    def __init__(self, features: int, scale: float = 1000.0):
        super().__init__()
        if features < 4 or features % 2:
            raise ValueError(f"an even number of features, 4 or more, expected; got {features}")
        half = features // 2
        frequencies = scale * torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float64) / (half - 1))
        self.frequencies = nn.Buffer(frequencies.float(), persistent=False)

    def forward(self, label: Tensor) -> Tensor:
        phase = label[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1).to(label.dtype)


class TimeEmbedding(nn.Module):
    """The noise label, and a condition vector where there is one, as the features every block reads.

    Args:
        channels: features of the positional embedding.
        features: output features.
        scale: see `PositionalEmbedding`.
        cond_features: length of the condition vector; 0 for an unconditional network.
    """

    def __init__(self, channels: int, features: int, scale: float = 1000.0, cond_features: int = 0):
        super().__init__()
        self.position = PositionalEmbedding(channels, scale)
        self.inner = linear(channels, features)
        self.outer = linear(features, features)
        self.cond = linear(cond_features, features) if cond_features else None

    def forward(self, label: Tensor, cond: Tensor | None) -> Tensor:
        if cond is not None and self.cond is None:
            raise ValueError("this network was built without a condition; pass cond=None or set cond_features")
        hidden = self.inner(self.position(label))
        if cond is not None and self.cond is not None:
            hidden = hidden + self.cond(cond)
        return F.silu(self.outer(F.silu(hidden)))


class ResidualBlock(nn.Module):
    """BigGAN's residual block (2011.13456, appendix H): norm, SiLU, resample, convolve, add time, and again.

    The output is (skip + update) / 2^(1/2), so that depth does not grow the variance.

    Args:
        dims: spatial dimensions, 1 to 3.
        in_channels, out_channels: of input and output.
        time_features: of the time embedding.
        resample: "down" halves the resolution (mean of 2), "up" doubles it (nearest); None keeps it.
        dropout: probability, before the second convolution.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        time_features: int,
        resample: str | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.dims, self.resample = dims, resample
        self.norm1, self.conv1 = group_norm(in_channels), convolution(dims, in_channels, out_channels)
        self.time = linear(time_features, out_channels)
        self.norm2, self.dropout = group_norm(out_channels), nn.Dropout(dropout)
        self.conv2 = convolution(dims, out_channels, out_channels, scale=0.0)
        changes = in_channels != out_channels or resample is not None
        self.skip = convolution(dims, in_channels, out_channels, kernel=1) if changes else nn.Identity()

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return POOLS[self.dims](x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(self._resampled(F.silu(self.norm1(x))))
        hidden = hidden + self.time(time).reshape(*hidden.shape[:2], *(1,) * self.dims)
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return (self.skip(self._resampled(x)) + hidden) * math.sqrt(0.5)


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions, added to its input, divided by 2^(1/2) (2011.13456, app. H)."""

    def __init__(self, dims: int, channels: int, heads: int = 1):
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels divisible by heads expected; got {channels} channels, {heads} heads")
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = convolution(dims, channels, 3 * channels, kernel=1)
        self.out = convolution(dims, channels, channels, kernel=1, scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        # (B, 3C, *space) -> three of (B, heads, positions, C / heads)
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, -1).transpose(3, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(1))
        return (x + self.out(mixed.transpose(2, 3).reshape(x.shape))) * math.sqrt(0.5)
