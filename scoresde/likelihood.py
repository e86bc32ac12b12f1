"""Exact log-likelihood through the probability-flow ODE, and bits per dimension.

    log p(x) = log p_prior(x(t_max)) + integral of tr(d velocity / dx) dt from t_start to t_max,   x(t_start) = x

(1806.07366; 2011.13456, section 4.3 and eq. 39). The point is taken as x(t_min), the convention of the published code.
`encode` and `decode` are the two directions of the same ODE.

Bits per dimension of integer levels x under uniform dequantisation and an invertible transform T to model space:

    bits/dim = -[log p(T(x + u)) + log|det T'| - log q(u | x)] / (d log 2).

Scaling data to [0, 1] or [-1, 1] changes log p and log|det T'| by opposite amounts: the figure stays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scoresde.dequantization import Uniform
from scoresde.divergence import ExactTrace, Hutchinson, Trace
from scoresde.flow import DEFAULT_SOLVER, integrate
from scoresde.protocols import Condition, ScoreModel
from scoresde.solvers import Solver, Status
from scoresde.tensors import Noise, dimensions, float64, sum_dims


class Transform(Protocol):
    """An invertible map from data space to model space that knows its log-determinant."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def inverse(self, y: Tensor) -> Tensor: ...
    def log_det(self, x: Tensor) -> Tensor: ...


@dataclass
class LogProb:
    """log p(x) per sample.

    value: nats (B,), float64. stderr: standard error of the trace estimate (B,), or None where one probe gives none.
    latent: x(t_max), (B, *). nfe: evaluations (B,). status: a `solvers.Status` per sample (B,); where it is not OK,
    value is NaN and latent the last finite state.
    """

    value: Tensor
    stderr: Tensor | None
    latent: Tensor
    nfe: Tensor
    status: Tensor


@dataclass
class BitsPerDim:
    """Bits per dimension of a set of images.

    mean: over images. stderr: of that mean, over images (None for one image). per_image: (N,), float64.
    conventions: everything that moves the number.
    """

    mean: float
    stderr: float | None
    per_image: Tensor
    conventions: dict[str, str] = field(default_factory=dict)


def conventions(model: ScoreModel, transform: Transform, trace: Trace, solver: Solver, start: str) -> dict[str, str]:
    """What moves any likelihood of a model, in words."""
    return {
        "start": f"{start}, t_min={model.sde.t_min:g}",
        "trace": str(trace),
        "solver": str(solver),
        "transform": str(transform),
        "prior": f"N(0, {model.sde.prior_std:g}^2) at t_max={model.sde.t_max:g}",
    }


def log_prob(
    model: ScoreModel,
    x: Tensor,
    cond: Condition = None,
    trace: Trace | None = None,
    solver: Solver | None = None,
    seeds: Sequence[int] | None = None,
    t_start: float | None = None,
    generator: torch.Generator | None = None,
) -> LogProb:
    """log p(x) in nats, by the probability-flow ODE.

    Args:
        model: the score model, in eval mode.
        x: (B, *), taken as the state at t_start.
        cond: the network's condition.
        trace: `Hutchinson(probes=1)` by default, or `ExactTrace()`.
        solver: a fixed-cost Runge-Kutta by default.
        seeds: one per sample, for the probes; sample i then has the same value in any batch.
        t_start: t_min by default.
        generator: for the probes instead of seeds.

    Raises:
        ValueError: a model with active dropout, a state that is not finite, a t_start out of range.
    """
    return _log_prob(model, x, cond, trace, solver, _draws(x, seeds, generator), t_start)


def _log_prob(model, x, cond, trace, solver, noise: Noise, t_start: float | None) -> LogProb:
    _refuse_random_network(model)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("finite states expected; got NaN or infinity in x")
    sde, trace = model.sde, trace or Hutchinson()
    t_start = sde.t_min if t_start is None else t_start
    if not sde.t_min <= t_start < sde.t_max:
        raise ValueError(f"t_start in [{sde.t_min:g}, {sde.t_max:g}) expected; got {t_start}")
    solution = integrate(model, x.to(noise.dtype), t_start, sde.t_max, cond, solver, trace, noise)
    latent, divergence = solution.state
    value = sde.prior_log_prob(latent) + float64(divergence).mean(dim=1)
    value = torch.where(solution.status == Status.OK, value, math.nan)
    return LogProb(value, _standard_error(trace, divergence), latent.to(x), solution.nfe, solution.status)


def _standard_error(trace: Trace, divergence: Tensor) -> Tensor | None:
    """Of the mean over probes, each of which gives an unbiased integral of its own."""
    if isinstance(trace, ExactTrace):
        return torch.zeros(divergence.shape[0], dtype=torch.float64, device=divergence.device)
    count = divergence.shape[1]
    return float64(divergence).std(dim=1) / math.sqrt(count) if count > 1 else None


def encode(
    model: ScoreModel, x: Tensor, cond: Condition = None, solver: Solver | None = None, t_start: float | None = None
) -> Tensor:
    """The latent x(t_max) (B, *) of data x (B, *) taken as x(t_start), t_min by default."""
    _refuse_random_network(model)
    sde = model.sde
    return integrate(model, x, sde.t_min if t_start is None else t_start, sde.t_max, cond, solver).state[0]


def decode(
    model: ScoreModel, z: Tensor, cond: Condition = None, solver: Solver | None = None, t_end: float | None = None
) -> Tensor:
    """The data x(t_end) (B, *), t_min by default, of a latent z (B, *) = x(t_max): the inverse of `encode`."""
    _refuse_random_network(model)
    sde = model.sde
    return integrate(model, z, sde.t_max, sde.t_min if t_end is None else t_end, cond, solver).state[0]


