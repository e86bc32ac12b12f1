r"""Measurements of a state, y = A(x) + noise_std * noise, with standard normal noise.

A linear operator maps states (B, *) to measurements (B, *m), and has the adjoint <A x, y> = <x, A^T y>. Where the
singular value decomposition A = U S V^T is known, it is given by the coordinates V^T x of a state, an orthonormal basis
in which A^T A is diagonal:

    to_spectrum(x) = V^T x,     from_spectrum(c) = V c,     singular_values(*) = s,     A^T A = V diag(s^2) V^T.

Coordinates and singular values have the shape of the state; s is 0 in directions that A does not measure. Everything
else follows: U^T y is to_spectrum(A^T y) / s where s > 0, and for a function f with f(0) = 0 or a y in the range of A,

    A^+ y = V diag(1/s^2) V^T A^T y                              the pseudo-inverse (s > 0 only)
    A^T (r^2 A A^T + n^2 I)^-1 y = V diag(1/(r^2 s^2 + n^2)) V^T A^T y.

`a @ b` measures a(b(x)). `as_operator` accepts linear physics objects of `deepinv`, by their methods A and A_adjoint.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.configured import Configured, with_defaults
from scoresde.random_stream import RandomStream
from scoresde.tensors import check_instance, check_real, float64, floating, listed, send, sum_dims


class Operator(Configured):
    """A linear measurement. A subclass defines `__call__` and `adjoint`; with known singular values also the spectrum.

    Attributes:
        is_linear: whether x -> A(x) is linear; `Nonlinear` has no adjoint.
        is_orthogonal: whether A^T A = A A^T = I and measurements have the shape of states.
        has_spectrum: whether the singular values are known.
        noise_std: standard deviation of the noise, float64, () or of a shape that broadcasts to one measurement.

    Args:
        noise_std: a number >= 0, or one for each entry of a measurement.

    Raises:
        ValueError: noise_std is negative, NaN or infinite.
    """

    is_linear = True
    is_orthogonal = False
    has_spectrum = False

    def __init__(self, noise_std: float | Tensor = 0.0):
        std = float64(noise_std)
        if not bool((torch.isfinite(std) & (std >= 0)).all()):
            raise ValueError(f"noise_std must be finite and at least 0; got {listed(std.flatten())}")
        self.noise_std = std

    def recorded_arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor by name, always with the noise."""
        given = super().recorded_arguments()
        return given | {"noise_std": self.noise_std} if "noise_std" in with_defaults(type(self), given) else given

    def __matmul__(self, other: "Operator") -> "Operator":
        """Return the operator x -> self(other(x)), with the noise of `self`."""
        return Composed(self, other)

    def __call__(self, x: Tensor) -> Tensor:
        """Return A x (B, *m), without noise, in the dtype of the states x (B, *)."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(x)")

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y (B, *) for measurements y (B, *m)."""
        raise NotImplementedError(f"{type(self).__name__} must define adjoint(y)")

    def to_spectrum(self, x: Tensor) -> Tensor:
        """Return the coordinates V^T x, (B, *)."""
        raise self._no_spectrum()

    def from_spectrum(self, coordinates: Tensor) -> Tensor:
        """Return the state V c, (B, *), of the coordinates c (B, *)."""
        raise self._no_spectrum()

    def singular_values(self, shape: Sequence[int]) -> Tensor:
        """Return the singular values for states of the shape `*`, float64; they broadcast to one state."""
        raise self._no_spectrum()

    def filter(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return V f(s) V^T x, (B, *), where f maps singular values (1, *) to factors that broadcast to (B, *)."""
        s = send(self.singular_values(x.shape[1:]), x.device)
        return self.from_spectrum(function(s[None]).to(x.dtype) * self.to_spectrum(x))

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Return A^+ y (B, *): the shortest x with the smallest |A x - y|.

        Raises:
            TypeError: the singular values are not known.
        """
        return self.filter(self.adjoint(y), lambda s: torch.where(s > 0, s.square().reciprocal(), 0.0))

    def measure(
        self, x: Tensor, generator: torch.Generator | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Draw measurements A(x) + noise_std * noise, (B, *m), of the states x (B, *)."""
        y = self(floating(x))
        return y + self.noise_std.to(y) * RandomStream(generator, seeds, len(y)).normal(y)

    def log_likelihood(self, y: Tensor, x: Tensor) -> Tensor:
        """Return log p(y | x) = log N(y; A(x), noise_std^2) in nats, float64 (B,), of y (B, *m) or (1, *m).

        Raises:
            ValueError: noise_std is 0, or y does not have the shape of measurements.
        """
        expected = self(x)
        check_measurement(y, expected)
        std, expected = positive_std(self, "log p(y | x)"), float64(expected)
        std = std.to(expected.device).expand(expected.shape[1:])
        scaled = (float64(y).to(expected.device) - expected) / std
        return -0.5 * sum_dims(scaled.square()) - std.log().sum() - 0.5 * std.numel() * math.log(2 * math.pi)

    def _no_spectrum(self) -> TypeError:
        return TypeError(
            f"the singular values of {type(self).__name__} are not known: use a method that needs only the adjoint, "
            "such as MMPS, or give a small operator as its matrix, inverse.Linear(matrix)"
        )


class Composed(Operator):
    """The operator x -> outer(inner(x)), with the noise of `outer`; written outer @ inner.

    Its singular values are known if one of the two is orthogonal and those of the other are known.

    Args:
        outer: the operator that is applied last.
        inner: the operator that is applied first, without noise.

    Raises:
        TypeError: one of the two is not an operator.
        ValueError: the inner operator has noise.
    """

    def __init__(self, outer: Operator, inner: Operator):
        self.outer, self.inner = as_operator(outer), as_operator(inner)
        super().__init__(self.outer.noise_std)
        if bool((self.inner.noise_std > 0).any()):
            raise ValueError(
                f"the inner operator of a composition must have noise_std 0; got {_range(self.inner.noise_std)}: noise "
                "is added to the last measurement"
            )
        self.is_linear = self.outer.is_linear and self.inner.is_linear
        self.is_orthogonal = self.outer.is_orthogonal and self.inner.is_orthogonal
        first, second = self.outer, self.inner
        self.has_spectrum = (second.is_orthogonal and first.has_spectrum) or (
            first.is_orthogonal and second.has_spectrum
        )

    def __repr__(self) -> str:
        return f"{self.outer!r} @ {self.inner!r}"

    def __call__(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))

    def to_spectrum(self, x: Tensor) -> Tensor:
        return self.outer.to_spectrum(self.inner(x)) if self._known.inner_turns else self._known.part.to_spectrum(x)

    def from_spectrum(self, coordinates: Tensor) -> Tensor:
        states = self._known.part.from_spectrum(coordinates)
        return self.inner.adjoint(states) if self._known.inner_turns else states

    def singular_values(self, shape: Sequence[int]) -> Tensor:
        return self._known.part.singular_values(shape)

    @cached_property
    def _known(self) -> "_KnownPart":
        if not self.has_spectrum:
            raise self._no_spectrum()
        turns = self.inner.is_orthogonal and self.outer.has_spectrum
        return _KnownPart(self.outer if turns else self.inner, turns)


class _KnownPart:
    """The part of a composition whose singular values are those of the whole; the other part is orthogonal."""

    def __init__(self, part: Operator, inner_turns: bool):
        self.part, self.inner_turns = part, inner_turns


class PhysicsOperator(Operator):
    """A linear physics object of `deepinv`, or any other with methods A(x) and A_adjoint(y), as an operator.

    It is evaluated in the dtype of its own tensors.

    Args:
        physics: the object; its pseudo-inverse is A_dagger(y), if it has one.
        noise_std: see `Operator`; None for the attribute noise_model.sigma of the object, 0 if it has none.

    Raises:
        TypeError: the object lacks one of the methods.
    """

    def __init__(self, physics: Any, noise_std: float | Tensor | None = None):
        check_instance("physics", physics, "A", "A_adjoint")
        sigma = getattr(getattr(physics, "noise_model", None), "sigma", 0.0)
        sigma = sigma.squeeze() if isinstance(sigma, Tensor) else sigma
        super().__init__(sigma if noise_std is None else noise_std)
        self.physics = physics

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(self.physics.A, x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._apply(self.physics.A_adjoint, y)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        if not callable(getattr(self.physics, "A_dagger", None)):
            raise self._no_spectrum()
        return self._apply(self.physics.A_dagger, y)

    def _apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return function(x) in the dtype of x, computed in that of the object's tensors."""
        x = floating(x)
        physics = self.physics
        tensors = [*physics.parameters(), *physics.buffers()] if isinstance(physics, nn.Module) else []
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), x.dtype)
        return function(x.to(dtype)).to(x.dtype)


