"""Transforms between data space and model space, and their costs in nats: log-determinants, or bounds.

A transform T maps data x (B, *) to model space; `inverse` undoes it; `log_det` is log|det dT/dx| per sample, in nats:
log p_data(x) = log p_model(T(x)) + log_det(x).

A transform that is not invertible, such as an autoencoder (`pipelines.latent`), draws the state y from q(y | x). In
place of `log_det` it has `encode(x, stream)`, which draws y, and `draw(x, stream)`, which also returns terms in nats,

    log p_data(x) >= E_{y ~ q(y | x)} [ log p_model(y) + sum of the terms ].

The functions `encode` and `draw` of this module do the same for every transform.

Integer states are first converted to floating-point numbers (`tensors.floating`). A transform may have the attribute
`levels`: the number of grey levels 0 .. levels - 1 of the data.

The result is float64 if the argument's dtype is too coarse: if neighbouring numbers are more than 1/100 apart, in units
of a grey level (`Levels`), of the range high - low (`Logit`) or of model space (`Affine`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.arguments import checked
from scoresde.configured import Configured
from scoresde.protocols import Transform
from scoresde.random_stream import RandomStream
from scoresde.tensors import check_instance, dimensions, float64, floating

CHANGE = "change_of_variables"
RESOLUTION = 0.01  # largest accepted distance of neighbouring numbers of a dtype, relative to the scale of the data


def encode(transform: Transform, x: Tensor, stream: RandomStream) -> Tensor:
    """Return the state (B, *) of data x: T(x), or a draw of q(y | x)."""
    method = getattr(transform, "encode", None)
    return transform(x) if method is None else method(x, stream)


def draw(transform: Transform, x: Tensor, stream: RandomStream) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the state (B, *) of data x, and the terms of its change of log-density by name, in nats (B,), float64."""
    method = getattr(transform, "draw", None)
    return (transform(x), {CHANGE: transform.log_det(x)}) if method is None else method(x, stream)


def _resolved(x: Tensor, largest: float) -> Tensor:
    """Convert x to floating point, and to float64 if numbers of its dtype near `largest` are over 1/100 apart."""
    x = floating(x)
    return float64(x) if torch.finfo(x.dtype).eps * largest > RESOLUTION else x


def _refuse_nonfinite(transform: "Affine | Logit", *names: str) -> None:
    """Raise ValueError if one of these arguments is NaN or infinite."""
    if any(not math.isfinite(getattr(transform, name)) for name in names):
        raise ValueError(f"{', '.join(names)} must be finite; got {transform}")


