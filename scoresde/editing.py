"""Editing: interpolation between data, and edits that go part of the way to noise and back.

The probability flow maps every x to a latent x(t_max), and every latent back. A path between the latents of x and y is
mapped back to a path between x and y (2010.02502, section 5.3): `interpolate`.

Without the flow, x is noised to a time t, x_t = alpha x + sigma eps, and a sampler continues from there: details finer
than the noise at t are drawn anew, coarser details stay (SDEdit, 2108.01073, section 3): `perturb_and_denoise`.
Starting from a point between two such states gives the interpolation of 2006.11239, section 4.3: `interpolate_noised`.

`From(sampler, t)` is a sampler that starts at t instead of t_max.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.likelihood import decode, encode
from scoresde.protocols import Model
from scoresde.random_stream import RandomStream
from scoresde.samplers.grids import Transition
from scoresde.samplers.sampler import Sampler, Samples
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.solvers import Solver
from scoresde.tensors import broadcast, float64

OPPOSITE = 1e-6  # radians from a half turn, within which the direction of rotation is not defined
REMNANT = 0.1  # fraction of a transition below which the rest of it is joined to the next one


class From(Sampler):
    """A sampler that starts at a time t instead of t_max: it makes the transitions of `sampler` below t.

        x = ss.editing.From(sampler, t=0.5)(model, x_T=x_t, seeds=range(len(x_t))).x  # x_t: states at t = 0.5

    The transition that contains t is shortened to start at t. If less than a tenth of it is left, it is joined to the
    next one, because the coefficients of a multistep method divide by the lengths of the steps. A transition that
    goes back to more noise goes no further than t.

    Args:
        sampler: a sampler from t_max to t_min.
        t: start time, in (t_min, t_max]; `x_T` of a call is then the state at t.

    Raises:
        TypeError: `sampler` is not a `Sampler`.
        ValueError: in a call, t is outside of (t_min, t_max], or not a time that the sampler passes.
    """

    def __init__(self, sampler: Sampler, t: float):
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be a Sampler; got {type(sampler).__name__}")
        super().__init__(sampler.denoise_final)
        self.sampler, self.t = sampler, float(t)

    def transitions(self, sde: SDE) -> list[Transition]:
        """Return the transitions of the inner sampler below t, cut off as the class docstring explains."""
        if not sde.t_min < self.t <= sde.t_max:
            raise ValueError(f"t must be in ({sde.t_min:g}, {sde.t_max:g}]; got t={self.t:g}")
        pairs = self.sampler.transitions(sde)
        crossing = next(((a, b) for a, b in pairs if b < self.t <= a), None)
        if crossing is None:
            ends = f"goes from {float(pairs[0][0]):g} to {float(pairs[-1][1]):g}" if pairs else "has no transitions"
            raise ValueError(f"t must be a time that the sampler passes; got t={self.t:g}, but the sampler {ends}")
        margin = REMNANT * float(crossing[0] - crossing[1])
        return _below(pairs, self.t, margin) or _below(pairs, self.t, 0.0)

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> Sequence[Any]:
        """Return the plan of the inner sampler: the argument `entry` of `advance` for each of the given transitions."""
        return self.sampler.plan(sde, transitions)

    def advance(self, model: BaseModel, x: Tensor, entry: Any, stream: RandomStream, memory: Any) -> tuple[Tensor, Any]:
        """Take one step of the inner sampler."""
        return self.sampler.advance(model, x, entry, stream, memory)

    def denoise(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Apply the final denoising of the inner sampler."""
        return self.sampler.denoise(model, x, t, stream)


def _below(pairs: Sequence[Transition], t: float, margin: float) -> list[Transition]:
    """Set all times >= t - margin to t, and return the transitions whose start and end then still differ."""
    top = torch.tensor(t, dtype=torch.float64)
    moved = [(a if a < t - margin else top, b if b < t - margin else top) for a, b in pairs]
    return [(a, b) for a, b in moved if a != b]


def slerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Return the spherical linear interpolation of states (B, *), separately for each sample, (B, *).

        sin((1 - w) theta)/sin(theta) first + sin(w theta)/sin(theta) second,        theta the angle between the two.

    Between two states of equal norm, the result has that norm for all w. For parallel states it is the linear
    interpolation.

    Args:
        first, second: states (B, *).
        weight: w, a number; 0 gives the first, 1 the second.

    Raises:
        ValueError: the states have different shapes or opposite directions (such as a positive and a negative number).
    """
    _check_pair(first, second)
    one, other = (float64(states).flatten(1) for states in (first, second))
    a, b = other.norm(dim=1, keepdim=True) * one, one.norm(dim=1, keepdim=True) * other
    angle = 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))  # unlike arccos, exact for small angles
    if opposite := (angle > math.pi - OPPOSITE).nonzero().flatten().tolist():
        raise ValueError(
            f"states in opposite directions have no spherical interpolation: {len(opposite)} of {len(angle)} pairs "
            f"(first {opposite[:8]}); use mode='linear'"
        )

    def share(part: float) -> Tensor:
        """Return sin(w theta)/sin(theta) for w = `part`, or its limit w for theta = 0."""
        return part * torch.sinc(part * angle / math.pi) / torch.sinc(angle / math.pi)

    return broadcast(share(1 - weight), first) * first + broadcast(share(weight), second) * second


def lerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Return the linear interpolation (1 - w) first + w second of states (B, *).

    Args:
        first, second: states (B, *).
        weight: w, a number; 0 gives the first, 1 the second.

    Raises:
        ValueError: the states have different shapes.
    """
    _check_pair(first, second)
    return (1 - weight) * first + weight * second