def as_operator(operator: Any) -> Operator:
    """Return an `Operator` unchanged, and a linear physics object of `deepinv` as a `PhysicsOperator`.

    Args:
        operator: an `Operator`, or an object with methods A(x) and A_adjoint(y).

    Raises:
        TypeError: the object is neither.
    """
    if isinstance(operator, Operator):
        return operator
    if not isinstance(operator, type) and all(callable(getattr(operator, name, None)) for name in ("A", "A_adjoint")):
        return PhysicsOperator(operator)
    kind = f"the class {operator.__name__}: call it" if isinstance(operator, type) else repr(operator)
    raise TypeError(
        "an operator must be one of scoresde.inverse, such as Inpainting(mask), or an object with A and A_adjoint; got "
        f"{kind}"
    )


def check_linear(operator: Operator, method: str) -> None:
    """Raise TypeError unless the operator is linear; the message names the method that needs it."""
    if not operator.is_linear:
        raise TypeError(f"{method} needs a linear operator; got {operator!r}: use DPS or the particle sampler")


def positive_std(operator: Operator, what: str) -> Tensor:
    """Return the noise_std of the operator; raise ValueError, which says that `what` needs noise, if a value is 0."""
    if bool((operator.noise_std == 0).any()):
        raise ValueError(f"{what} needs noise_std > 0; got {operator!r}: give the operator a small noise_std")
    return operator.noise_std


