"""The trace of a Jacobian: exact, or by Hutchinson's estimator.

The divergence of a vector field v at x is tr(dv/dx). For probes with E[z z^T] = I it is E[z^T (dv/dx) z]
(Hutchinson 1990; FFJORD, 1810.01367, section 3.1), and z^T dv/dx is one vector-Jacobian product: an evaluation of v and
its divergence costs one forward and one backward pass.

A trace is bound to a stream of draws (`bind`) before an integration; the bound estimator maps (v, x) to the value of v
(B, *) and the estimates (B, m), one per probe, in float64. Nothing is kept on the trace itself.

A differentiable estimator leaves both in the graph, for objectives that are functions of the trace (score matching).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.tensors import Noise, dimensions, sum_dims

Field = Callable[[Tensor], Tensor]
Estimator = Callable[[Field, Tensor], tuple[Tensor, Tensor]]


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

    def draw(self, noise: Noise) -> list[Tensor]:
        """The probes of one evaluation, each (B, *)."""
        draw = noise.rademacher if self.distribution == "rademacher" else noise.normal
        return [draw() for _ in range(self.probes)]

    def bind(self, noise: Noise, differentiable: bool = False) -> Estimator:
        """The estimator that draws its probes from `noise`; `differentiable` in x and in the field's parameters."""
        kept = None if self.resample else self.draw(noise)

        def estimate(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
            return quadratic_forms(field, x, kept or self.draw(noise), differentiable)

        return estimate


@dataclass(frozen=True)
class ExactTrace:
    """The sum of the diagonal of the Jacobian, by one vector-Jacobian product per dimension.

    Args:
        chunk: products computed at once; memory grows with it.
    """

    chunk: int = 64

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"a chunk of one or more expected; got {self.chunk}")

    def bind(self, noise: Noise, differentiable: bool = False) -> Estimator:
        """The exact trace; draws nothing from `noise`; `differentiable` in x and in the field's parameters."""

        def evaluate(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
            value, x = _evaluate(field, x, differentiable, fused=False)
            size = dimensions(x)
            basis = torch.eye(size, dtype=value.dtype, device=value.device).reshape(size, 1, *x.shape[1:])
            trace = torch.zeros(x.shape[0], 1, dtype=torch.float64, device=x.device)

            def product(row: Tensor) -> Tensor:
                cotangent = row.expand(x.shape)
                return torch.autograd.grad(value, x, cotangent, retain_graph=True, create_graph=differentiable)[0]

            for rows in basis.split(self.chunk):
                # What a checkpoint computes again has the kernels and the dropout of the forward pass, in every row.
                with _kernels(fused=False):
                    products = torch.func.vmap(product, randomness="same")(rows)
                trace = trace + sum_dims((products * rows).transpose(0, 1))[:, None]
            return value if differentiable else value.detach(), trace

        return evaluate


Trace = Hutchinson | ExactTrace


def quadratic_forms(
    field: Field, x: Tensor, probes: Sequence[Tensor], differentiable: bool = False
) -> tuple[Tensor, Tensor]:
    """The value v (B, *) of a field at x (B, *), and z^T (dv/dx) z of each probe z (B, *), float64 (B, m)."""
    value, x = _evaluate(field, x, differentiable, fused=not differentiable)
    forms = []
    for z in probes:
        retain = differentiable or z is not probes[-1]
        (product,) = torch.autograd.grad(value, x, z, retain_graph=retain, create_graph=differentiable)
        forms.append(sum_dims(product * z))
    return value if differentiable else value.detach(), torch.stack(forms, dim=1)


def _kernels(fused: bool) -> AbstractContextManager:
    """The attention kernels to use: the fused ones have neither a second derivative nor one of many rows at once."""
    return nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)


def _evaluate(field: Field, x: Tensor, differentiable: bool, fused: bool) -> tuple[Tensor, Tensor]:
    """The field at x with a graph between them, and that x."""
    if not (differentiable and x.requires_grad):
        x = x.detach().requires_grad_()
    with torch.enable_grad(), _kernels(fused):
        return field(x), x
