"""Tensor helpers that every layer shares: broadcasting, float64 sums, devices.

A state is a tensor ``(B, *)`` of any rank; a time, a schedule value or a step size is ``()`` or ``(B,)``. `broadcast`
is the only place where the two meet: indexing with ``[:, None, None, None]`` is right for images only, and silently
wrong for a state of shape (2, 2).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def float64(values: Tensor | float | Sequence[float]) -> Tensor:
    """Convert to float64; numbers go to the CPU, and so do tensors on a device without float64 (MPS)."""
    if not isinstance(values, Tensor):
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if values.device.type == "mps":
        values = values.cpu()
    return values.double()


def double(x: Tensor) -> torch.dtype:
    """Return float64, or float32 if the device of x has no float64 (MPS)."""
    return torch.float32 if x.device.type == "mps" else torch.float64


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
    """Copy x to `device` without synchronising."""
    return x.to(device, dtype or x.dtype, non_blocking=device.type == "cuda")


def recordable(x: Tensor) -> Tensor:
    """Return x, or a copy if it was made under `torch.inference_mode`, for such tensors cannot be differentiated."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


def broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Cast values ``()`` or ``(B,)`` to the dtype and device of x ``(B, *)``, shaped to multiply it."""
    if values.ndim > 1 or (values.ndim == 1 and values.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"expected one value per sample, shape () or ({x.shape[0]},) for a state {tuple(x.shape)}; "
            f"got {tuple(values.shape)}"
        )
    if values.ndim == 0 and values.device.type == "cpu":
        return values.to(x.dtype)  # multiplies a tensor on any device without synchronising
    values = send(values, x.device, x.dtype)
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def sum_dims(x: Tensor) -> Tensor:
    """Sum over all dimensions but the first, in float64: ``(B, *) -> (B,)``."""
    return float64(x).flatten(1).sum(dim=1)


def dimensions(x: Tensor) -> int:
    """Return the number of dimensions of one sample: the product of ``*`` in ``(B, *)``."""
    return x.shape[1:].numel()


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """Return the mean of independent values (n,) and its standard error, None for a single value."""
    values = float64(values)
    stderr = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), stderr