def check_measurement(y: Tensor, expected: Tensor) -> None:
    """Raise an error unless y is (B, *m) or (1, *m), for the noiseless measurements `expected` (B, *m)."""
    check_real("y", y)
    if y.ndim != expected.ndim or y.shape[1:] != expected.shape[1:] or len(y) not in (1, len(expected)):
        shape = tuple(expected.shape[1:])
        raise ValueError(
            f"y must be one measurement {shape}, or one for each of the {len(expected)} samples, "
            f"{tuple(expected.shape)}; got {tuple(y.shape)}: measure with the same operator, y = operator(x)"
        )


def checked_mask(mask: Any) -> Tensor:
    """Return a mask as bools; raise an error unless it has entries 0 and 1, or bools, at least one of them true."""
    try:
        values = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"mask must be a tensor of bools; got {type(mask).__name__}") from error
    check_real("mask", values)
    if not bool(((values == 0) | (values == 1)).all()):
        raise ValueError(f"mask must have the entries 0 and 1; got {listed(values.flatten())}: compare it, mask > 0.5")
    if not values.ndim or not bool(values.any()):
        raise ValueError(
            f"mask must be true somewhere, where the state is measured; got {tuple(values.shape)} of zeros"
        )
    return values.bool()


def check_trailing(name: str, x: Tensor, shape: Sequence[int], what: str = "") -> None:
    """Raise ValueError unless x is (B, *shape) or (B, C, *shape)."""
    count, shape = len(shape), tuple(shape)
    if x.ndim - count not in (1, 2) or tuple(x.shape[x.ndim - count :]) != shape:
        text = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be (B, {text}) or (B, C, {text}){what}; got {tuple(x.shape)}")


def singular_axes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values of a matrix (m, D), (D,) with zeros at the end, and V^T (D, D).

    Singular values below the rounding error of float64 are 0.
    """
    _, s, axes = torch.linalg.svd(matrix, full_matrices=True)
    s = torch.where(s > s[:1] * max(matrix.shape) * torch.finfo(s.dtype).eps, s, 0.0)
    return torch.cat((s, s.new_zeros(matrix.shape[1] - len(s)))), axes


def _range(std: Tensor) -> str:
    low, high = float(std.min()), float(std.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
