"""The trace of a Jacobian: exact, or by Hutchinson's estimator.

The divergence of a vector field v at x is tr(dv/dx). For probes with E[z z^T] = I it equals E[z^T (dv/dx) z]
(Hutchinson 1990; FFJORD, 1810.01367, section 3.1). z^T dv/dx is one vector-Jacobian product, so v and an estimate of
its divergence cost one forward and one backward pass.

For Rademacher probes the estimate has variance 2 sum_(i != j) S_ij^2, with S the symmetric part of the Jacobian J. The
product g = J^T z of a single probe bounds it: E|g|^2 = |J|_F^2, so in expectation, for d > 2,

    variance  <=  2 d/(d - 2) (|g|^2 - (z.g)^2 / d),

with equality if J is symmetric with a constant diagonal. For Gaussian probes, variance <= 2 |g|^2.

A trace is a `Hutchinson` or an `ExactTrace`. Before an integration, `trace.bind(stream, x)` returns an estimator: a
function of (v, x) that draws its probes from the stream and returns an `Evaluation`. The trace itself stores no draws.
A differentiable estimator keeps the autograd graph, for objectives that contain the trace (score matching) and for
differentiable likelihoods.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.arguments import checked
from scoresde.counting import vectorised
from scoresde.random_stream import RandomStream
from scoresde.tensors import dimensions, sum_dims

Field = Callable[[Tensor], Tensor]


class Evaluation(NamedTuple):
    """A field and the trace of its Jacobian at x.

    value: the field v(x), (B, *). estimates: m estimates of the trace, one per probe, float64 (B, m). variance: the
    variance of the mean of these estimates, float64 (B,): estimated from their spread, or an upper bound for one probe.
    """

    value: Tensor
    estimates: Tensor
    variance: Tensor


class Estimator(Protocol):
    """A function (field, x, rows) -> `Evaluation` of the field at x.

    It draws its probes from the stream given to `bind`. `rows` holds the indices in the batch of the samples in x; None
    if x is the whole batch.
    """

    def __call__(self, field: Field, x: Tensor, rows: Tensor | None = None) -> Evaluation: ...


@checked
@dataclass(frozen=True)
class Hutchinson:
    """Hutchinson's estimate z^T (dv/dx) z with random probes z.

    Args:
        probes: number m of probes per evaluation; each costs a backward pass.
        distribution: "rademacher" (-1 or 1; smaller variance) or "gaussian".
        resample: if True, draw new probes at every evaluation: the trajectory does not depend on the probes and the
            integral is linear in the estimates, so the integral stays unbiased and the errors average out along the
            trajectory. If False, draw the probes once, in `bind`, as the code of 2011.13456 does.

    Raises:
        ValueError: probes < 1, or distribution is unknown.
    """

    probes: int = 1
    distribution: str = "rademacher"
    resample: bool = True

    def __post_init__(self):
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1; got probes={self.probes}")
        if self.distribution not in ("rademacher", "gaussian"):
            raise ValueError(f"distribution must be 'rademacher' or 'gaussian'; got {self.distribution!r}")

    def kept(self) -> "Hutchinson":
        """Return this trace with resample=False.

        Its estimate is then a smooth function of x and t, which error control and comparisons need.
        """
        return replace(self, resample=False)

    def draw(self, stream: RandomStream, x: Tensor, rows: Tensor | None = None) -> list[Tensor]:
        """Draw the probes of one evaluation, each of the shape of x: (B, *), or (n, *) of the samples `rows` only."""
        draw = stream.rademacher if self.distribution == "rademacher" else stream.normal
        return [draw(x, rows) for _ in range(self.probes)]

    def bind(self, stream: RandomStream, x: Tensor, differentiable: bool = False) -> Estimator:
        """Return an estimator for states of the shape, dtype and device of x (B, *), with probes from `stream`.

        If `differentiable`, its results keep the autograd graph with respect to x and the parameters of the field.
        """
        fixed = None if self.resample else self.draw(stream, x)

        def estimate(field: Field, x: Tensor, rows: Tensor | None = None) -> Evaluation:
            probes = self.draw(stream, x, rows) if fixed is None else [z if rows is None else z[rows] for z in fixed]
            value, forms, squares = quadratic_forms(field, x, probes, differentiable)
            return Evaluation(value, forms, self._variance(forms, squares, dimensions(x)))

        return estimate

    def quadratic_form(self, field: Field, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return v (B, *) at x and z^T (dv/dx) z (B,) for given z (B, *), by a vector-Jacobian product."""
        value, forms, _ = quadratic_forms(field, x, [z])
        return value, forms[:, 0]

    def _variance(self, forms: Tensor, squares: Tensor, size: int) -> Tensor:
        """Return the variance (B,) of the mean of the m estimates; for m = 1, an upper bound.

        Args:
            forms: the estimates z.g, (B, m); letters as in the module docstring.
            squares: |g|^2, (B, m).
            size: d.
        """
        if self.probes > 1:
            return _sample_variance(forms) / self.probes
        if self.distribution == "rademacher" and size > 2:
            return (2 * size / (size - 2) * (squares - forms.square() / size)).clamp(min=0).squeeze(1)
        return 2 * squares.squeeze(1)

    def standard_error(self, integral: Tensor, variance: Tensor | None) -> Tensor | None:
        """Return the standard error (B,) of the divergence integrated along a path; None if it is unknown.

        With resample=True the errors of the evaluations are independent, so `variance` is the sum of their variances;
        for one probe the result is an upper bound (in mean square). With resample=False each probe has one error along
        the whole path, and the spread of the m integrals gives the standard error.

        Args:
            integral: the integral of each probe's estimates, (B, m).
            variance: sum_i w_i^2 variance_i over the evaluations with the solver's weights w_i, (B,); None if the
                solver does not report it.
        """
        if self.resample and variance is not None:
            return variance.sqrt()
        return (_sample_variance(integral) / self.probes).sqrt() if self.probes > 1 else None


