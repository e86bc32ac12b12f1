"""Magnitude-preserving residual blocks and attention of the U-Net of EDM2 (2312.02696, figure 21).

On the way down a residual block normalises the channels of each position; on the way up and in the middle it does not.
There are no group normalisations: `magnitude_layers` keeps the magnitude of the features near 1.
"""

from typing import Any

from torch import Tensor, nn

from scoresde.networks.layers import attend
from scoresde.networks.magnitude_layers import MagnitudeLayer, mix, normalise, silu
from scoresde.networks.resampling import Resample


class MagnitudeResidualBlock(nn.Module):
    """Resample; on the way down, project and normalise; SiLU, convolve, scale by time; SiLU, dropout, convolve; mix.

    Args:
        style: the `NetworkStyle` that all blocks share, with `magnitude`.
        in_channels, out_channels: channels of the input and of the output.
        resample: "down" halves the resolution, "up" doubles it, None keeps it.
    """

    def __init__(self, style: Any, in_channels: int, out_channels: int, resample: str | None = None):
        super().__init__()
        self.is_up, self.dims, self.weight = style.is_up, style.dims, style.magnitude.residual
        self.resample = Resample(style.dims, resample, style.fir) if resample else None
        self.conv1 = MagnitudeLayer(style.dims, in_channels if self.is_up else out_channels, out_channels)
        features = style.time_features
        self.time = MagnitudeLayer(0, features, out_channels, gain=True) if features else None
        self.dropout, self.conv2 = nn.Dropout(style.dropout), MagnitudeLayer(style.dims, out_channels, out_channels)
        is_changed = in_channels != out_channels
        self.skip = MagnitudeLayer(style.dims, in_channels, out_channels, kernel=1) if is_changed else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        if self.resample is not None:
            x = self.resample(x)
        if not self.is_up:
            x = normalise(x if self.skip is None else self.skip(x), 1)
        hidden = self.conv1(silu(x))
        if self.time is not None:
            scale = self.time(time) + 1
            hidden = hidden * scale.reshape(*scale.shape, *(1,) * self.dims).to(hidden.dtype)
        hidden = self.conv2(self.dropout(silu(hidden)))
        if self.is_up and self.skip is not None:
            x = self.skip(x)
        return mix(x, hidden, self.weight)


class MagnitudeAttention(nn.Module):
    """Multi-head attention from all positions to all positions, whose queries, keys and values have unit magnitude.

    Args:
        style: the `NetworkStyle` that all blocks share, with `magnitude`.
        channels: channels of the input and of the output.

    Raises:
        ValueError: `channels` is not a multiple of the number of heads.
    """

    def __init__(self, style: Any, channels: int):
        super().__init__()
        self.heads, self.weight = style.heads_of(channels), style.magnitude.attention
        self.qkv = MagnitudeLayer(style.dims, channels, 3 * channels, kernel=1)
        self.out = MagnitudeLayer(style.dims, channels, channels, kernel=1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend from x (B, C, *space) to itself; `context` is ignored."""
        parts = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1))
        query, key, value = normalise(parts, 3).transpose(3, 4).unbind(1)
        update = attend(query, key, value).transpose(1, 2).reshape(x.shape)
        return mix(x, self.out(update), self.weight)
