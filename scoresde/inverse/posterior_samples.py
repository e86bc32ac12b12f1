"""Samples of the posterior p(x | y) of a measurement y, by the name of a method.

| method | module | its options are arguments of |
| --- | --- | --- |
| "dps", "pigdm", "mmps" | `posterior_models` | `DPS`, `PiGDM`, `MMPS` |
| "trained" | `trained_inpainting` | `TrainedInpainting`, with a network that was trained for it |
| "replacement" | `constraints` | `Replacement` |
| "repaint" | `constraints` | `RePaint`, its own sampler |
| "ddrm", "ddnm" | `spectral` | `DDRM`, `DDNM`, samplers |
| "particles" | `twisted_particles` | `TwistedParticles`, and `twist` and `batch_size` of its call |

A method may also be a function of the model, the operator and the measurement that returns an object of one of these
classes, or another model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.inverse.constraints import RePaint, Replacement
from scoresde.inverse.operators import Operator, as_operator
from scoresde.inverse.posterior_models import DPS, MMPS, Measured, PiGDM
from scoresde.inverse.spectral import DDNM, DDRM
from scoresde.inverse.trained_inpainting import TrainedInpainting
from scoresde.inverse.twisted_particles import TwistedParticles
from scoresde.protocols import Model
from scoresde.result_table import Result, cost, counted, plus_minus, range_of, states
from scoresde.samplers import Ancestral, PredictorCorrector, Sampler
from scoresde.samplers.sampler import StateConstraint
from scoresde.score import device_of
from scoresde.tensors import check_integer, check_real
from scoresde.wrappers import for_inference

STEPS = 100
MODELS: dict[str, Callable[..., Measured]] = {"dps": DPS, "pigdm": PiGDM, "mmps": MMPS, "trained": TrainedInpainting}
SPECTRAL: dict[str, Callable[..., Sampler]] = {"ddrm": DDRM, "ddnm": DDNM}
METHODS = (*MODELS, "replacement", "repaint", *SPECTRAL, "particles")
CALL_OPTIONS = ("twist", "batch_size")  # of `TwistedParticles.__call__`


@dataclass(repr=False)
class PosteriorSamples(Result):
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

    def heading(self) -> str:
        return (
            f"PosteriorSamples: {counted(len(self.x), 'sample')}{'' if self.log_weights is None else ' with weights'}"
        )

    def rows(self) -> dict[str, str]:
        evidence = (
            {} if self.log_evidence is None else {"log p(y)": f"{plus_minus(self.log_evidence, self.stderr)} nats"}
        )
        rows = {"states": states(self.x), "range": range_of(self.x)}
        return {**rows, **evidence, "evaluations": cost(self.nfe, self.backward)}


def sample_posterior(
    model: Model,
    operator: Any,
    y: Tensor,
    n: int,
    method: str | Callable[..., Any] = "mmps",
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
        method: "dps", "pigdm", "mmps", "trained", "replacement", "repaint", "ddrm", "ddnm", "particles"; or a function
            (model, operator, y) -> a posterior model, a constraint, a sampler or a `TwistedParticles`.
        sampler: default: 100 ancestral steps; None for the methods that are samplers themselves.
        seeds, generator: one seed per sample, or a generator for the batch. The particles of "particles" are one batch,
            with one seed, seeds=[seed].
        cond: condition of the prior, short for `model.given(cond)`.
        shape: the shape `*` of one state; default: that of A^T y. Where y could be one measurement, or one for each
            sample of states of another rank, y is taken as one measurement.
        dtype, progress: see `Sampler`.
        options: arguments of the method, such as scale=2 or iterations=5.

    Raises:
        ValueError: the method is unknown, or takes no sampler; y does not fit the operator; the particles have more
            than one seed; see also the method and the sampler.
        TypeError: an argument is of the wrong kind, or the method needs another kind of operator.
    """
    check_integer("n", n, 0)
    check_real("y", y)
    operator, model = as_operator(operator), for_inference(model, cond)
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not isinstance(method, str) and not callable(method):
        raise TypeError(f"method must be a name or a function (model, operator, y) -> model; got {method!r}")
    part = _part(method, model, operator, y, options)
    if sampler is not None and is_sampler(part):
        name = repr(method) if isinstance(method, str) else type(part).__name__
        raise ValueError(f"method {name} is a sampler itself; got sampler=...: leave it out, and pass steps=...")
    event = state_shape(operator, y, n) if shape is None else tuple(shape)
    run: dict[str, Any] = {"shape": (n, *event), "generator": generator, "dtype": dtype, "progress": progress}
    run["device"] = device_of(model) or y.device
    if isinstance(part, TwistedParticles):
        return _particles(part, model, operator, y, seeds, {**run, **_chosen(options, CALL_OPTIONS)})
    if sampler is None:
        sampler = part if isinstance(part, Sampler) else PredictorCorrector(Ancestral(), steps=STEPS)
    if isinstance(part, RePaint):
        constraint: StateConstraint | None = Replacement(operator, y)
    else:
        constraint = part if isinstance(part, StateConstraint) else None
    prior = model if isinstance(part, (Sampler, StateConstraint)) else part
    samples = sampler(prior, constraint=constraint, seeds=seeds, **run)
    return PosteriorSamples(samples.x, samples.nfe, samples.backward)


def is_sampler(part: Any) -> bool:
    """Return whether a part of a method is a sampler itself, so that it takes no other."""
    return isinstance(part, (Sampler, TwistedParticles))


def _part(
    method: str | Callable[..., Any], model: Model, operator: Operator, y: Tensor, options: dict[str, Any]
) -> Any:
    """Return what the method consists of: a posterior model, a constraint, or a sampler."""
    if method == "repaint":
        return RePaint(**options)
    if method == "replacement":
        return Replacement(operator, y, **options)
    if method == "particles":
        return TwistedParticles(**{name: value for name, value in options.items() if name not in CALL_OPTIONS})
    if isinstance(method, str) and method in SPECTRAL:
        return SPECTRAL[method](operator, y, **options)
    build = MODELS[method] if isinstance(method, str) else method
    return build(model, operator, y, **options)


def _particles(
    sampler: TwistedParticles, model: Model, operator: Operator, y: Tensor, seeds: Any, run: dict[str, Any]
) -> PosteriorSamples:
    """Return the particles of one run with their weights and the evidence."""
    if seeds is not None and len(seeds) != 1:
        raise ValueError(f"seeds must be one seed for all particles, seeds=[seed]; got {len(seeds)}")
    result = sampler(model, operator, y, seed=None if seeds is None else seeds[0], **run)
    counts = result.nfe, result.backward
    return PosteriorSamples(result.x, *counts, result.log_weights, result.log_evidence, result.stderr)


def _chosen(options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


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
        f"y must be one measurement of {operator!r}, or one for each of the n={n} samples; got "
        f"{tuple(y.shape)}{reason}: operator(x[None])[0] is the measurement of a state x in model space"
    )
