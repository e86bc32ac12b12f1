"""Layers that all networks share: initialised convolutions and linear maps, attention, feed-forward, checkpointing."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MAX_GROUPS = 32

Layer = TypeVar("Layer", bound=nn.Module)


def convolution(dims: int, in_channels: int, out_channels: int, kernel: int = 3, scale: float = 1.0) -> nn.Module:
    """Return a convolution that keeps the resolution, initialised by `initialise`.

    With scale=0 in its last layer, a block starts as its skip connection (2011.13456 uses a scale of 1e-10).
    """
    return initialise(CONVOLUTIONS[dims](in_channels, out_channels, kernel, padding=kernel // 2), scale)


def linear(in_features: int, out_features: int, scale: float = 1.0) -> nn.Linear:
    """Return a linear layer, initialised by `initialise`."""
    return initialise(nn.Linear(in_features, out_features), scale)


def cast_for(layer: Any, x: Tensor) -> Tensor:
    """Cast x to the dtype of a layer's weight."""
    return x.to(layer.weight.dtype)


def initialise(layer: Layer, scale: float) -> Layer:
    """Initialise a layer as in DDPM and return it: uniform weights of variance 2 scale / (fan_in + fan_out)."""
    nn.init.xavier_uniform_(layer.get_parameter("weight"), gain=math.sqrt(scale))
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer


