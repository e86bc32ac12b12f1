"""Structural types that all modules share: conditions, networks, models, measurements and transforms.

A network is any callable with the signature of `Network`; a model is any object with an SDE and `predict`. Samplers,
losses and likelihoods accept any such object (`wrappers.as_model` adapts it).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scoresde.tensors import recordable, send
from scoresde.views import Views

Condition = Tensor | dict[str, Tensor] | None
"""The condition of a network: None (the null condition), a tensor, or a dict of tensors.

A tensor with leading dimension B holds one condition per sample. Any other tensor, such as (), is one condition for all
samples. If the first dimension of such a tensor could equal B, give it a leading dimension of 1."""


NULL = -1
"""The label of a sample without a class, which is a null condition."""


def by_name(cond: Condition) -> dict[str, Tensor]:
    """Return the tensors of a condition by name; a single tensor is the "label" if it holds integers, else "vector".

    Raises:
        TypeError: the condition is not None, a tensor or a dict of tensors.
    """
    if cond is None:
        return {}
    if isinstance(cond, Tensor):
        return {"vector" if cond.is_floating_point() else "label": cond}
    if not isinstance(cond, dict):
        raise TypeError(f"a condition must be None, a tensor or a dict of tensors; got {type(cond).__name__}")
    return cond


def null_condition(part: Tensor) -> Tensor:
    """Return the null condition with the shape and dtype of the tensor `part`: NaN if floating-point, else -1."""
    return torch.full_like(part, math.nan if part.is_floating_point() else NULL)


def has_null(part: Tensor) -> bool:
    """Return whether a condition is null for some samples: integers that are all -1, or numbers that are all NaN."""
    null = part.isnan() if part.is_floating_point() else part == NULL
    return bool((null.flatten(1).all(dim=1) if null.ndim > 1 else null).any())


def as_condition(cond: Any) -> Condition:
    """Convert tensors, numbers, lists, NumPy arrays, or a dict of them, to a condition of tensors.

    Raises:
        TypeError: `cond` is of another type, or a key of the dict is not a text.
    """
    if isinstance(cond, dict):
        if keys := [key for key in cond if not isinstance(key, str)]:
            raise TypeError(f"the names of conditions must be texts; got {keys[0]!r}")
        return {key: _as_tensor(value, f"cond[{key!r}]") for key, value in cond.items()}
    return None if cond is None else _as_tensor(cond, "cond")


def _as_tensor(value: Any, name: str) -> Tensor:
    try:
        return recordable(torch.as_tensor(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor, a number, a list, a NumPy array, or a dict of them; got "
            f"{type(value).__name__} ({error})"
        ) from error


def select(cond: Condition, rows: Tensor | slice, count: int) -> Condition:
    """Return the conditions of the samples `rows` from a batch of `count`.

    A tensor that is one condition for all samples is returned whole, with a leading dimension of 1.
    """

    def selected(part: Tensor) -> Tensor:
        part = _batched(part, count)
        if len(part) != count:
            return part
        return part[rows.to(part.device) if isinstance(rows, Tensor) else rows]

    return _map(selected, cond)


def expand(cond: Condition, count: int) -> Condition:
    """Expand every tensor of the condition to leading dimension `count`."""

    def expanded(part: Tensor) -> Tensor:
        part = _batched(part, count)
        return part.expand(count, *part.shape[1:])

    return _map(expanded, cond)


def to_device(cond: Condition, device: torch.device | None, dtype: torch.dtype | None = None) -> Condition:
    """Copy the condition to `device` (None leaves it); floating-point tensors are cast to `dtype`, others are not."""
    if device is None:
        return cond
    return _map(lambda part: send(part, device, dtype if part.is_floating_point() else None), cond)


def _map(function: Callable[[Tensor], Tensor], cond: Condition) -> Condition:
    if cond is None:
        return None
    return function(cond) if isinstance(cond, Tensor) else {key: function(value) for key, value in cond.items()}


def _batched(part: Tensor, count: int) -> Tensor:
    """Return `part` unchanged if its first dimension is `count` or 1; otherwise, add a leading dimension of 1."""
    return part if part.ndim > 0 and len(part) in (1, count) else part[None]


class CaptionEncoder(Protocol):
    """Maps N captions to conditions with leading dimension N, by name; see `scoresde.text`.

    `check` warns of words that the encoder does not know, and raises ValueError for a caption without known words.
    """

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]: ...
    def check(self, captions: Sequence[str]) -> None: ...


class Network(Protocol):
    """A function of the scaled state (B, *), noise label (B,) and condition; the output has the shape of the state.

    A network that needs its inputs in full precision, for Fourier features or a closed form, has the attribute
    `casts_inputs = True`: it receives states and conditions in at least float32 and casts them to its own dtype itself.
    """

    def __call__(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor: ...


def call_network(network: nn.Module | Network, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
    """Evaluate a network in its own dtype: that of its first floating-point parameter, or of x if it has none.

    States and conditions are cast to this dtype. Noise labels are float32 or wider for every network, as in EDM's code
    (2206.00364): bfloat16 would round the label 999 to 1000, and has only 507 values for the labels 0 .. 999.

    Args:
        network: a `Network`.
        x: scaled states (B, *).
        c_noise: noise labels (B,), in any floating-point dtype, on any device.
        cond: the condition, one per sample.
    """
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), x.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    dtype = wide if getattr(network, "casts_inputs", False) else dtype
    return network(x.to(dtype), send(c_noise, x.device, wide), to_device(cond, x.device, dtype))


def check_signature(network: nn.Module | Network) -> None:
    """Raise TypeError if the network does not accept (x, c_noise, cond)."""
    try:
        signature = inspect.signature(network.forward if isinstance(network, nn.Module) else network)
    except (TypeError, ValueError):  # a built-in function
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        name = getattr(network, "__name__", type(network).__name__)
        raise TypeError(f"a network must accept (x, c_noise, cond); got {name}{signature}: {error}") from error


class Model(Protocol):
    """A diffusion model: an SDE, and `predict`, which returns the `Views` at a state (B, *) and a time () or (B,)."""

    @property
    def sde(self) -> Any: ...
    def predict(self, x: Tensor, t: Tensor) -> Views: ...


class Measurement(Protocol):
    """A measurement y = A(x) + noise_std * noise of states (B, *); see `scoresde.inverse`.

    noise_std is float64, () or of a shape that broadcasts to one measurement. `adjoint` exists if `is_linear`.
    """

    noise_std: Tensor
    is_linear: bool

    def __call__(self, x: Tensor) -> Tensor: ...
    def adjoint(self, y: Tensor) -> Tensor: ...


class Transform(Protocol):
    """A map from data space to model space, with its log-determinant (B,) in nats.

    A transform whose cost in nats is a bound also has `encode` and `draw`, see `data.transforms`; its `log_det` raises
    TypeError, and its `inverse` is the decoder.
    """

    def __call__(self, x: Tensor) -> Tensor: ...
    def inverse(self, y: Tensor) -> Tensor: ...
    def log_det(self, x: Tensor) -> Tensor: ...
