"""Measurements of states of any shape: entries, linear maps given as functions or matrices, and nonlinear functions."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from scoresde.inverse.operators import Operator, check_trailing, checked_mask, singular_axes
from scoresde.tensors import check_instance, float64, floating


class Inpainting(Operator):
    """The entries of the state where the mask is true, as one vector.

    A mask of the shape `*` of a state measures (B, m), for m true entries. A mask of all but the first dimension, such
    as (H, W) for images (B, C, H, W), measures the same places in each channel, (B, C, m).

    Args:
        mask: bools, or numbers 0 and 1.
        noise_std: standard deviation of a measurement's noise, a number or one for each of its entries; 0 for none.

    Raises:
        TypeError: mask is not a tensor or an array of bools or real numbers.
        ValueError: an entry of the mask is neither 0 nor 1, or all are 0.
    """

    has_spectrum = True

    def __init__(self, mask: Tensor, noise_std: float | Tensor = 0.0):
        super().__init__(noise_std)
        self.mask = checked_mask(mask)
        self._kept = self.mask.flatten().nonzero().flatten()

    def __call__(self, x: Tensor) -> Tensor:
        x = floating(x)
        check_trailing("states", x, self.mask.shape)
        return x.flatten(-self.mask.ndim).index_select(-1, self._kept.to(x.device))

    def adjoint(self, y: Tensor) -> Tensor:
        y = floating(y)
        check_trailing("measurements", y, self._kept.shape)
        states = y.new_zeros(*y.shape[:-1], self.mask.numel()).index_add(-1, self._kept.to(y.device), y)
        return states.unflatten(-1, self.mask.shape)

    def to_spectrum(self, x: Tensor) -> Tensor:
        return x

    def from_spectrum(self, coordinates: Tensor) -> Tensor:
        return coordinates

    def singular_values(self, shape: Sequence[int]) -> Tensor:
        return self.mask.double().expand(tuple(shape))


class LinearOperator(Operator):
    """A linear operator from two functions or a matrix; its public name is `inverse.Linear`.

    Args:
        forward: a function from states (B, *) to measurements (B, *m), or a matrix (m, D) for states of D numbers,
            which measures (B, m).
        adjoint: the function A^T from measurements to states; not with a matrix.
        noise_std: standard deviation of a measurement's noise, a number or one for each of its entries; 0 for none.
        shape: with a matrix, the shape `*` of a state, D numbers in all; default (D,).

    Raises:
        TypeError: forward is neither a function nor a matrix, or a function has no adjoint.
        ValueError: the matrix is not (m, D) of finite numbers, or `shape` does not have D numbers.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor] | Tensor,
        adjoint: Callable[[Tensor], Tensor] | None = None,
        noise_std: float | Tensor = 0.0,
        shape: Sequence[int] | None = None,
    ):
        super().__init__(noise_std)
        self.matrix: Tensor | None = None
        if callable(forward) and not isinstance(forward, Tensor):
            if not callable(adjoint):
                raise TypeError(
                    f"adjoint must be the function A^T of a forward function; got {adjoint!r}: pass "
                    "Linear(forward, adjoint), or a matrix"
                )
            self._forward, self._adjoint = forward, adjoint
            return
        if adjoint is not None:
            raise TypeError("adjoint must be left out with a matrix, whose adjoint is its transpose")
        matrix = float64(forward)
        if matrix.ndim != 2 or not matrix.numel() or not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"a matrix must be (m, D), of finite numbers; got shape {tuple(matrix.shape)}")
        self.shape = torch.Size(shape if shape is not None else matrix.shape[1:])
        if self.shape.numel() != matrix.shape[1]:
            raise ValueError(f"shape must have {matrix.shape[1]} numbers in all; got {tuple(self.shape)}")
        self.matrix, self.has_spectrum = matrix, True

    def __call__(self, x: Tensor) -> Tensor:
        x = floating(x)
        if self.matrix is None:
            return self._forward(x)
        if x.shape[1:].numel() != self.matrix.shape[1]:
            raise ValueError(f"states must be (B, {', '.join(map(str, self.shape))}); got {tuple(x.shape)}")
        return x.flatten(1) @ self.matrix.mT.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        y = floating(y)
        if self.matrix is None:
            return self._adjoint(y)
        if y.ndim != 2 or y.shape[1] != len(self.matrix):
            raise ValueError(f"measurements must be (B, {len(self.matrix)}); got {tuple(y.shape)}")
        return (y @ self.matrix.to(y)).unflatten(1, self.shape)

    def to_spectrum(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self._axes[1].mT.to(x)).reshape(x.shape)

    def from_spectrum(self, coordinates: Tensor) -> Tensor:
        return (coordinates.flatten(1) @ self._axes[1].to(coordinates)).reshape(coordinates.shape)

    def singular_values(self, shape: Sequence[int]) -> Tensor:
        return self._axes[0].reshape(tuple(shape))

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor]:
        """The singular values (D,) and V^T (D, D)."""
        if self.matrix is None:
            raise self._no_spectrum()
        return singular_axes(self.matrix)


class Nonlinear(Operator):
    """Any differentiable measurement, y = f(x) + noise_std * noise; `DPS` and the particle sampler accept it.

    Args:
        forward: a differentiable function from states (B, *) to measurements (B, *m).
        noise_std: standard deviation of a measurement's noise, a number or one for each of its entries; 0 for none.

    Raises:
        TypeError: forward cannot be called.
        ValueError: in a call, forward does not return a tensor (B, *m).
    """

    is_linear = False

    def __init__(self, forward: Callable[[Tensor], Tensor], noise_std: float | Tensor = 0.0):
        super().__init__(noise_std)
        check_instance("forward", forward, "__call__")
        self._forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        y = self._forward(floating(x))
        if not isinstance(y, Tensor) or y.ndim < 2:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"the forward function must return measurements (B, *m); got {got}: keep a dimension of 1")
        return y

    def adjoint(self, y: Tensor) -> Tensor:
        """Raise TypeError, as a nonlinear operator has no adjoint."""
        raise TypeError("a nonlinear operator has no adjoint: use DPS or the particle sampler")
