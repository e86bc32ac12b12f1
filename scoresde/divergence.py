"""The trace of a Jacobian: exact, or by Hutchinson's estimator.

The divergence of a vector field v at x is tr(dv/dx). For probes with E[z z^T] = I it is E[z^T (dv/dx) z]
(Hutchinson 1990; FFJORD, 1810.01367, section 3.1), and z^T dv/dx is one vector-Jacobian product: an evaluation of v and
its divergence costs one forward and one backward pass.

For Rademacher probes the estimate has the variance 2 sum_(i != j) S_ij^2, S the symmetric part of the Jacobian J. Of
one probe the product g = J^T z says more than the estimate z.g: E|g|^2 = |J|_F^2, whence in expectation, for d > 2,

    variance  <=  2 d/(d - 2) (|g|^2 - (z.g)^2 / d),

with equality where J is symmetric and its diagonal constant; and variance <= 2 |g|^2 for Gaussian probes.

A trace is bound to a stream of draws (`bind`) before an integration; the bound estimator maps (v, x) to an
`Evaluation`. Nothing is kept on the trace itself. A differentiable estimator leaves everything in the graph, for
objectives that are functions of the trace (score matching) and for likelihoods to differentiate.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.counting import vectorised
from scoresde.random_stream import RandomStream
from scoresde.tensors import dimensions, sum_dims

Field = Callable[[Tensor], Tensor]
MODES = ("reverse", "forward")


class Evaluation(NamedTuple):
    """A field and the trace of its Jacobian at x: `value` (B, *); `estimates` of the trace (B, m), float64, one per
    probe; `variance` of their mean (B,), float64, estimated, or bounded from above where there is one probe."""

    value: Tensor
    estimates: Tensor
    variance: Tensor


class Estimator(Protocol):
    """A trace bound to its draws; `rows` says which samples of the batch x holds, None for all of them."""

    def __call__(self, field: Field, x: Tensor, rows: Tensor | None = None) -> Evaluation: ...


@dataclass(frozen=True)
class Hutchinson:
    """z^T (dv/dx) z for random probes z.

    Args:
        probes: number of probes m of each evaluation, each a backward pass.
        distribution: "rademacher" (-1 or 1; the smaller variance) or "gaussian".
        resample: draw fresh probes at every evaluation. The trajectory does not depend on them and the integral is
            linear in the estimates, so it stays unbiased while their errors average along the trajectory. False keeps
            the first ones, as the published code does.

    Raises:
        ValueError: fewer than one probe, or an unknown distribution.
    """

    probes: int = 1
    distribution: str = "rademacher"
    resample: bool = True

    def __post_init__(self):
        if self.probes < 1:
            raise ValueError(f"one probe or more expected; got probes={self.probes}")
        if self.distribution not in ("rademacher", "gaussian"):
            raise ValueError(f"distribution 'rademacher' or 'gaussian' expected; got {self.distribution!r}")

    def draw(self, stream: RandomStream, x: Tensor, rows: Tensor | None = None) -> list[Tensor]:
        """The probes of one evaluation at x (B, *), or (n, *) of the rows given."""
        draw = stream.rademacher if self.distribution == "rademacher" else stream.normal
        return [draw(x, rows) for _ in range(self.probes)]

    def bind(self, stream: RandomStream, x: Tensor, differentiable: bool = False) -> Estimator:
        """The estimator for states like x (B, *) that draws its probes from `noise`; `differentiable` in x and in the
        field's parameters."""
        kept = None if self.resample else self.draw(stream, x)

        def estimate(field: Field, x: Tensor, rows: Tensor | None = None) -> Evaluation:
            probes = self.draw(stream, x, rows) if kept is None else [z if rows is None else z[rows] for z in kept]
            value, forms, squares = _products(field, x, probes, differentiable)
            return Evaluation(value, forms, self._variance(forms, squares, dimensions(x)))

        return estimate

    def _variance(self, forms: Tensor, squares: Tensor, size: int) -> Tensor:
        """Of the mean of the forms z.g (B, m), from their spread or, of one, from |g|^2 (B, m)."""
        if self.probes > 1:
            return forms.var(dim=1) / self.probes
        if self.distribution == "rademacher" and size > 2:
            return (2 * size / (size - 2) * (squares - forms.square() / size)).clamp(min=0).squeeze(1)
        return 2 * squares.squeeze(1)

    def standard_error(self, integral: Tensor, variance: Tensor | None) -> Tensor | None:
        """Of a divergence integrated along a path, (B,), or None where nothing is known of it.

        Args:
            integral: of each probe's estimates, (B, m).
            variance: sum_i w_i^2 variance_i over the evaluations, (B,), if the solver knows its weights.

        Errors at different evaluations are independent if the probes are fresh. Kept probes make one error each, and
        their integrals are independent of each other. From one probe it is an upper bound (in mean square).
        """
        if self.resample and variance is not None:
            return variance.sqrt()
        return integral.std(dim=1) / math.sqrt(self.probes) if self.probes > 1 else None


