r"""The diffusion transformer, DiT with adaLN-Zero (2212.09748, section 3.2), for one, two or three spatial dimensions.

    tokens  h_0 = patches(x) + positions,     features  c = silu(time(c_noise) + label + vector)
    block   h  <-  h + gate_1 * attention((1 + scale_1) * norm(h) + shift_1)
            h  <-  h + attention to the context, if there is one (PixArt-alpha, 2310.00426, section 2.3)
            h  <-  h + gate_2 * mlp((1 + scale_2) * norm(h) + shift_2)
    output  F(x, c_noise)  =  unpatchify(W ((1 + scale) * norm(h) + shift))

with every shift, scale and gate linear in c. These linear maps, the output of the attention to the context and W are
zero at initialisation: each block starts as the identity and the network as zero. The embeddings of the positions are
fixed: for every axis, from the last to the first (the order of the published weights), sin and cos of the index along
it at n frequencies 10^(-4k/n), k = 0..n-1.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from scoresde.arguments import Count, CountOrZero, Layers, Positive, Share, checked
from scoresde.configured import Configured
from scoresde.networks.condition_embeddings import Classes, Conditions, ImageCondition, context_of
from scoresde.networks.embeddings import PositionalEmbedding, TimeEmbedding
from scoresde.networks.layers import (
    CONVOLUTIONS,
    Border,
    ContextAttention,
    FeedForward,
    TokenAttention,
    cast_for,
    check_shape,
    checkpointed,
    linear,
)
from scoresde.networks.text_encoder import TextStyle
from scoresde.protocols import Condition
from scoresde.tensors import FullPrecision

LABEL_FEATURES = 256


def frequencies(count: int) -> Tensor:
    """Return 10^(-4k/count) for k = 0..count-1, (count,) in float64; they include 1 and exclude 10^-4."""
    return torch.exp(-math.log(1e4) / count * torch.arange(count, dtype=torch.float64))


def positions(grid: Sequence[int], width: int) -> Tensor:
    """Return the fixed embedding of every cell of a grid in row-major order, (prod(grid), width) in float32."""
    axes = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    phases = [axis.reshape(-1, 1) * frequencies(width // (2 * len(grid))) for axis in reversed(axes)]
    return torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], dim=1).float()


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: int) -> Tensor:
    """Reshape tokens (B, prod(grid), patch^dims C), channels last, to states (B, C, *(patch * grid))."""
    dims = len(grid)
    cells = tokens.reshape(tokens.shape[0], *grid, *[patch] * dims, -1)
    order = [axis for i in range(1, dims + 1) for axis in (i, i + dims)]
    return cells.permute(0, -1, *order).reshape(tokens.shape[0], -1, *(patch * side for side in grid))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return (1 + scale) x + shift."""
    return x * (1 + scale) + shift


def layer_norm(width: int) -> nn.LayerNorm:
    """Return a layer normalisation without parameters: shift and scale come from the condition."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class Positions(FullPrecision):
    """Add the fixed embedding of the cells of a grid to tokens (B, prod(grid), width), see `positions`."""

    def __init__(self, grid: Sequence[int], width: int):
        super().__init__()
        self.values = nn.Buffer(positions(grid, width), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.values.to(tokens.dtype)


class DiTBlock(nn.Module):
    """Attention and a feed-forward layer, each modulated and gated by the features c (2212.09748, section 3.2).

    Args:
        width: length of the tokens (B, N, width) and of the features c (B, width), see the module docstring.
        heads: number of attention heads.
        hidden: number of hidden features of the feed-forward layer.
        dropout: dropout probability of the outputs of the attention and of the feed-forward layer.
        context_features: length of the context vectors; 0 for none.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0, context_features: int = 0):
        super().__init__()
        self.norm1, self.attention = layer_norm(width), TokenAttention(width, heads)
        self.norm2, self.mlp = layer_norm(width), FeedForward(width, hidden)
        self.modulation = linear(width, 6 * width, scale=0.0)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.cross = ContextAttention(width, heads, context_features) if context_features else None

    def forward(self, tokens: Tensor, features: Tensor, context: Tensor | None = None) -> Tensor:
        modulation = self.modulation(features)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)
        update = self.attention(modulate(self.norm1(tokens), shift1, scale1))
        tokens = tokens + gate1 * self.dropout(update)
        if self.cross is not None and context is not None:
            tokens = self.cross(tokens, context)
        update = self.mlp(modulate(self.norm2(tokens), shift2, scale2))
        return tokens + gate2 * self.dropout(update)


