"""Invertible transforms between data space and model space, with their log-determinants.

A transform T maps data x (B, *) to model space; `inverse` undoes it; `log_det` is log|det dT/dx| per sample, in nats:
log p_data(x) = log p_model(T(x)) + log_det(x).

Integer states are first converted to floating-point numbers (`tensors.floating`). A transform may have the attribute
`levels`: the number of grey levels 0 .. levels - 1 of the data.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.protocols import Transform
from scoresde.tensors import dimensions, float64, floating

RESOLUTION = 0.01  # largest accepted distance between neighbouring numbers of a dtype, in units of the data's std


@checked
@dataclass(frozen=True)
class Affine:
    """x -> scale x + shift.

    `inverse` returns float64 if the dtype of y is too coarse for values of unit scale near `shift`, such as float32 for
    a shift beyond 8e4.

    Raises:
        ValueError: the scale is zero.
    """

    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self):
        if self.scale == 0:
            raise ValueError("scale must not be zero: a transform with scale=0 is not invertible")

    def __call__(self, x: Tensor) -> Tensor:
        """Map to model space, (B, *)."""
        return self.scale * floating(x) + self.shift

    def inverse(self, y: Tensor) -> Tensor:
        """Map back to data space, (B, *)."""
        y = floating(y)
        if torch.finfo(y.dtype).eps * abs(self.shift) > RESOLUTION:
            y = float64(y)
        return (y - self.shift) / self.scale

    def log_det(self, x: Tensor) -> Tensor:
        """Return d log|scale| for d dimensions, in nats (B,), float64."""
        value = dimensions(x) * math.log(abs(self.scale))
        return torch.full((x.shape[0],), value, dtype=torch.float64, device=x.device)


@checked
@dataclass(frozen=True)
class Levels(Affine):
    """Map grey levels 0 .. levels - 1, each an interval [x, x + 1), to [low, high] in model space.

    A dequantised image has the values x + u with u in [0, 1), which fill [0, levels). The map is therefore
    x -> low + (high - low) x / levels.

    Args:
        levels: number of grey levels (256 for 8 bits).
        low, high: the range in model space.
    """

    scale: float = field(init=False, repr=False)
    shift: float = field(init=False, repr=False)
    levels: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self):
        if self.levels < 2 or not self.low < self.high:
            raise ValueError(f"levels >= 2 and low < high are required; got {self}")
        object.__setattr__(self, "scale", (self.high - self.low) / self.levels)
        object.__setattr__(self, "shift", self.low)

    def quantise(self, y: Tensor) -> Tensor:
        """Return the grey level of each value in model space, clipped to 0 .. levels - 1."""
        y = floating(y)
        rounding = 4 * self.levels * torch.finfo(y.dtype).eps  # the inverse of a level may lie slightly below it
        return (self.inverse(y) + rounding).floor().clamp(0, self.levels - 1)


@checked
@dataclass(frozen=True)
class Logit:
    """Map (low, high) to the real line: x -> logit(p) with p = margin + (1 - 2 margin) (x - low) / (high - low).

    RealNVP (1605.08803, section 4.1) uses margin 0.05.
    """

    low: float = 0.0
    high: float = 1.0
    margin: float = 0.05

    def __post_init__(self):
        if not self.low < self.high or not 0 <= self.margin < 0.5:
            raise ValueError(f"low < high and 0 <= margin < 0.5 are required; got {self}")

    def _fraction(self, x: Tensor) -> Tensor:
        return self.margin + (1 - 2 * self.margin) * (floating(x) - self.low) / (self.high - self.low)

    def __call__(self, x: Tensor) -> Tensor:
        """Map to the real line, (B, *)."""
        return torch.logit(self._fraction(x))

    def inverse(self, y: Tensor) -> Tensor:
        """Map back to (low, high), (B, *)."""
        fraction = (torch.sigmoid(floating(y)) - self.margin) / (1 - 2 * self.margin)
        return self.low + (self.high - self.low) * fraction

    def log_det(self, x: Tensor) -> Tensor:
        """Return the sum of log(dp/dx) - log(p (1 - p)) over the dimensions, in nats (B,), float64."""
        p = self._fraction(float64(x))
        slope = math.log((1 - 2 * self.margin) / (self.high - self.low))
        return (slope - torch.log(p) - torch.log1p(-p)).flatten(1).sum(dim=1)


class Compose:
    """A sequence of transforms; their log-determinants add.

    Args:
        transforms: the transforms, the first to be applied first.
    """

    def __init__(self, transforms: Sequence[Transform]):
        self.transforms = list(transforms)
        for i, transform in enumerate(self.transforms):
            check_instance(f"transforms[{i}]", transform, "__call__", "inverse", "log_det")

    @property
    def levels(self) -> int | None:
        """Number of grey levels of the data, as the first transform declares it; None if it does not."""
        return getattr(self.transforms[0], "levels", None) if self.transforms else None

    def __call__(self, x: Tensor) -> Tensor:
        """Map to model space, (B, *)."""
        for transform in self.transforms:
            x = transform(x)
        return x

    def inverse(self, y: Tensor) -> Tensor:
        """Map back to data space, (B, *)."""
        for transform in reversed(self.transforms):
            y = transform.inverse(y)
        return y

    def log_det(self, x: Tensor) -> Tensor:
        """Return the sum of the log-determinants, in nats (B,), float64."""
        total = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        for transform in self.transforms:
            total = total + transform.log_det(x)
            x = transform(x)
        return total

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(str, self.transforms))})"