@dataclass(frozen=True)
class ExactTrace:
    """The sum of the diagonal of the Jacobian, by one product with it per dimension.

    Args:
        chunk: products computed at once; memory grows with it.
        mode: "reverse", vector-Jacobian products, which keep the network's activations; or "forward", Jacobian-vector
            products, which keep nothing: a few states for each product of a chunk.

    Raises:
        ValueError: a chunk below one, an unknown mode.
    """

    chunk: int = 64
    mode: str = "reverse"

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"a chunk of one or more expected; got {self.chunk}")
        if self.mode not in MODES:
            raise ValueError(f"mode 'reverse' or 'forward' expected; got {self.mode!r}")

    @property
    def probes(self) -> int:
        """The number of integrals that the trace is the mean of: one."""
        return 1

    def bind(self, stream: RandomStream, x: Tensor, differentiable: bool = False) -> Estimator:
        """The exact trace; draws nothing from `noise`; `differentiable` in x and in the field's parameters."""

        def evaluate(field: Field, x: Tensor, rows: Tensor | None = None) -> Evaluation:
            graph = differentiable or self.mode == "reverse"
            value, x = _evaluate(field, x, differentiable, fused=False) if graph else (field(x), x)
            products = self._reverse(value, x, differentiable) if self.mode == "reverse" else _forward(field, x)
            size = dimensions(x)
            trace = sum_dims(torch.zeros_like(value))[:, None]
            for rows_of_basis in torch.arange(size, device=x.device).split(self.chunk):
                unit = torch.nn.functional.one_hot(rows_of_basis, size).to(value).reshape(-1, 1, *x.shape[1:])
                # What a checkpoint computes again has the kernels and the dropout of the forward pass, in every row.
                with _kernels(fused=False), torch.set_grad_enabled(graph), vectorised(len(rows_of_basis)):
                    found = torch.func.vmap(products, randomness="same")(unit)
                trace = trace + sum_dims((found * unit).transpose(0, 1))[:, None]
            trace = trace if differentiable else trace.detach()
            return Evaluation(value if differentiable else value.detach(), trace, torch.zeros_like(trace[:, 0]))

        return evaluate

    @staticmethod
    def _reverse(value: Tensor, x: Tensor, differentiable: bool) -> Field:
        """u -> J^T u, for a unit vector u (1, *) in every sample."""

        def product(unit: Tensor) -> Tensor:
            cotangent = unit.expand(x.shape)
            return torch.autograd.grad(value, x, cotangent, retain_graph=True, create_graph=differentiable)[0]

        return product

    def standard_error(self, integral: Tensor, variance: Tensor | None) -> Tensor:
        """Zero."""
        return torch.zeros_like(integral[:, 0])


def _forward(field: Field, x: Tensor) -> Field:
    """u -> J u, for a unit vector u (1, *) in every sample."""
    return lambda unit: torch.func.jvp(field, (x,), (unit.expand(x.shape).contiguous(),))[1]


Trace = Hutchinson | ExactTrace


def quadratic_forms(
    field: Field, x: Tensor, probes: Sequence[Tensor], differentiable: bool = False
) -> tuple[Tensor, Tensor]:
    """The value v (B, *) of a field at x (B, *), and z^T (dv/dx) z of each probe z (B, *), float64 (B, m)."""
    return _products(field, x, probes, differentiable)[:2]


def _products(field: Field, x: Tensor, probes: Sequence[Tensor], differentiable: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(v, z.g, |g|^2) with the product g = (dv/dx)^T z of each probe; the last two float64 (B, m)."""
    value, x = _evaluate(field, x, differentiable, fused=not differentiable)
    forms, squares = [], []
    for z in probes:
        retain = differentiable or z is not probes[-1]
        (product,) = torch.autograd.grad(value, x, z, retain_graph=retain, create_graph=differentiable)
        forms.append(sum_dims(product * z))
        squares.append(sum_dims(product.square()))
    return value if differentiable else value.detach(), torch.stack(forms, dim=1), torch.stack(squares, dim=1)


def _kernels(fused: bool) -> AbstractContextManager:
    """The attention kernels to use: the fused ones have neither a second derivative nor one of many rows at once."""
    return nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)


def _evaluate(field: Field, x: Tensor, differentiable: bool, fused: bool) -> tuple[Tensor, Tensor]:
    """The field at x with a graph between them, and that x."""
    if not (differentiable and x.requires_grad):
        x = x.detach().requires_grad_()
    with torch.enable_grad(), _kernels(fused):
        return field(x), x