@checked
@dataclass(frozen=True)
class ExactTrace:
    """The sum of the diagonal of the Jacobian, with one Jacobian product per dimension.

    Args:
        chunk: number of products computed at once; memory grows with it.
        mode: "reverse" for vector-Jacobian products, which store the network's activations; "forward" for
            Jacobian-vector products, which store only a few tensors of the size of x per product.

    Raises:
        ValueError: chunk < 1, or mode is unknown.
    """

    chunk: int = 64
    mode: str = "reverse"

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1; got chunk={self.chunk}")
        if self.mode not in ("reverse", "forward"):
            raise ValueError(f"mode must be 'reverse' or 'forward'; got {self.mode!r}")

    def kept(self) -> "ExactTrace":
        """Return self: the exact trace draws no probes."""
        return self

    def bind(self, stream: RandomStream, x: Tensor, differentiable: bool = False) -> Estimator:
        """Return the exact trace as an estimator (see `Hutchinson.bind`), which draws nothing from `stream`."""

        def evaluate(field: Field, x: Tensor, rows: Tensor | None = None) -> Evaluation:
            has_graph = differentiable or self.mode == "reverse"
            value, x = _evaluate(field, x, differentiable, fused=False) if has_graph else (field(x), x)

            def product(unit: Tensor) -> Tensor:
                """Return J^T u ("reverse" mode) or J u ("forward"), (B, *), for one unit vector u (1, *)."""
                direction = unit.expand(x.shape)
                if self.mode == "forward":
                    return torch.func.jvp(field, (x,), (direction.contiguous(),))[1]
                return torch.autograd.grad(value, x, direction, retain_graph=True, create_graph=differentiable)[0]

            size = dimensions(x)
            trace = sum_dims(torch.zeros_like(value))[:, None]
            for indices in torch.arange(size, device=x.device).split(self.chunk):
                unit = torch.nn.functional.one_hot(indices, size).to(value).reshape(-1, 1, *x.shape[1:])
                # Activation checkpointing recomputes the forward pass in each product: it must use the same attention
                # kernels and dropout masks as the first pass.
                with attention_kernels(fused=False), torch.set_grad_enabled(has_graph), vectorised(len(indices)):
                    products = torch.func.vmap(product, randomness="same")(unit)
                trace = trace + sum_dims((products * unit).transpose(0, 1))[:, None]
            trace = trace if differentiable else trace.detach()
            return Evaluation(value if differentiable else value.detach(), trace, torch.zeros_like(trace[:, 0]))

        return evaluate

    def quadratic_form(self, field: Field, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return v (B, *) at x and z^T (dv/dx) z (B,) for given z (B, *), by the Jacobian product that `mode` names."""
        if self.mode == "reverse":
            value, forms, _ = quadratic_forms(field, x, [z])
            return value, forms[:, 0]
        with attention_kernels(fused=False):
            value, product = torch.func.jvp(field, (x,), (z.contiguous(),))[:2]
        return value, sum_dims(product * z)

    def standard_error(self, integral: Tensor, variance: Tensor | None) -> Tensor:
        """Return zeros (B,), as the trace is exact."""
        return torch.zeros_like(integral[:, 0])


Trace = Hutchinson | ExactTrace


def quadratic_forms(
    field: Field, x: Tensor, probes: Sequence[Tensor], differentiable: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return v(x) (B, *), and z.g and |g|^2 with g = (dv/dx)^T z for each of the m probes z (B, *).

    z.g and |g|^2 are float64 (B, m).
    """
    value, x = _evaluate(field, x, differentiable, fused=not differentiable)
    forms, squares = [], []
    for z in probes:
        retain = differentiable or z is not probes[-1]
        (product,) = torch.autograd.grad(value, x, z, retain_graph=retain, create_graph=differentiable)
        forms.append(sum_dims(product * z))
        squares.append(sum_dims(product.square()))
    return value if differentiable else value.detach(), torch.stack(forms, dim=1), torch.stack(squares, dim=1)


def _sample_variance(values: Tensor) -> Tensor:
    """Return the unbiased variance (B,) over the m > 1 columns of values (B, m); B may be 0."""
    centred = values - values.mean(dim=1, keepdim=True)
    return centred.square().sum(dim=1) / (values.shape[1] - 1)


def attention_kernels(fused: bool) -> AbstractContextManager:
    """Return a context in which fused attention kernels are allowed only if `fused`.

    These kernels support neither second derivatives nor vmap.
    """
    return nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)


def _evaluate(field: Field, x: Tensor, differentiable: bool, fused: bool) -> tuple[Tensor, Tensor]:
    """Return v(x) and x, the tensor with respect to which autograd can differentiate v(x)."""
    if not (differentiable and x.requires_grad):
        x = x.detach().requires_grad_()
    with torch.enable_grad(), attention_kernels(fused):
        return field(x), x
