"""Krylov methods for a batch of linear systems (M + n^2) u = r, each with its own step sizes and its own stop.

n is the noise_std. Both methods end after as many iterations as M + n^2 has distinct eigenvalues; an iteration costs
one product with M.

`conjugate_gradients` needs a symmetric, positive semi-definite M: its step |r|^2 / p^T (M + n^2) p has no bound where M
is neither. `minimal_residuals` is for an M that is only approximately symmetric and positive, such as A J A^T with the
Jacobian J of a network: it takes the u of the Krylov space with the smallest residual (generalised conjugate residuals,
Eisenstat, Elman and Schultz 1983), so that no iteration increases the residual, for any M.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.guidance.gradients import is_transformed
from scoresde.tensors import broadcast, sum_dims

Product = Callable[[Tensor], tuple[Tensor, Tensor]]
"""u -> (B u, M u), with a linear B."""


def conjugate_gradients(
    product: Product, residual: Tensor, noise_std: Tensor, iterations: int, tolerance: float
) -> Tensor:
    """Return B u (B, *) for the solution u of (M + noise_std^2) u = residual, separately for each sample.

    Args:
        product: maps u (B, *m) to (B u, M u), with a symmetric, positive semi-definite M.
        residual: the right-hand side (B, *m).
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
        step = _ratio(square, curvature, active)
        mapped = mapped + broadcast(step, image) * image
        residual = residual - broadcast(step, residual) * applied
        latest = torch.where(active, sum_dims(residual.square()), square)
        ratio = _ratio(latest, square, active)
        direction, square = residual + broadcast(ratio, residual) * direction, latest
        active = active & (square > target)
        if not is_transformed(residual) and not bool(active.any()):
            break
    return mapped if isinstance(mapped, Tensor) else torch.zeros_like(residual)


def minimal_residuals(
    product: Product, residual: Tensor, noise_std: Tensor, iterations: int, tolerance: float
) -> Tensor:
    """Return B u (B, *) for the u of the Krylov space with the smallest |(M + noise_std^2) u - residual|, per sample.

    It keeps a state B u and a measurement for each iteration.

    Args:
        product: maps u to (B u, M u), with any linear M.
        residual, noise_std, iterations, tolerance: see `conjugate_gradients`.
    """
    variance, square = noise_std.to(residual).square(), sum_dims(residual.square())
    active, target = square > 0, tolerance**2 * square
    mapped: Tensor | float = 0.0
    earlier: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(iterations):
        image, applied = product(residual)
        applied = applied + variance * residual
        for past_image, past_applied, past_square in earlier:
            part = _ratio(sum_dims(applied * past_applied), past_square, past_square > 0)
            image = image - broadcast(part, image) * past_image
            applied = applied - broadcast(part, applied) * past_applied
        size = sum_dims(applied.square())
        earlier.append((image, applied, size))
        step = _ratio(sum_dims(residual * applied), size, active & (size > 0))
        mapped = mapped + broadcast(step, image) * image
        residual = residual - broadcast(step, residual) * applied
        active = active & (sum_dims(residual.square()) > target)
        if not is_transformed(residual) and not bool(active.any()):
            break
    return mapped if isinstance(mapped, Tensor) else torch.zeros_like(residual)


def _ratio(numerator: Tensor, denominator: Tensor, active: Tensor) -> Tensor:
    """Return numerator / denominator (B,) for the active samples, 0 for the others."""
    return torch.where(active, numerator / torch.where(active, denominator, 1.0), 0.0)