class FinalLayer(nn.Module):
    """Modulate tokens (B, N, width) and map them to patch values (B, N, out_features), zero at initialisation."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.norm, self.modulation = layer_norm(width), linear(width, 2 * width, scale=0.0)
        self.output = linear(width, out_features, scale=0.0)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        shift, scale = self.modulation(features)[:, None].chunk(2, dim=2)
        return self.output(modulate(self.norm(tokens), shift, scale))


@checked
class DiT(nn.Module, Configured):
    """A noise-conditional transformer on the patches of (B, C, *space), with adaLN-Zero blocks (2212.09748).

    Reverse-mode, forward-mode and forward-over-reverse differentiation need no settings. Reverse over reverse needs
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around the call, because the fused attention kernels have no
    second derivative. `torch.func.grad` and `vjp` do not support checkpointing; `torch.autograd.grad` does.

    Args:
        image_size: side of a square image, or the lengths of one, two or three spatial dimensions.
        channels: channels of the state.
        patch: side of a patch.
        width: number of features of a token.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: number of hidden features of the feed-forward layers, in multiples of `width`.
        time_scale: factor that multiplies the noise label before its embedding; 1000 maps labels in [0, 1] to about the
            range of the paper's labels, 0 to 999.
        classes: number of classes, 0 for none; for several labels, a dict from name to number of classes.
        cond_features: length of the condition vector; 0 for none.
        dropout: dropout probability in the blocks.
        out_channels: channels of the output; default: those of the state (a learned variance needs twice as many).
        checkpointing: if True, store only the tokens between blocks, and recompute each block in the backward pass.
        pad: if True, pad states with zeros to multiples of `patch` and crop the output; if False, refuse an
            `image_size` that is not a multiple of `patch`.
        cond_channels: number of channels of the condition image, see `ImageCondition`; 0 for none.
        context_features: length of the context vectors that every block attends to; 0 for none.
        text: the text encoder, trained with the network, see `Conditions`; None for none.

    Raises:
        ValueError: a side is not a multiple of `patch` and `pad` is False, or `width` is not a multiple of `heads` and
            of twice the number of spatial dimensions.
    """

    casts_inputs = True

    def __init__(
        self,
        image_size: Count | Sequence[Count],
        channels: Count,
        patch: Count = 2,
        width: Count = 384,
        depth: Layers = 12,
        heads: Count = 6,
        mlp_ratio: Positive = 4.0,
        time_scale: Positive = 1000.0,
        classes: Classes = 0,
        cond_features: CountOrZero = 0,
        dropout: Share = 0.0,
        out_channels: Count | None = None,
        checkpointing: bool = False,
        pad: bool = False,
        cond_channels: CountOrZero = 0,
        context_features: CountOrZero = 0,
        text: TextStyle | None = None,
    ):
        super().__init__()
        given = Conditions(classes, cond_features, context_features, cond_channels=cond_channels, text=text)
        self.border = Border(image_size, patch, pad)
        dims = len(self.border.sides)
        if width % (2 * dims) or width % heads:
            raise ValueError(
                f"width must be a multiple of {2 * dims} (twice the number of spatial dimensions) and of "
                f"heads={heads}; got width={width}: change width or heads"
            )
        self.shape, self.patch, self.checkpointing = (channels, *self.border.sides), patch, checkpointing
        self.grid = tuple(side // patch for side in self.border.padded)
        self.input = CONVOLUTIONS[dims](channels, width, patch, stride=patch)
        nn.init.xavier_uniform_(self.input.get_parameter("weight").detach().flatten(1))  # as a linear layer on patches
        nn.init.zeros_(self.input.get_parameter("bias"))
        self.positions = Positions(self.grid, width)
        position = PositionalEmbedding(LABEL_FEATURES, time_scale, endpoint=False)
        self.time = TimeEmbedding(position, LABEL_FEATURES, width, classes, cond_features, text=text)
        self.conditions, self.context_features = [*self.time.cond.parts, *given.sequences], given.context_width
        self.image: ImageCondition | None = None
        if cond_channels:
            patches = CONVOLUTIONS[dims](cond_channels, width, patch, stride=patch, bias=False)
            self.image = ImageCondition(patches, (cond_channels, *self.border.sides), self.border.add)
            self.conditions.append("image")
        for layer in (self.time.inner, self.time.outer, *self.time.cond.tables.values()):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        hidden = int(mlp_ratio * width)
        block = partial(DiTBlock, width, heads, hidden, dropout, given.context_width)
        self.blocks = nn.ModuleDict({f"block{i}": block() for i in range(depth)})
        self.final = FinalLayer(width, patch**dims * (out_channels or channels))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """Return (B, out_channels, *space) at x (B, C, *space), noise labels (B,) and a condition."""
        check_shape(x, self.shape)
        parts = self.time.named(cond, self.conditions)
        features, cells = self.time(c_noise, parts), self.input(cast_for(self.input, self.border.add(x)))
        cells = cells if self.image is None else self.image(cells, parts)
        tokens, context = (
            self.positions(cells.flatten(2).transpose(1, 2)),
            context_of(parts, len(x), self.context_features),
        )
        for block in self.blocks.values():
            tokens = checkpointed(block, tokens, features, context, active=self.checkpointing)
        return self.border.remove(unpatchify(self.final(tokens, features), self.grid, self.patch))


def dit_s(
    image_size: int | Sequence[int] = 32, channels: int = 4, patch: int = 2, **options: Annotated[Any, DiT]
) -> DiT:
    """Return DiT-S (2212.09748, table 1): 384 features, 12 blocks, 6 heads; 33M parameters with patch 2.

    Args:
        image_size: side of a square image, or the lengths of one, two or three spatial dimensions.
        channels: channels of the state.
        patch: side of a patch.
        options: other arguments of `DiT`, such as classes=1000.
    """
    return DiT(image_size, channels, patch, width=384, depth=12, heads=6, **options)


def dit_b(
    image_size: int | Sequence[int] = 32, channels: int = 4, patch: int = 2, **options: Annotated[Any, DiT]
) -> DiT:
    """Return DiT-B (2212.09748, table 1): 768 features, 12 blocks, 12 heads; 130M parameters with patch 2.

    Args:
        image_size: side of a square image, or the lengths of one, two or three spatial dimensions.
        channels: channels of the state.
        patch: side of a patch.
        options: other arguments of `DiT`, such as classes=1000.
    """
    return DiT(image_size, channels, patch, width=768, depth=12, heads=12, **options)


def dit_l(
    image_size: int | Sequence[int] = 32, channels: int = 4, patch: int = 2, **options: Annotated[Any, DiT]
) -> DiT:
    """Return DiT-L (2212.09748, table 1): 1,024 features, 24 blocks, 16 heads; 458M parameters with patch 2.

    Args:
        image_size: side of a square image, or the lengths of one, two or three spatial dimensions.
        channels: channels of the state.
        patch: side of a patch.
        options: other arguments of `DiT`, such as classes=1000.
    """
    return DiT(image_size, channels, patch, width=1024, depth=24, heads=16, **options)


def dit_xl(
    image_size: int | Sequence[int] = 32, channels: int = 4, patch: int = 2, **options: Annotated[Any, DiT]
) -> DiT:
    """Return DiT-XL (2212.09748, table 1): 1,152 features, 28 blocks, 16 heads; 675M parameters with patch 2.

    Args:
        image_size: side of a square image, or the lengths of one, two or three spatial dimensions.
        channels: channels of the state.
        patch: side of a patch.
        options: other arguments of `DiT`, such as classes=1000.
    """
    return DiT(image_size, channels, patch, width=1152, depth=28, heads=16, **options)