def group_norm(channels: int, group_size: int = 4, eps: float = 1e-6) -> nn.GroupNorm:
    """Return a group normalisation with as many groups as possible: at most 32, of at least `group_size` channels each.

    With fewer than `group_size` channels there is one group.
    """
    most = min(MAX_GROUPS, max(channels // group_size, 1))
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=eps)


def spatial_sides(image_size: int | Sequence[int]) -> tuple[int, ...]:
    """Return the lengths of the spatial dimensions; an integer is the side of a square image.

    Raises:
        ValueError: there are not one, two or three positive lengths.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) not in CONVOLUTIONS or min(sides) < 1:
        raise ValueError(f"image_size must be one side or a list of 1 to 3 positive sides; got {image_size}")
    return sides


class Border:
    """Pad states (B, C, *sides) with zeros to sides that are multiples of a number, and crop them again.

    Args:
        image_size: see `spatial_sides`.
        multiple: the number that must divide each side.
        pad: if True, pad each side to the next multiple, with half of the zeros (rounded down) before the state; if
            False, refuse sides that are not multiples.

    Raises:
        ValueError: `image_size` is not valid, or a side is not a multiple of `multiple` and `pad` is False.
    """

    def __init__(self, image_size: int | Sequence[int], multiple: int, pad: bool):
        self.sides = spatial_sides(image_size)
        self.padded = tuple(-(-side // multiple) * multiple for side in self.sides)
        if self.padded != self.sides and not pad:
            raise ValueError(
                f"each side of image_size (without the channels) must be a multiple of {multiple}; got {image_size}: "
                f"set pad=True (network.pad=true in a configuration), which pads states to {list(self.padded)} with "
                "zeros and crops the output"
            )
        extra = [padded - side for padded, side in zip(self.padded, self.sides, strict=True)]
        self.margins = [margin for n in reversed(extra) for margin in (n // 2, n - n // 2)]  # as F.pad takes them

    def add(self, x: Tensor) -> Tensor:
        """Return x (B, C, *sides) with its border, (B, C, *padded)."""
        return F.pad(x, self.margins) if any(self.margins) else x

    def remove(self, x: Tensor) -> Tensor:
        """Return x (B, C, *padded) without the border, (B, C, *sides)."""
        return F.pad(x, [-margin for margin in self.margins]) if any(self.margins) else x


def patches_to_channels(x: Tensor, patch: int) -> Tensor:
    """Turn the pixels of patches into channels: (B, C, *sides) to (B, C patch^dims, *(sides / patch)).

    It is `torch.nn.functional.pixel_unshuffle` in any number of dimensions.
    """
    dims = x.ndim - 2
    cells = x.reshape(*x.shape[:2], *(n for side in x.shape[2:] for n in (side // patch, patch)))
    grid = range(2, 2 + 2 * dims, 2)
    return cells.permute(0, 1, *(axis + 1 for axis in grid), *grid).flatten(1, 1 + dims)


def channels_to_patches(x: Tensor, patch: int) -> Tensor:
    """Invert `patches_to_channels`: (B, C patch^dims, *grid) to (B, C, *(patch * grid))."""
    dims = x.ndim - 2
    cells = x.unflatten(1, (-1, *[patch] * dims))
    order = [axis for i in range(2, 2 + dims) for axis in (i + dims, i)]
    return cells.permute(0, 1, *order).reshape(*cells.shape[:2], *(patch * side for side in x.shape[2:]))


def check_shape(x: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless the states x have the shape (B, *shape)."""
    if x.shape[1:] != tuple(shape):
        raise ValueError(
            f"expected states of shape (B, {', '.join(map(str, shape))}); got {tuple(x.shape)}: build the network for "
            "the shape of the data; in a configuration, set network=mlp (any shape), series, images or volumes, or "
            "experiment=table, series, images, image_arrays or volumes"
        )


def split_heads(features: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split features (B, positions, parts * C) into `parts` tensors (B, heads, positions, C / heads)."""
    return features.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(query key^T / C^(1/2)) value, with the heads concatenated: (B, positions, heads C).

    query, key and value have shape (B, heads, positions, C).
    `mask` is True for the keys that take part; it broadcasts to (B, heads, positions of the queries, of the keys). None
    for all.

    The fused kernels raise NotImplementedError in forward-mode differentiation; unfused operations then replace them.
    """
    try:
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
    except NotImplementedError:
        with sdpa_kernel(SDPBackend.MATH):
            mixed = F.scaled_dot_product_attention(query, key, value, mask)
    return mixed.transpose(1, 2).flatten(2)


def context_mask(context: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask of context vectors (B, L, F) for `attend`, and which samples have none, (B, 1, 1).

    Vectors that hold NaN are padding. A sample without vectors attends to all of them, so that its softmax is defined:
    discard its result.
    """
    known = ~context.isnan().any(dim=2)
    is_null = ~known.any(dim=1)[:, None]
    return (known | is_null)[:, None, None], is_null[:, None]


class TokenAttention(nn.Module):
    """Multi-head self-attention over tokens, (B, N, width) -> (B, N, width); `mask` is that of `attend`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = linear(width, 3 * width), linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = split_heads(self.qkv(tokens), 3, self.heads)
        return self.proj(attend(query, key, value, mask))


class ContextAttention(nn.Module):
    """Add multi-head attention from tokens (B, N, width) to context vectors (B, L, features), zero at initialisation.

    Context vectors that hold NaN are left out. A sample whose context vectors all hold NaN stays unchanged.
    """

    def __init__(self, width: int, heads: int, features: int):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.query, self.context = linear(width, width), linear(features, 2 * width)
        self.out = linear(width, width, scale=0.0)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        mask, is_null = context_mask(context)
        (query,) = split_heads(self.query(self.norm(tokens)), 1, self.heads)
        key, value = split_heads(self.context(cast_for(self.context, context.nan_to_num())), 2, self.heads)
        return tokens + self.out(attend(query, key, value, mask)).masked_fill(is_null, 0.0)


class FeedForward(nn.Module):
    """The feed-forward layer W2 gelu(W1 x), with the tanh approximation of the GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.inner, self.outer = linear(width, hidden), linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.outer(F.gelu(self.inner(tokens), approximate="tanh"))


def checkpointed(module: Callable[..., Tensor], *arguments: Any, active: bool) -> Tensor:
    """Return module(*arguments); if active, recompute activations in the backward pass instead of storing them.

    (Method: 1604.06174.) `torch.func.grad` and `vjp` do not support checkpointing; `torch.autograd.grad` does.
    """
    if active and torch.is_grad_enabled():
        return checkpoint(module, *arguments, use_reentrant=False)
    return module(*arguments)
