"""The linear layers and normalisations of the networks, for one, two or three spatial dimensions."""

import math
from collections.abc import Callable
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
    """A convolution that keeps the resolution, with fan-average uniform weights times `scale` and zero bias.

    Scale 0 makes a block start as its skip (2011.13456 initialises with a scale of 1e-10).
    """
    conv = CONVOLUTIONS[dims](in_channels, out_channels, kernel, padding=kernel // 2)
    return initialise(conv, scale)


def linear(in_features: int, out_features: int, scale: float = 1.0) -> nn.Linear:
    """A linear layer with fan-average uniform weights times `scale` and zero bias."""
    return initialise(nn.Linear(in_features, out_features), scale)


def initialise(layer: Layer, scale: float) -> Layer:
    """Variance-scaling initialisation of DDPM: uniform, fan average; returns the layer."""
    with torch.no_grad():
        weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
        nn.init.xavier_uniform_(weight, gain=math.sqrt(scale))
        nn.init.zeros_(bias)
    return layer


def group_norm(channels: int, group_size: int = 4, eps: float = 1e-6) -> nn.GroupNorm:
    """Group normalisation with 32 groups, or fewer that divide the channels, of at least `group_size` channels each."""
    most = min(MAX_GROUPS, max(channels // group_size, 1))
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=eps)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / features^(1/2)) value, each (B, heads, positions, features).

    The fused kernels have no forward-mode derivative and say so; then the kernel of plain operations takes over.
    """
    try:
        return F.scaled_dot_product_attention(query, key, value)
    except NotImplementedError:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value)


def checkpointed(module: nn.Module, *arguments: Any, active: bool) -> Tensor:
    """module(*arguments); where active and a gradient is wanted, recomputed in the backward pass instead of stored.

    (1604.06174.) torch.func.grad and vjp do not see through it; torch.autograd.grad does.
    """
    if active and torch.is_grad_enabled():
        return checkpoint(module, *arguments, use_reentrant=False)
    return module(*arguments)
