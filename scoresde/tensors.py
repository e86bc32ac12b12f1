"""Tensor helpers that all modules share: broadcasting, float64 sums, devices.

A state is a tensor ``(B, *)`` of any rank; a time, a schedule value or a step size is ``()`` or ``(B,)``. `broadcast`
is the only place where the two meet: indexing with ``[:, None, None, None]`` is right for images only, and silently
wrong for a state of shape (2, 2).
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn


def float64(values: Tensor | float | Sequence[float]) -> Tensor:
    """Convert to float64; numbers go to the CPU, and so do tensors on a device without float64 (MPS).

    Raises:
        TypeError: `values` are not numbers.
    """
    if not isinstance(values, Tensor):
        try:
            return torch.as_tensor(values, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"expected a tensor, a number or a list of numbers; got {values!r}") from error
    if values.device.type == "mps":
        values = values.cpu()
    return values.double()


def double(x: Tensor) -> torch.dtype:
    """Return the dtype float64, or float32 if the device of x has no float64 (MPS)."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def floating(x: Tensor) -> Tensor:
    """Return a state ``(B, *)`` of floating-point numbers unchanged, and convert one of integers without loss.

    Every function that takes a state calls this one. Integers of up to 16 bits, such as grey levels, and booleans
    become float32; longer integers become float64, which holds those up to 2^53.

    Raises:
        TypeError: x is not a tensor of real numbers.
    """
    check_real("states", x)
    return x if x.is_floating_point() else x.to(floating_dtype(x))


def check_real(name: str, value: object) -> None:
    """Raise TypeError unless the argument `name` is a tensor of real numbers."""
    if not isinstance(value, Tensor):
        fix = f": pass torch.as_tensor({name})" if hasattr(value, "__array__") else ""
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}{fix}")
    if value.is_complex():
        raise TypeError(f"{name} must be real numbers; got {value.dtype}")


def check_instance(name: str, value: object, *methods: str) -> None:
    """Raise TypeError unless the argument `name` is an object, not a class, with these methods."""
    if isinstance(value, type):
        raise TypeError(f"{name} must be an object; got the class {value.__name__}: pass an instance of it")
    if missing := [method for method in methods if not callable(getattr(value, method, None))]:
        if missing == ["__call__"]:
            raise TypeError(f"{name} must be callable; got {value!r}")
        raise TypeError(f"{name} must be an object with {' and '.join(missing)}; got {value!r}")


def floating_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of `floating(x)`."""
    if x.is_floating_point():
        return x.dtype
    return torch.float32 if x.element_size() <= 2 else double(x)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half-precision tensors to float32, and integers as `floating` does; others stay as they are."""
    x = floating(x)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_half(x: Tensor) -> bool:
    """Return whether x has a floating-point type narrower than float32."""
    return x.is_floating_point() and torch.finfo(x.dtype).bits < 32


class FullPrecision(nn.Module):
    """A module that moves and casts like any other, except that its tensors are never cast to half precision.

    Use it for tensors that determine a closed form: the frequencies of an embedding, the parameters of an SDE.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def without_half(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if is_half(moved) else moved

        return super()._apply(without_half, recurse)


def available(device: torch.device | str) -> torch.device:
    """Return `torch.device(device)`.

    Raises:
        ValueError: the device is not available on this machine.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available on this machine ({error})") from error


def send(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy x to `device` without synchronising; a float64 tensor becomes float32 on a device without float64 (MPS)."""
    if dtype is None:
        dtype = torch.float32 if device.type == "mps" and x.dtype == torch.float64 else x.dtype
    return x.to(device, dtype, non_blocking=device.type == "cuda")


def recordable(x: Tensor) -> Tensor:
    """Return x; if x was made under `torch.inference_mode`, return a copy, which autograd can differentiate."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


def broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Return values ``()`` or ``(B,)``, cast and shaped to multiply `floating(x)` for a state x ``(B, *)``."""
    if values.ndim > 1 or (values.ndim == 1 and values.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"expected one value per sample, shape () or ({x.shape[0]},) for a state {tuple(x.shape)}; got shape "
            f"{tuple(values.shape)}"
        )
    if values.ndim == 0 and values.device.type == "cpu":
        return values.to(floating_dtype(x))  # multiplies a tensor on any device without synchronising
    values = send(values, x.device, floating_dtype(x))
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def check_shape_of_states(name: str, value: Tensor, x: Tensor) -> None:
    """Raise an error unless the argument `name` has exactly the shape of the states x.

    Shapes such as (B, 1), (1, D) or (D,) would broadcast without an error.

    Raises:
        TypeError: `value` is not a tensor of real numbers.
        ValueError: `value` has another shape.
    """
    check_real(name, value)
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of the states, {tuple(x.shape)}; got {tuple(value.shape)}")


def sum_dims(x: Tensor) -> Tensor:
    """Sum over all dimensions but the first, in float64: ``(B, *) -> (B,)``."""
    return float64(x).flatten(1).sum(dim=1)


def dimensions(x: Tensor) -> int:
    """Return the number of dimensions of one sample: the product of ``*`` in ``(B, *)``."""
    return x.shape[1:].numel()


def check_integer(name: str, value: object, least: int | None = None) -> None:
    """Raise TypeError unless the argument `name` is an integer, and ValueError if it is less than `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """Return the argument `name` as a float, after checking that it is finite and between low and high (exclusive).

    Raises:
        TypeError: it is not a number.
        ValueError: it is NaN, infinite, or outside of the range.
    """
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number; got {type(value).__name__}") from error
    if not (math.isfinite(number) and low < number < high):
        bounds = [f"more than {low:g}"] * (low > -math.inf) + [f"less than {high:g}"] * (high < math.inf)
        raise ValueError(f"{name} must be {' and '.join(['finite', *bounds])}; got {value}")
    return number


def empty_states(shape: Any, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """Return an uninitialised tensor of the shape (B, *); raise TypeError or ValueError if `shape` is not a shape."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape must be a tuple of integers (B, *); got {shape!r}")
    for i, size in enumerate(shape):
        check_integer(f"shape[{i}]", size, 0)
    return torch.empty(shape, dtype=dtype, device=None if device is None else available(device))


def listed(values: Tensor | Sequence[float]) -> str:
    """Return numbers as text for a message; of more than eight, the first three and the last three."""
    numbers = [f"{float(value):.6g}" for value in values]
    if len(numbers) > 8:
        return f"[{', '.join(numbers[:3])}, ..., {', '.join(numbers[-3:])}] ({len(numbers)} numbers)"
    return f"[{', '.join(numbers)}]"


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """Return the mean of independent values (n,) and its standard error, None for a single value."""
    values = float64(values)
    stderr = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), stderr
