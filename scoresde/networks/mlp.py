"""A noise-conditional network for vectors: residual layers with time features."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Count, CountOrZero, Layers, Positive, Share, checked
from scoresde.configured import Configured
from scoresde.networks.condition_embeddings import Classes, ImageCondition
from scoresde.networks.embeddings import PositionalEmbedding, TimeEmbedding
from scoresde.networks.layers import cast_for, check_shape, linear
from scoresde.networks.text_encoder import TextStyle
from scoresde.protocols import Condition


class ResidualLayer(nn.Module):
    """The layer x + W2 silu(W1 silu(norm(x)) + W_t time), with W2 zero at initialisation."""

    def __init__(self, width: int, time_features: int, dropout: float):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), linear(width, width)
        self.time, self.dropout = linear(time_features, width), nn.Dropout(dropout)
        self.outer = linear(width, width, scale=0.0)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.inner(F.silu(self.norm(x))) + self.time(time)
        return x + self.outer(self.dropout(F.silu(hidden)))


@checked
class MLP(nn.Module, Configured):
    """A residual multilayer perceptron for states of any shape, flattened to vectors.

    Args:
        shape: shape `*` of one state; an integer is the length of a vector.
        width: number of hidden features.
        depth: number of residual layers.
        dropout: dropout probability in the residual layers.
        time_scale: highest frequency of the embedding of the noise label, see `PositionalEmbedding`.
        classes: number of classes, 0 for none; for several labels, a dict from name to number of classes.
        cond_features: length of the condition vector; 0 for none.
        cond_channels: number of channels of the condition image, see `ImageCondition`: for states (B, C, *space) it is
            (B, cond_channels, *space), for vectors (B, cond_channels); 0 for none.
        out_channels: first dimension of the output of one state, whose other dimensions are those of `shape`; default:
            that of `shape`.
        text: the text encoder, trained with the network, of which only the pooled vector is used; None for none.
    """

    casts_inputs = True

    def __init__(
        self,
        shape: Count | Sequence[Count],
        width: Count = 128,
        depth: Layers = 3,
        dropout: Share = 0.0,
        time_scale: Positive = 1000.0,
        classes: Classes = 0,
        cond_features: CountOrZero = 0,
        cond_channels: CountOrZero = 0,
        out_channels: Count | None = None,
        text: TextStyle | None = None,
    ):
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = math.prod(self.shape)
        position = PositionalEmbedding(width, time_scale)
        self.time = TimeEmbedding(position, width, width, classes, cond_features, text=text)
        self.conditions = self.time.cond.parts + ([] if text is None else ["text"])
        self.input, size_of_image = linear(size, width), cond_channels * math.prod(self.shape[1:])
        self.image: ImageCondition | None = None
        if cond_channels:
            layer = nn.Linear(size_of_image, width, bias=False)
            self.image = ImageCondition(layer, (cond_channels, *self.shape[1:]), partial(torch.flatten, start_dim=1))
            self.conditions.append("image")
        self.layers = nn.ModuleDict({f"layer{i}": ResidualLayer(width, width, dropout) for i in range(depth)})
        self.out_shape = (out_channels or self.shape[0], *self.shape[1:])
        self.norm, self.output = nn.LayerNorm(width), linear(width, math.prod(self.out_shape), scale=0.0)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """Return (B, out_channels, ...) at states x (B, *), noise labels (B,) and a condition."""
        check_shape(x, self.shape)
        parts = self.time.named(cond, self.conditions)
        time, hidden = self.time(c_noise, parts), self.input(cast_for(self.input, x.flatten(1)))
        hidden = hidden if self.image is None else self.image(hidden, parts)
        for layer in self.layers.values():
            hidden = layer(hidden, time)
        return self.output(F.silu(self.norm(hidden))).reshape(-1, *self.out_shape)
