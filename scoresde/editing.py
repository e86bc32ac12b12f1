"""Editing: interpolation between data, and edits that go some of the way to noise and back.

The probability flow gives every x a latent, x(t_max), and takes every latent back. A path between the latents of x and
y is carried back to a path between x and y (2010.02502, section 5.3): `interpolate`.

Without the flow, x is noised to a time t, x_t = alpha x + sigma eps, and any sampler goes on from there: what is finer
than the noise at t is drawn anew, what is coarser stays (SDEdit, 2108.01073, section 3): `perturb_and_denoise`. From a
point between two such states it is the interpolation of 2006.11239, section 4.3: `interpolate_noised`.

A sampler that starts at t instead of t_max is `From(sampler, t)`, itself a sampler.
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

OPPOSITE = 1e-6  # radians from a half turn: there is no one way around
REMNANT = 0.1  # of a transition: less of it is left to the next one


class From(Sampler):
    """A sampler from a time t instead of t_max: the same transitions below t, the first of them cut at t.

    A remnant of less than a tenth of the transition cut is joined to the next one: the coefficients of a multistep
    method divide by the length of its steps. Where the transitions of the sampler rise again they stay below t.

    Args:
        sampler: a sampler for the whole way.
        t: where to start, in (t_min, t_max]; `x_T` of a call is then the state at t.

    Raises:
        TypeError: `sampler` is not a `Sampler`.
        ValueError: in a call, a t outside of (t_min, t_max], or at which the sampler has ended already.
    """

    def __init__(self, sampler: Sampler, t: float):
        if not isinstance(sampler, Sampler):
            raise TypeError(f"a Sampler expected; got {type(sampler).__name__}")
        super().__init__(sampler.denoise_final)
        self.sampler, self.t = sampler, float(t)

    def transitions(self, sde: SDE) -> list[Transition]:
        """Those of the sampler, from t on."""
        _check_time(sde, self.t)
        pairs = self.sampler.transitions(sde)
        crossing = next(((a, b) for a, b in pairs if b < self.t <= a), None)
        if crossing is None:
            ends = f"{float(pairs[0][0]):g} to {float(pairs[-1][1]):g}"
            raise ValueError(f"a time that the sampler passes expected; it goes from {ends}, and not past t={self.t:g}")
        margin = REMNANT * float(crossing[0] - crossing[1])
        return _below(pairs, self.t, margin) or _below(pairs, self.t, 0.0)

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> Sequence[Any]:
        """That of the sampler."""
        return self.sampler.plan(sde, transitions)

    def advance(self, model: BaseModel, x: Tensor, entry: Any, stream: RandomStream, memory: Any) -> tuple[Tensor, Any]:
        """As the sampler does."""
        return self.sampler.advance(model, x, entry, stream, memory)


def _below(pairs: Sequence[Transition], t: float, margin: float) -> list[Transition]:
    """The transitions with every time above t - margin moved to t, less those that then go nowhere."""
    top = torch.tensor(t, dtype=torch.float64)
    moved = [(a if a < t - margin else top, b if b < t - margin else top) for a, b in pairs]
    return [(a, b) for a, b in moved if a != b]


def slerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Spherical linear interpolation of states (B, *), each sample by itself, (B, *).

        sin((1 - w) theta)/sin(theta) first + sin(w theta)/sin(theta) second,        theta the angle between them:

    of two states of equal norm it has that norm for all w. For parallel states it is the linear interpolation.

    Raises:
        ValueError: states in opposite directions, such as any two of one dimension that differ in sign.
    """
    one, other = (float64(states).flatten(1) for states in (first, second))
    a, b = other.norm(dim=1, keepdim=True) * one, one.norm(dim=1, keepdim=True) * other
    angle = 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))  # unlike arccos, exact for small ones
    if opposite := (angle > math.pi - OPPOSITE).nonzero().flatten().tolist():
        raise ValueError(
            f"states that do not point in opposite directions expected; {len(opposite)} of {len(angle)} do, "
            f"{opposite[:8]} first: take mode='linear'"
        )

    def share(part: float) -> Tensor:
        """sin(part angle)/sin(angle), and its limit at 0."""
        return part * torch.sinc(part * angle / math.pi) / torch.sinc(angle / math.pi)

    return broadcast(share(1 - weight), first) * first + broadcast(share(weight), second) * second


def lerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Linear interpolation (1 - w) first + w second of states (B, *)."""
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
    """Data between x and y by their latents in the probability flow (2010.02502, section 5.3).

    Args:
        model: the model, in eval mode.
        x, y: data (B, *), in the model's space.
        weights: K of them: 0 gives x back and 1 gives y, as a round trip does; others than of [0, 1] go beyond.
        mode: "spherical", latents of independent noise keep their norm on the way; or "linear".
        cond: short for `model.given(cond)`, of x and of y.
        solver: `flow.DEFAULT_SOLVER` if not given.

    Returns:
        (K, B, *).

    Raises:
        ValueError: x and y of different shapes, weights that are not finite numbers (K,), an unknown mode, latents in
            opposite directions with mode "spherical"; a model with active dropout, or whose flow has no density.
        RuntimeError: samples that did not arrive.
    """
    _check_pair(x, y)
    numbers = _check_weights(weights)
    if mode not in MODES:
        raise ValueError(f"mode among {', '.join(MODES)} expected; got {mode!r}")
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
    """SDEdit: x noised to t, and sampled from there (2108.01073, section 3).

    Args:
        model: the model, in eval mode.
        x: data, or a sketch of it, (B, *), in the model's space.
        t: how far to go, in (t_min, t_max]: small times keep x, t_max is sampling afresh; of a noise-to-signal ratio
            r it is `sde.time` of -2 log r.
        sampler: any sampler; the part of its way below t is gone.
        cond: short for `model.given(cond)`.
        generator, seeds: randomness; with seeds, one per sample, a sample does not depend on its batch.
        options: further ones of a sampler's call: constraint, callback, trajectory, progress.

    Raises:
        ValueError: a state of integers, a t outside of (t_min, t_max], a number of seeds other than B.
        RuntimeError: samples that are NaN or infinite.
    """
    _check_time(model.sde, t)
    _check_state(x)
    noising, sampling = _streams(x, 2, generator, seeds)
    return From(sampler, t)(model, x_T=_noised(model.sde, x, t, noising), cond=cond, **sampling(), **options)


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
    """Data between x and y: both noised to t, (1 - w) x_t + w y_t, and sampled from there (2006.11239, section 4.3).

    All weights share their draws, in x_t, in y_t and in the sampler, so that the path is as smooth as the sampler.
    With weight 0 it is `perturb_and_denoise` of x.

    Args:
        model: the model, in eval mode.
        x, y: data (B, *), in the model's space.
        weights: K of them, finite.
        t: how far to go, in (t_min, t_max].
        sampler: any sampler.
        noise: "same", x_t and y_t have one eps, and what is between them has the noise that the model expects at t; or
            "independent", as published, where it has ((1 - w)^2 + w^2)^(1/2) of it, the least being 0.71 in the middle.
        cond: short for `model.given(cond)`.
        generator, seeds: randomness; with seeds, one per sample, a sample does not depend on its batch.

    Returns:
        (K, B, *).

    Raises:
        ValueError: as `perturb_and_denoise` and `interpolate`; another noise.
    """
    _check_time(model.sde, t)
    _check_pair(x, y)
    _check_state(x)
    _check_state(y)
    numbers = _check_weights(weights)
    if noise not in ("same", "independent"):
        raise ValueError(f"noise 'same' or 'independent' expected; got {noise!r}")
    first, sampling, second = _streams(x, 3, generator, seeds)
    x_t = _noised(model.sde, x, t, first)
    y_t = _noised(model.sde, y, t, first if noise == "same" else second)
    run = From(sampler, t)
    return torch.stack([run(model, x_T=lerp(x_t, y_t, w), cond=cond, **sampling()).x for w in numbers])


def _streams(
    x: Tensor, count: int, generator: torch.Generator | None, seeds: Sequence[int] | None
) -> list[Callable[[], dict[str, Any]]]:
    """`count` independent streams of draws for states like x, each of which can be had from its start many times.

    A stream is the arguments generator or seeds of `RandomStream`; the first ones do not depend on how many there are.
    """
    draws = RandomStream(generator, seeds, len(x))
    device = x.device if generator is None else generator.device

    def stream() -> Callable[[], dict[str, Any]]:
        numbers = draws.seeds(len(x))
        if seeds is not None:
            return lambda: {"seeds": numbers}
        return lambda: {"generator": torch.Generator(device).manual_seed(numbers[0])}

    return [stream() for _ in range(count)]


def _noised(sde: SDE, x: Tensor, t: float, stream: Callable[[], dict[str, Any]]) -> Tensor:
    """A draw of x_t given x (B, *)."""
    return sde.perturb(x, float64(t), RandomStream(**stream()).normal(x))


def _check_time(sde: SDE, t: float) -> None:
    if not sde.t_min < t <= sde.t_max:
        raise ValueError(f"a time in ({sde.t_min:g}, {sde.t_max:g}] expected; got t={t}")


def _check_state(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"states in the model's space, of floating point, expected; got {x.dtype}: transform it first")


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim < 2:
        raise ValueError(f"x and y of one shape (B, *) expected; got {tuple(x.shape)} and {tuple(y.shape)}")


def _check_weights(weights: Sequence[float] | Tensor) -> list[float]:
    numbers = float64(weights)
    if numbers.ndim != 1 or not len(numbers) or not bool(torch.isfinite(numbers).all()):
        raise ValueError(f"finite weights (K,), one or more, expected; got {weights}")
    return numbers.tolist()