MODES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"spherical": slerp, "linear": lerp}


def interpolate(
    model: Model,
    x: Tensor,
    y: Tensor,
    weights: Sequence[float] | Tensor,
    mode: str = "spherical",
    cond: Any = None,
    solver: Solver | None = None,
) -> Tensor:
    """Interpolate between data x and y by their latents in the probability flow (2010.02502, section 5.3).

    Args:
        model: the model, in eval mode.
        x, y: data (B, *), in the model's space.
        weights: K numbers. 0 gives x, encoded and decoded, 1 gives y likewise; values outside [0, 1] extrapolate.
        mode: "spherical", under which latents of independent noise keep their norm, or "linear".
        cond: condition of x and y, short for `model.given(cond)`.
        solver: ODE solver, default `solvers.Adams()`.

    Returns:
        (K, B, *).

    Raises:
        ValueError: x and y of different shapes, weights that are not finite numbers (K,), an unknown mode, latents in
            opposite directions with mode "spherical"; a model in training mode, or one whose flow is not
            invertible (thresholding).
        RuntimeError: samples that did not reach the end of the flow.
    """
    _check_pair(x, y)
    numbers = _check_weights(weights)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    first, second = (encode(model, states, cond, solver) for states in (x, y))
    return torch.stack([decode(model, MODES[mode](first, second, w), cond, solver) for w in numbers])


def perturb_and_denoise(
    model: Model,
    x: Tensor,
    t: float,
    sampler: Sampler,
    cond: Any = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> Samples:
    """Add noise to x up to time t, and sample from there: SDEdit (2108.01073, section 3).

    Args:
        model: the model, in eval mode.
        x: data, or a sketch of it, (B, *), in the model's space.
        t: the time up to which noise is added, in (t_min, t_max]: small times keep x, t_max samples from scratch. The
            time of a noise-to-signal ratio r = sigma/alpha is `sde.time(-2 log r)`.
        sampler: any sampler; its transitions above t are left out.
        cond: condition, short for `model.given(cond)`.
        generator, seeds: source of randomness; with seeds, one per sample, a sample does not depend on its batch.
        options: further arguments of a sampler's call: constraint, callback, trajectory, progress.

    Raises:
        ValueError: x holds integers, t is outside of (t_min, t_max], or the number of seeds is not B.
        RuntimeError: samples are NaN or infinite.
    """
    draws = RandomStream(generator, seeds, len(x))
    x_t, sampling = _noised(model.sde, x, t, draws.seeds(len(x))), draws.seeds(len(x))
    return From(sampler, t)(model, x_T=x_t, cond=cond, seeds=sampling, **options)


def interpolate_noised(
    model: Model,
    x: Tensor,
    y: Tensor,
    weights: Sequence[float] | Tensor,
    t: float,
    sampler: Sampler,
    noise: str = "same",
    cond: Any = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Interpolate between x and y: add noise up to t, and sample from (1 - w) x_t + w y_t (2006.11239, section 4.3).

    All weights w share the random draws of x_t, of y_t and of the sampler, so the path is as smooth as the sampler. The
    result for w = 0 is `perturb_and_denoise` of x.

    Args:
        model: the model, in eval mode.
        x, y: data (B, *), in the model's space.
        weights: K finite numbers.
        t: the time up to which noise is added, in (t_min, t_max].
        sampler: any sampler.
        noise: "same": x_t and y_t share one eps, and the states between them have the noise that the model expects at
            t; or "independent", as published: the states between them have ((1 - w)^2 + w^2)^(1/2) times that noise,
            0.71 times at w = 1/2.
        cond: condition, short for `model.given(cond)`.
        generator, seeds: source of randomness; with seeds, one per sample, a sample does not depend on its batch.

    Returns:
        (K, B, *).

    Raises:
        ValueError: see `perturb_and_denoise` and `interpolate`; or `noise` is unknown.
    """
    _check_pair(x, y)
    numbers = _check_weights(weights)
    if noise not in ("same", "independent"):
        raise ValueError(f"noise must be 'same' or 'independent'; got {noise!r}")
    draws = RandomStream(generator, seeds, len(x))
    first, sampling, second = (draws.seeds(len(x)) for _ in range(3))
    x_t = _noised(model.sde, x, t, first)
    y_t = _noised(model.sde, y, t, first if noise == "same" else second)
    run = From(sampler, t)
    return torch.stack([run(model, x_T=lerp(x_t, y_t, w), cond=cond, seeds=sampling).x for w in numbers])


def _noised(sde: SDE, x: Tensor, t: float, seeds: Sequence[int]) -> Tensor:
    """Draw x_t given x (B, *)."""
    if not x.is_floating_point():
        raise ValueError(
            f"states must be floating-point numbers in the model's space; got {x.dtype}: apply the transform first"
        )
    return sde.perturb(x, float64(t), RandomStream(seeds=seeds).normal(x))


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim < 2:
        raise ValueError(f"x and y must have the same shape (B, *); got {tuple(x.shape)} and {tuple(y.shape)}")


def _check_weights(weights: Sequence[float] | Tensor) -> list[float]:
    numbers = float64(weights)
    if numbers.ndim != 1 or not len(numbers) or not bool(torch.isfinite(numbers).all()):
        raise ValueError(f"weights must be finite numbers (K,), at least one; got {weights}")
    return numbers.tolist()
