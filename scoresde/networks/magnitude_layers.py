r"""Layers that preserve the magnitude of features, the root mean square of their channels (EDM2, 2312.02696).

Each row w of a weight (all weights that make one output) is divided by its magnitude and by the root of its length n,

    y = gain / n^(1/2) \hat w x,        \hat w = w / (|w| / n^(1/2) + 1e-4),

so that uncorrelated inputs of unit magnitude give outputs of unit magnitude for every size of w (eq. 47). Layers
have no bias. In training mode, with gradients enabled, the stored weights are replaced by \hat w at the first
evaluation after each change (forced weight normalisation, eq. 66): the optimiser then turns w without growing it, and
the effective learning rate does not decay.

| function      | formula                                                       | equation |
| ------------- | ------------------------------------------------------------- | -------- |
| `normalise`   | x / (magnitude + 1e-4)                                        | 30       |
| `silu`        | silu(x) / 0.596                                               | 81       |
| `mix`         | ((1 - w) a + w b) / ((1 - w)^2 + w^2)^(1/2)                   | 88       |
| `concatenate` | [a, b], so scaled that both contribute in the ratio 1 - w : w | 103      |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Positive, Share, checked
from scoresde.tensors import at_least_float32

EPSILON = 1e-4
SILU_MAGNITUDE = 0.596  # root mean square of silu(x) for x from N(0, 1)
APPLY: Sequence[Any] = (F.linear, F.conv1d, F.conv2d, F.conv3d)


@checked
@dataclass(frozen=True)
class MagnitudeStyle:
    """The settings of the magnitude-preserving layers of a U-Net; the defaults are those of EDM2.

    Args:
        residual: weight of a residual block's update against its skip connection, 0 to 1, see `mix`.
        attention: weight of an attention's update against its skip connection.
        concatenation: weight of the features that come from the way down where both are concatenated.
        condition: weight of the conditions against the noise level.
        clip: largest absolute value of a block's output; None for no limit.
    """

    residual: Share = 0.3
    attention: Share = 0.3
    concatenation: Share = 0.5
    condition: Share = 0.5
    clip: Positive | None = 256.0


def normalise(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Return x / (m + 1e-4) with m the root mean square of x over `dims`, computed in at least float32."""
    norm = torch.linalg.vector_norm(at_least_float32(x), dim=dims, keepdim=True)
    return x / (norm * math.sqrt(norm.numel() / x.numel()) + EPSILON).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """Return silu(x) / 0.596, of unit magnitude for x from N(0, 1)."""
    return F.silu(x) / SILU_MAGNITUDE


def mix(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Return ((1 - w) a + w b) / ((1 - w)^2 + w^2)^(1/2), of unit magnitude if uncorrelated a and b have it."""
    return torch.lerp(a, b, weight) / math.hypot(1 - weight, weight)


def concatenate(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Return the channels of a and b, scaled to contribute in the ratio 1 - w : w to a magnitude of 1."""
    channels = a.shape[1], b.shape[1]
    scale = math.sqrt(sum(channels)) / math.hypot(1 - weight, weight)
    factors = scale * (1 - weight) / math.sqrt(channels[0]), scale * weight / math.sqrt(channels[1])
    return torch.cat([factors[0] * a, factors[1] * b], dim=1)


class MagnitudeWeight(nn.Module):
    """A module whose rows of `weight` have unit magnitude in use.

    `rows` are the dimensions of the weight over which the magnitude of a row is computed.
    """

    weight: Any
    rows: tuple[int, ...]

    def normalised(self) -> Tensor:
        """Return the weight with rows of unit magnitude; in training mode, store it, see the module docstring."""
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.force()
        return normalise(at_least_float32(self.weight), self.rows)

    @torch.no_grad()
    def force(self, always: bool = False) -> None:
        """Replace the stored weight by the normalised one, if it changed since the last call, or `always`.

        A change through `weight.data`, as by some optimisers, cannot be noticed. A weight that is not a parameter of
        its own (that of a `torch.func.functional_call`, or with adapters) stays.
        """
        weight = self.weight
        if isinstance(weight, nn.Parameter) and (always or weight._version != vars(self).get("version")):
            weight.copy_(normalise(at_least_float32(weight), self.rows))
            vars(self)["version"] = weight._version


class MagnitudeLayer(MagnitudeWeight):
    """A magnitude-preserving convolution that keeps the resolution, or a linear map.

    Args:
        dims: number of spatial dimensions; 0 for a linear map.
        in_channels, out_channels: channels of the input and of the output.
        kernel: width of the kernel.
        constant: if True, append a channel of ones to the input, which takes the place of a bias.
        gain: if True, multiply by a learned number, zero at first; if False, by 1.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        constant: bool = False,
        gain: bool = False,
    ):
        super().__init__()
        self.dims, self.constant, self.rows = dims, constant, tuple(range(1, 2 + dims))
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels + constant, *[kernel] * dims))
        self.gain = nn.Parameter(torch.zeros(1)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        if self.constant:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        gain = 1.0 if self.gain is None else self.gain
        weight = self.normalised()
        weight = weight * (gain / math.sqrt(weight[0].numel()))
        padding = {"padding": weight.shape[-1] // 2} if self.dims else {}
        return APPLY[self.dims](x, weight.to(x.dtype), **padding)


class MagnitudeTable(nn.Embedding, MagnitudeWeight):
    """An embedding of classes, (B,) -> (B, features); each feature has unit magnitude over the classes.

    It is a magnitude-preserving linear map of one-hot vectors times the root of the number of classes.
    """

    rows = (0,)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.normalised().to(self.weight.dtype))


def force_normalisation(model: nn.Module) -> None:
    """Normalise the stored weights of all magnitude-preserving layers of a model (2312.02696, section 2.3), in place.

    Training does so before each step; call it in a training loop of your own. Other layers are not changed.

    Args:
        model: any module, such as a `ScoreModel` of `networks.edm2`.
    """
    for module in model.modules():
        if isinstance(module, MagnitudeWeight):
            module.force(always=True)
