"""Conjugate gradients for a batch of systems, each with its own step sizes and its own stop."""

from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.guidance.gradients import is_transformed
from scoresde.tensors import broadcast, sum_dims


def conjugate_gradients(
    product: Callable[[Tensor], tuple[Tensor, Tensor]],
    residual: Tensor,
    noise_std: Tensor,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """Return B u for the solution u of (M + noise_std^2) u = residual (B, *m), separately for each sample.

    Args:
        product: maps u to (B u, M u), with a linear B and a symmetric, positive semi-definite M.
        residual: the right-hand side.
        noise_std: () or of a shape that broadcasts to `*m`.
        iterations: number of products, at most.
        tolerance: relative residual at which a sample stops.
    """
    variance = noise_std.to(residual).square()
    direction, square = residual, sum_dims(residual.square())
    active, target = square > 0, tolerance**2 * square
    mapped: Tensor | float = 0.0
    for _ in range(iterations):
        image, applied = product(direction)
        applied = applied + variance * direction
        curvature = sum_dims(direction * applied)
        active = active & (curvature > 0)
        step = torch.where(active, square / torch.where(active, curvature, 1.0), 0.0)
        mapped = mapped + broadcast(step, image) * image
        residual = residual - broadcast(step, residual) * applied
        latest = torch.where(active, sum_dims(residual.square()), square)
        ratio = torch.where(active, latest / torch.where(active, square, 1.0), 0.0)
        direction, square = residual + broadcast(ratio, residual) * direction, latest
        active = active & (square > target)
        if not is_transformed(residual) and not bool(active.any()):
            break
    return mapped if isinstance(mapped, Tensor) else torch.zeros_like(residual)
