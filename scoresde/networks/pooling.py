"""Pools of a noise-conditional classifier: the features of an encoder (B, C, *space) become logits (B, K).

| class           | logits                                                                | in guided-diffusion     |
| --------------- | --------------------------------------------------------------------- | ----------------------- |
| `AveragePool`   | linear map of the mean over positions                                 | "adaptive"              |
| `AttentionPool` | attention of the mean to all positions (2103.00020, section 2.4)      | "attention"             |
| `SkipPool`      | two layers on the means of the outputs of all blocks                  | "spatial", "spatial_v2" |

A pool reads a list of tensors: the features after the input layer, after every block and every downsampling on the way
down, and after the middle. All pools except `SkipPool` use only the last tensor.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Count, checked
from scoresde.networks.blocks import NetworkStyle
from scoresde.networks.layers import attend, linear, split_heads


@checked
class AveragePool(nn.Module):
    """Norm, SiLU, mean over the positions, linear map.

    Args:
        style: the settings that all blocks share.
        sides: sides of the coarsest resolution; unused.
        channels: number of channels of each tensor in the list that the pool reads.
        classes: number of classes K.
    """

    def __init__(self, style: NetworkStyle, sides: Sequence[Count], channels: Sequence[Count], classes: Count):
        super().__init__()
        self.norm, self.linear = style.norm(channels[-1]), linear(channels[-1], classes, scale=0.0)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return logits (B, K) from the last tensor of the list, the features (B, C, *space) after the middle."""
        return self.linear(F.silu(self.norm(features[-1])).flatten(2).mean(dim=2))


@checked
class AttentionPool(nn.Module):
    """Norm, SiLU, attention with the mean over the positions as the query, linear map.

    This is the pool of CLIP (2103.00020, section 2.4) as ADM uses it. Keys and values come from the mean and from all
    positions, in this order, after a learned embedding is added to each of them. `style` sets the number of heads, as
    for attention in the blocks.

    Args:
        style: the settings that all blocks share.
        sides: sides of the coarsest resolution.
        channels: number of channels of each tensor in the list that the pool reads.
        classes: number of classes K.

    Raises:
        ValueError: the channels are not a multiple of the number of heads.
    """

    def __init__(self, style: NetworkStyle, sides: Sequence[Count], channels: Sequence[Count], classes: Count):
        super().__init__()
        width = channels[-1]
        self.heads, self.norm = style.heads_of(width), style.norm(width)
        self.positions = nn.Parameter(torch.randn(math.prod(sides) + 1, width) / math.sqrt(width))
        self.qkv, self.linear = linear(width, 3 * width), linear(width, classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return logits (B, K) from the last tensor of the list, the features (B, C, *space) after the middle."""
        tokens = F.silu(self.norm(features[-1])).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positions
        query, key, value = split_heads(self.qkv(tokens), 3, self.heads)
        return self.linear(attend(query[:, :, :1], key, value)[:, 0])


@checked
class SkipPool(nn.Module):
    """Means over the positions of the outputs of all blocks, linear map, activation, linear map.

    Args:
        style: the settings that all blocks share.
        sides: sides of the coarsest resolution; unused.
        channels: number of channels of each tensor in the list that the pool reads.
        classes: number of classes K.
        normalise: if True, a group normalisation and SiLU follow the first layer ("spatial_v2"); if False, ReLU does.
        hidden: number of features between the two layers.
    """

    def __init__(
        self,
        style: NetworkStyle,
        sides: Sequence[Count],
        channels: Sequence[Count],
        classes: Count,
        normalise: bool = False,
        hidden: Count = 2048,
    ):
        super().__init__()
        self.inner = linear(sum(channels), hidden)
        self.norm = style.norm(hidden) if normalise else None
        self.linear = linear(hidden, classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return logits (B, K) of a list of features (B, C_i, *space_i)."""
        hidden = self.inner(torch.cat([part.flatten(2).mean(dim=2) for part in features], dim=1))
        return self.linear(F.relu(hidden) if self.norm is None else F.silu(self.norm(hidden)))
