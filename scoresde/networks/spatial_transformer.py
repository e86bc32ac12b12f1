"""Transformer blocks inside a U-Net, as in latent diffusion (2112.10752, appendix E.2.1), and a class as a context.

For features h (B, C, *space), as tokens (B, positions, C), and context vectors y (B, L, context_features):

    h_1 = h + attention(norm(h)),   h_2 = h_1 + attention(norm(h_1), y),   h_3 = h_2 + GEGLU(norm(h_2)),

between two linear maps of the channels, inside a skip connection. GEGLU (2002.05202) is W (a gelu(b)), where (a, b) is
a linear map to 8 C channels. Without a context, the second attention reads the tokens themselves.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Count, checked
from scoresde.networks.blocks import NetworkStyle
from scoresde.networks.layers import attend, context_mask, convolution, linear, split_heads
from scoresde.protocols import Condition, by_name


class TransformerAttention(nn.Module):
    """Multi-head attention of normalised tokens to themselves, or to context vectors; only the last layer has a bias.

    Context vectors that hold NaN are left out; a sample whose context vectors all hold NaN attends to nothing.
    """

    def __init__(self, channels: int, heads: int, context_features: int = 0):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(channels)
        entering = context_features or channels
        self.query = nn.Linear(channels, channels, bias=False)
        self.key, self.value = (nn.Linear(entering, channels, bias=False) for _ in range(2))
        self.out = linear(channels, channels)

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        tokens = self.norm(tokens)
        source, mask, is_null = tokens, None, None
        if context is not None:
            source, (mask, is_null) = context.nan_to_num(), context_mask(context)
        (query,), (key,), (value,) = (
            split_heads(part, 1, self.heads) for part in (self.query(tokens), self.key(source), self.value(source))
        )
        update = self.out(attend(query, key, value, mask))
        return update if is_null is None else update.masked_fill(is_null, 0.0)


@checked
class SpatialTransformer(nn.Module):
    """Self-attention, attention to a context, and a feed-forward layer (2112.10752, appendix E.2.1).

    In a `BlockStyle` it is `attention_block=SpatialTransformer`.

    Args:
        style: the settings that all blocks share.
        channels: channels of the input and of the output.

    Raises:
        ValueError: `channels` is not a multiple of the number of heads.
    """

    def __init__(self, style: NetworkStyle, channels: int):
        super().__init__()
        heads, dims = style.heads_of(channels), style.dims
        self.context_features = style.context_features
        self.norm = style.norm(channels)
        self.enter = convolution(dims, channels, channels, kernel=1)
        self.attention = TransformerAttention(channels, heads)
        self.cross = TransformerAttention(channels, heads, style.context_features)
        self.feed = nn.ModuleDict(
            {
                "norm": nn.LayerNorm(channels),
                "enter": linear(channels, 8 * channels),
                "out": linear(4 * channels, channels),
            }
        )
        self.leave = convolution(dims, channels, channels, kernel=1, scale=0.0)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Transform x (B, C, *space), given context vectors (B, L, context_features) or none."""
        tokens = self.enter(self.norm(x)).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens)
        if context is not None or not self.context_features:
            tokens = tokens + self.cross(tokens, context)
        value, gate = self.feed["enter"](self.feed["norm"](tokens)).chunk(2, dim=2)
        tokens = tokens + self.feed["out"](value * F.gelu(gate))
        return x + self.leave(tokens.transpose(1, 2).reshape(x.shape))


@checked
class LabelContext(nn.Module):
    """A network whose context is an embedding of the class label, as in class-conditional latent diffusion.

    Args:
        network: a network with the condition "context", such as a `UNet` with `context_features=features`.
        classes: number of classes; the null label -1 has an embedding of its own.
        features: length of the context vector.
    """

    def __init__(self, network: nn.Module, classes: Count, features: Count):
        super().__init__()
        self.network, self.classes, self.conditions = network, classes, ["label"]
        self.embedding = nn.Embedding(classes + 1, features)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """Return the output of the network for labels (B,), or for the null label without a condition."""
        label = by_name(cond).get("label", torch.full((len(x),), -1, device=x.device))
        context = self.embedding(label.long() % (self.classes + 1))[:, None]
        return self.network(x, c_noise, {"context": context})
