"""What the layers ask of each other, as structural types.

A network is any callable of its signature; a model is anything with an SDE and `predict`; samplers, losses and
likelihoods accept any object of that signature (`score.as_model` adds what such a model may lack).
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from scoresde.tensors import send
from scoresde.views import Views

Condition = Tensor | dict[str, Tensor] | None
"""The condition of a network: None (the null condition), a tensor, or a dict of tensors.

Each tensor has leading B, one condition per sample, or it is the condition of one sample, used for all of them: a
tensor (), one of another leading dimension than B, or, where that is ambiguous, one with a leading dimension of 1."""


def as_condition(cond: Any) -> Condition:
    """A condition of tensors, from tensors, numbers, lists, NumPy arrays, or a dict of them.

    Raises:
        TypeError: anything else.
    """
    if cond is None or isinstance(cond, Tensor):
        return cond
    if isinstance(cond, dict):
        return {key: _as_tensor(value, f"cond[{key!r}]") for key, value in cond.items()}
    return _as_tensor(cond, "cond")


def _as_tensor(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} as a tensor, a number, a list, a NumPy array, or a dict of them, expected; got "
            f"{type(value).__name__} ({error})"
        ) from error


def select(cond: Condition, rows: Tensor | slice, count: int) -> Condition:
    """The condition of some of `count` samples; one that is used for all keeps a leading dimension of 1."""

    def chosen(part: Tensor) -> Tensor:
        if not _is_per_sample(part, count):
            return _of_one(part)
        return part[rows.to(part.device) if isinstance(rows, Tensor) else rows]

    return _each(cond, chosen)


def expand(cond: Condition, count: int) -> Condition:
    """The condition with leading dimension `count` in every tensor."""
    return _each(cond, lambda part: part if _is_per_sample(part, count) else _repeated(part, count))


def to_device(cond: Condition, device: torch.device | None, dtype: torch.dtype | None = None) -> Condition:
    """The condition on a device, where one is given: floating-point numbers in a dtype, class labels as they are."""
    if device is None:
        return cond
    return _each(cond, lambda part: send(part, device, dtype if part.is_floating_point() else None))


def _each(cond: Condition, change: Any) -> Condition:
    if cond is None:
        return None
    return change(cond) if isinstance(cond, Tensor) else {key: change(value) for key, value in cond.items()}


def _is_per_sample(part: Tensor, count: int) -> bool:
    return part.ndim > 0 and part.shape[0] == count


def _of_one(part: Tensor) -> Tensor:
    """With a leading dimension of 1."""
    return part if part.ndim > 0 and part.shape[0] == 1 else part[None]


def _repeated(part: Tensor, count: int) -> Tensor:
    part = _of_one(part)
    return part.expand(count, *part.shape[1:])


class Network(Protocol):
    """A function of the scaled state (B, *), the noise label (B,) and the condition, of the shape of the state."""

    def __call__(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor: ...


class Model(Protocol):
    """A diffusion model: an SDE, and the views of its score at any state (B, *) and time () or (B,)."""

    @property
    def sde(self) -> Any: ...
    def predict(self, x: Tensor, t: Tensor) -> Views: ...


class Transform(Protocol):
    """An invertible map from data space to model space that knows its log-determinant, (B,) in nats."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def inverse(self, y: Tensor) -> Tensor: ...
    def log_det(self, x: Tensor) -> Tensor: ...
