"""Samples of the posterior p(x | y) of a measurement y, by the name of a method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.inverse.operators import Operator, as_operator
from scoresde.inverse.posterior_models import DPS, MMPS, Measured, PiGDM
from scoresde.protocols import Model
from scoresde.samplers import Ancestral, PredictorCorrector, Sampler
from scoresde.score import device_of
from scoresde.tensors import check_integer, check_real
from scoresde.wrappers import for_inference

STEPS = 100
METHODS: dict[str, Callable[..., Measured]] = {"dps": DPS, "pigdm": PiGDM, "mmps": MMPS}


@dataclass
class PosteriorSamples:
    """Samples of a posterior.

    x: samples (n, *). nfe, backward: numbers of evaluations of the network and of backward passes. log_weights: the
    logarithms of the samples' weights, float64 (n,), None for equal weights. log_evidence, stderr: an estimate of
    log p(y) in nats with its standard error, None for methods without one.
    """

    x: Tensor
    nfe: int
    backward: int
    log_weights: Tensor | None = None
    log_evidence: float | None = None
    stderr: float | None = None


def sample_posterior(
    model: Model,
    operator: Any,
    y: Tensor,
    n: int,
    method: str | Callable[..., Model] = "mmps",
    sampler: Sampler | None = None,
    seeds: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    cond: Any = None,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    **options: Any,
) -> PosteriorSamples:
    """Draw n samples (n, *) of an approximation of p(x | y), for y = A(x) + noise_std * noise.

    Args:
        model: the model of the prior p(x), in eval mode.
        operator: an `Operator`, or a linear physics object of `deepinv`.
        y: one measurement `*m`, used for all samples, or one for each sample, (n, *m).
        method: "dps", "pigdm" or "mmps", see `posterior_models`; or a function (model, operator, y) -> model.
        sampler: default: 100 ancestral steps.
        seeds, generator: one seed per sample, or a generator for the batch.
        cond: condition of the prior, short for `model.given(cond)`.
        shape: the shape `*` of one state; default: that of A^T y. Where y could be one measurement or one for each
            sample, of states of another rank, it is taken as one measurement.
        dtype, progress: see `Sampler`.
        options: arguments of the method, such as scale=2 or iterations=5.

    Raises:
        ValueError: the method is unknown, y does not fit the operator, or as the method and the sampler say.
        TypeError: an argument is of the wrong kind, or the method needs another kind of operator.
    """
    check_integer("n", n, 0)
    check_real("y", y)
    operator, model = as_operator(operator), for_inference(model, cond)
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    build = METHODS[method] if isinstance(method, str) else method
    if not callable(build):
        raise TypeError(f"method must be a name or a function (model, operator, y) -> model; got {build!r}")
    posterior = build(model, operator, y, **options)
    event = state_shape(operator, y, n) if shape is None else tuple(shape)
    sampler = PredictorCorrector(Ancestral(), steps=STEPS) if sampler is None else sampler
    samples = sampler(
        posterior,
        shape=(n, *event),
        seeds=seeds,
        generator=generator,
        dtype=dtype,
        device=device_of(model) or y.device,
        progress=progress,
    )
    return PosteriorSamples(samples.x, samples.nfe, samples.backward)


def state_shape(operator: Operator, y: Tensor, n: int) -> tuple[int, ...]:
    """Return the shape `*` of the states whose measurement is y, `*m` or (n, *m): that of A^T y.

    Raises:
        ValueError: y is not a measurement of the operator, or the operator is nonlinear.
    """
    if not operator.is_linear:
        raise ValueError("the shape of a state does not follow from a nonlinear measurement: pass shape=(C, H, W)")
    errors = []
    for batch in [y[None]] + [y] * (y.ndim > 1 and len(y) in (1, n)):
        try:
            back = operator.adjoint(batch)
            if operator(back).shape == batch.shape:
                return tuple(back.shape[1:])
        except (ValueError, RuntimeError, IndexError) as error:
            errors.append(str(error))
    reason = f" ({errors[0]})" if errors else ""
    raise ValueError(
        f"y must be one measurement of {operator!r}, or one for each of the n={n} samples; got {tuple(y.shape)}{reason}"
    )