@checked
@dataclass(frozen=True)
class Affine:
    """x -> scale x + shift, with log|det| = d log|scale| for d dimensions.

    The result is float64 if neighbouring numbers of the argument's dtype near `shift` are more than 1/100 apart, as
    those of float32 are for a shift beyond 8e4.

    Args:
        scale: the factor, not 0.
        shift: the value of 0 in model space.

    Raises:
        ValueError: the scale is zero, or scale or shift is NaN or infinite.
    """

    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self):
        _refuse_nonfinite(self, "scale", "shift")
        if self.scale == 0:
            raise ValueError("scale must not be zero: a transform with scale=0 is not invertible")

    @property
    def _largest(self) -> float:
        """The argument `largest` of `_resolved`: |shift|, in units of model space."""
        return abs(self.shift)

    def __call__(self, x: Tensor) -> Tensor:
        """Map to model space, (B, *)."""
        return self.scale * _resolved(x, self._largest) + self.shift

    def inverse(self, y: Tensor) -> Tensor:
        """Map back to data space, (B, *)."""
        return (_resolved(y, self._largest) - self.shift) / self.scale

    def levels_before(self, levels: int) -> int | None:
        """Return the number n of grey levels for which the map takes [0, n) to [0, levels); None if there is none."""
        count = levels / self.scale
        is_whole = self.shift == 0 and count > 0 and abs(count - round(count)) < 1e-9 * count
        return round(count) if is_whole else None

    def log_det(self, x: Tensor) -> Tensor:
        """Return d log|scale|, with d the number of dimensions of a state, in nats (B,), float64."""
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

    Raises:
        ValueError: levels is not an integer of at least 2, or low < high are not finite.
    """

    scale: float = field(init=False, repr=False)
    shift: float = field(init=False, repr=False)
    levels: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self):
        _refuse_nonfinite(self, "low", "high")
        if self.levels != int(self.levels) or self.levels < 2 or not self.low < self.high:
            raise ValueError(f"an integer levels >= 2 and low < high are required; got {self}")
        object.__setattr__(self, "scale", (self.high - self.low) / self.levels)
        object.__setattr__(self, "shift", self.low)

    @property
    def _largest(self) -> float:
        """The argument `largest` of `_resolved`: max(|low|, |high|), in units of the width of a grey level."""
        return max(abs(self.low), abs(self.high)) / self.scale

    def quantise(self, y: Tensor) -> Tensor:
        """Return the grey level of each value in model space, clipped to 0 .. levels - 1."""
        y = _resolved(y, self._largest)
        rounding = 4 * self.levels * torch.finfo(y.dtype).eps  # the inverse of a level may lie slightly below it
        return (self.inverse(y) + rounding).floor().clamp(0, self.levels - 1)


@checked
@dataclass(frozen=True)
class Logit:
    """Map (low, high) to the real line: x -> logit(p) with p = margin + (1 - 2 margin) (x - low) / (high - low).

    RealNVP (1605.08803, section 4.1) uses margin 0.05. The map is defined where 0 <= p <= 1, that is up to
    margin/(1 - 2 margin) (high - low) beyond low and high, and infinite at p = 0 and 1.

    Args:
        low, high: the range of the data.
        margin: distance of p from 0 and 1 at the ends of the range, in [0, 0.5).

    Raises:
        ValueError: low < high are not finite, or margin is not in [0, 0.5); when applied: a value has p outside [0, 1].
    """

    low: float = 0.0
    high: float = 1.0
    margin: float = 0.05

    def __post_init__(self):
        _refuse_nonfinite(self, "low", "high")
        if not self.low < self.high or not 0 <= self.margin < 0.5:
            raise ValueError(f"low < high and 0 <= margin < 0.5 are required; got {self}")

    @property
    def _largest(self) -> float:
        """The argument `largest` of `_resolved`: max(|low|, |high|), in units of high - low."""
        return max(abs(self.low), abs(self.high)) / (self.high - self.low)

    def _fraction(self, x: Tensor) -> Tensor:
        """Return p of the class docstring; NaN stays NaN."""
        x = _resolved(x, self._largest)
        p = self.margin + (1 - 2 * self.margin) * (x - self.low) / (self.high - self.low)
        rounding = 4 * torch.finfo(p.dtype).eps * max(self._largest, 1.0)
        if bool((is_outside := (p < -rounding) | (p > 1 + rounding)).any()):
            extension = self.margin / (1 - 2 * self.margin) * (self.high - self.low)
            raise ValueError(
                f"x must lie in ({self.low - extension:g}, {self.high + extension:g}), where {self} is defined; got "
                f"{float(x.min()):g} to {float(x.max()):g}, {int(is_outside.sum())} of {x.numel()} values outside: "
                "set low and high to the range of the data"
            )
        return p.clamp(0, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Map to the real line, (B, *)."""
        return torch.logit(self._fraction(x))

    def inverse(self, y: Tensor) -> Tensor:
        """Map back to (low, high), (B, *)."""
        fraction = (torch.sigmoid(_resolved(y, self._largest)) - self.margin) / (1 - 2 * self.margin)
        return self.low + (self.high - self.low) * fraction

    def log_det(self, x: Tensor) -> Tensor:
        """Return the sum of log(dp/dx) - log(p (1 - p)) over the dimensions, in nats (B,), float64."""
        p = self._fraction(float64(x))
        slope = math.log((1 - 2 * self.margin) / (self.high - self.low))
        return (slope - torch.log(p) - torch.log1p(-p)).flatten(1).sum(dim=1)


class Compose(Configured):
    """A sequence of transforms; their log-determinants add.

    Args:
        transforms: the transforms, in the order in which they are applied.
    """

    def __init__(self, transforms: Sequence[Transform]):
        if not isinstance(transforms, Iterable):
            raise TypeError(f"transforms must be a list of transforms; got {transforms}")
        self.transforms = list(transforms)
        for i, transform in enumerate(self.transforms):
            check_instance(f"transforms[{i}]", transform, "__call__", "inverse", "log_det")

    @property
    def bound(self) -> str:
        """Names of the transforms whose terms in `draw` are a bound; empty if all transforms are invertible."""
        return " and ".join(filter(None, (getattr(transform, "bound", "") for transform in self.transforms)))

    @property
    def data_shape(self) -> tuple[int, ...] | None:
        """Shape `*` of the data, if the first transform that changes the shape declares it; else None."""
        return next((shape for t in self.transforms if (shape := getattr(t, "data_shape", None))), None)

    @property
    def state_shape(self) -> tuple[int, ...] | None:
        """Shape `*` of the states, if the last transform that changes the shape declares it; else None."""
        return next((shape for t in reversed(self.transforms) if (shape := getattr(t, "state_shape", None))), None)

    @property
    def levels(self) -> int | None:
        """Number of grey levels of the data, derived from the first transform that has `levels`; None if it is unknown.

        Each transform before that one converts the number by its method `levels_before`, which `Affine` has; without
        this method the number is unknown.
        """
        levels: int | None = None
        for transform in reversed(self.transforms):
            before = getattr(transform, "levels_before", lambda _: None)
            levels = getattr(transform, "levels", None) or (levels and before(levels))
        return levels

    def __call__(self, x: Tensor) -> Tensor:
        """Map to model space, (B, *)."""
        for transform in self.transforms:
            x = transform(x)
        return x

    def encode(self, x: Tensor, stream: RandomStream) -> Tensor:
        """Map to model space, (B, *); transforms that are not invertible draw from `stream`."""
        for transform in self.transforms:
            x = encode(transform, x, stream)
        return x

    def draw(self, x: Tensor, stream: RandomStream) -> tuple[Tensor, dict[str, Tensor]]:
        """Map to model space, (B, *), and return the terms of all transforms, see `draw`; equal names are added."""
        total: dict[str, Tensor] = {}
        for transform in self.transforms:
            x, terms = draw(transform, x, stream)
            total |= {name: total[name] + nats if name in total else nats for name, nats in terms.items()}
        return x, total

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