def bits_per_dim(
    model: ScoreModel,
    images: Tensor,
    transform: Transform,
    cond: Condition = None,
    dequantization: Uniform | None = None,
    samples: int = 1,
    trace: Trace | None = None,
    solver: Solver | None = None,
    seeds: Sequence[int] | None = None,
    start: str = "data",
    batch_size: int = 256,
    progress: bool = False,
) -> BitsPerDim:
    """Bits per dimension of images of integer levels.

    Args:
        model: the score model, in eval mode.
        images: integer levels (N, *), of any dtype.
        transform: from levels (and the values between them) to model space, with its log-determinant.
        cond: the network's condition, leading N.
        dequantization: `Uniform()` by default.
        samples: K dequantisations per image, averaged in probability (an importance-weighted bound, 1509.00519).
            Exponentiation turns the noise of a random trace into a bias upward: take `ExactTrace()` for K > 1.
        trace, solver: see `log_prob`.
        seeds: one per image; default 0, 1, 2, ..., so that the figure is reproducible.
        start: "data" takes the dequantised point as x(t_min), as the published code does. "perturb" noises it to
            t_min and adds the Gaussian decoder's residual term, a lower bound on the likelihood (2101.09258, B.2).
        batch_size: images at a time.
        progress: show a progress bar.

    Raises:
        ValueError: values that are not integers (continuous data has no bits: use `log_prob`, in nats), samples < 1,
            an unknown start, or K > 1 with a random trace.
        RuntimeError: a solve that failed, with the images concerned.
    """
    trace, solver, dequantization = trace or Hutchinson(), solver or DEFAULT_SOLVER, dequantization or Uniform()
    if not bool((images == images.round()).all()):
        raise ValueError("integer grey levels expected; continuous data has no bits per dimension: use log_prob (nats)")
    if samples < 1:
        raise ValueError(f"one sample or more expected; got samples={samples}")
    if start not in ("data", "perturb"):
        raise ValueError(f"start 'data' or 'perturb' expected; got {start!r}")
    if samples > 1 and not isinstance(trace, ExactTrace):
        raise ValueError("an ExactTrace expected with samples > 1: averaging exp(noisy log p) inflates the likelihood")
    seeds = range(len(images)) if seeds is None else seeds
    rows = []
    for first in tqdm(range(0, len(images), batch_size), desc="bits/dim", disable=not progress):
        part = slice(first, first + batch_size)
        batch = images[part]
        noise = _draws(batch, seeds[part], None)
        log_likelihoods = [
            _log_likelihood(model, batch, transform, _take(cond, part), dequantization, trace, solver, noise, start)
            for _ in range(samples)
        ]
        rows.append(torch.stack(log_likelihoods).logsumexp(dim=0) - math.log(samples))
    per_image = -torch.cat(rows).cpu() / (dimensions(images) * math.log(2))
    if bool(failed := (~torch.isfinite(per_image)).any()):
        indices = torch.nonzero(~torch.isfinite(per_image)).flatten().tolist()
        raise RuntimeError(
            f"the solver failed for {len(indices)} of {len(images)} images, {indices[:8]} first: {failed}"
        )
    declared = {
        "quantity": "bits per dimension" + (" (upper bound)" if start == "perturb" or samples > 1 else ""),
        "dequantization": f"{dequantization}, {samples} per image",
        **conventions(model, transform, trace, solver, start),
    }
    count = len(per_image)
    stderr = float(per_image.std()) / math.sqrt(count) if count > 1 else None
    return BitsPerDim(float(per_image.mean()), stderr, per_image, declared)


def _log_likelihood(model, images, transform, cond, dequantization, trace, solver, noise: Noise, start: str) -> Tensor:
    """Log-probability of the levels, one dequantisation, in nats (B,)."""
    levels, log_q = dequantization.sample(images, noise)
    x = transform(levels)
    offset = transform.log_det(levels) - log_q
    if start == "perturb":
        x, residual = _perturb(model, x, cond, noise)
        offset = offset + residual
    return _log_prob(model, x, cond, trace, solver, noise, None).value + offset


def _perturb(model: ScoreModel, x: Tensor, cond: Condition, noise: Noise) -> tuple[Tensor, Tensor]:
    """(x_t at t_min, log N(x; E[x_0 | x_t], (sigma/alpha)^2) - log q(x_t | x) in nats (B,))."""
    sde = model.sde
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    eps = noise.normal()
    perturbed = sde.perturb(x, t, eps)
    ratio = sde.sigma(t) / sde.alpha(t)
    with torch.no_grad():
        error = (x - model.predict(perturbed, t, cond).denoised) / float(ratio)
    # Both densities share log(2 pi) and log(sigma); what is left of the scales is log(alpha), once per dimension.
    return perturbed, 0.5 * (sum_dims(eps.square()) - sum_dims(error.square())) + dimensions(x) * sde.alpha(t).log()


def _draws(x: Tensor, seeds: Sequence[int] | None, generator: torch.Generator | None) -> Noise:
    """Draws for states like x in the likelihood's dtype: float64 where the device has it."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return Noise(x.shape, generator, seeds, x.device, dtype)


def _take(cond: Condition, part: slice) -> Condition:
    if cond is None or isinstance(cond, Tensor):
        return cond if cond is None else cond[part]
    return {key: value[part] for key, value in cond.items()}


def _refuse_random_network(model: ScoreModel) -> None:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    for module in modules:
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError("a deterministic network expected; this one has active dropout: call model.eval() first")
