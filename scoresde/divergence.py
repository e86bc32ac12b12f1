"""The trace of a Jacobian: exact, or by Hutchinson's estimator.

The divergence of a vector field v at x is tr(dv/dx). For probes with E[z z^T] = I it is E[z^T (dv/dx) z]
(Hutchinson 1990; FFJORD, 1810.01367, section 3.1), and z^T dv/dx is one vector-Jacobian product: an evaluation of v and
its divergence costs one forward and one backward pass.

A trace is bound to a stream of draws (`bind`) before an integration; the bound estimator maps (v, x) to the value of v
(B, *) and the estimates (B, m), one per probe, in float64. Nothing is kept on the trace itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def bind(self, noise: Noise) -> Estimator:
        """The estimator that draws its probes from `noise`."""
        draw = noise.rademacher if self.distribution == "rademacher" else noise.normal
        kept = None if self.resample else [draw() for _ in range(self.probes)]

        def estimate(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
            probes = kept or [draw() for _ in range(self.probes)]
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                value = field(x)
            products = [torch.autograd.grad(value, x, z, retain_graph=z is not probes[-1])[0] for z in probes]
            traces = [sum_dims(product * z) for product, z in zip(products, probes, strict=True)]
            return value.detach(), torch.stack(traces, dim=1)

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

    def bind(self, noise: Noise) -> Estimator:
        """The exact trace; draws nothing from `noise`."""

        def evaluate(field: Field, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                value = field(x)
            size = dimensions(x)
            basis = torch.eye(size, dtype=value.dtype, device=value.device).reshape(size, 1, *x.shape[1:])
            trace = torch.zeros(x.shape[0], 1, dtype=torch.float64, device=x.device)
            for rows in basis.split(self.chunk):
                cotangents = rows.expand(len(rows), *x.shape)
                (products,) = torch.autograd.grad(value, x, cotangents, retain_graph=True, is_grads_batched=True)
                trace += sum_dims((products * rows).transpose(0, 1))[:, None]
            return value.detach(), trace

        return evaluate


Trace = Hutchinson | ExactTrace
