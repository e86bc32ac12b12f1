"""The one sampling loop: a list of transitions, and a step that makes each of them.

A sampler goes from the prior at t_max to data at t_min over transitions (t_from, t_to). What happens in a transition is
a step: it is given the state and returns the new one, and keeps nothing on itself. What can be known before the loop
(coefficients, in float64) is in the step's plan; what one transition leaves to the next (past evaluations of a
multistep method) is its memory. A step draws from the `RandomStream` that it is given, so a sample depends on its
seed alone. The loop itself never synchronises with the device.

Transitions may go up again, to more noise (RePaint, 2201.09865); `samplers.linear` says what its methods do there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from scoresde.counting import Evaluations, counting
from scoresde.progress import progress_bar
from scoresde.protocols import Model
from scoresde.random_stream import RandomStream
from scoresde.samplers.grids import Transition
from scoresde.score import BaseModel, device_of
from scoresde.sdes import SDE
from scoresde.wrappers import as_model

MOST_SIGNAL = math.log(0.1)  # log-SNR up to which noise may stand for the states at the first time of a grid

StepFunction = Callable[[BaseModel, Tensor, Tensor, Tensor, RandomStream], Tensor]
"""(model, x, t_from, t_to, noise) -> the state at t_to, from the state x (B, *) at t_from; times float64, ()."""


class Step(Protocol):
    """A step that prepares all transitions before the loop, and may remember.

    plan: one entry for each transition. advance: the state at the end of the transition of that entry, and what the
    next one may want to know; at first None.
    """

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> Sequence[Any]: ...
    def advance(
        self, model: BaseModel, x: Tensor, entry: Any, stream: RandomStream, memory: Any
    ) -> tuple[Tensor, Any]: ...


class FunctionStep:
    """A plain function as a step: its plan is the transitions, and it remembers nothing."""

    def __init__(self, function: StepFunction):
        self.function = function

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> Sequence[Transition]:
        """The transitions."""
        return transitions

    def advance(
        self, model: BaseModel, x: Tensor, entry: Transition, stream: RandomStream, memory: None
    ) -> tuple[Tensor, None]:
        """The function's state at the end of the transition."""
        return self.function(model, x, *entry, stream), None


def as_step(step: Step | StepFunction) -> Step:
    """A step, or a plain function as one.

    Raises:
        TypeError: neither.
    """
    if isinstance(step, type) or not ((hasattr(step, "plan") and hasattr(step, "advance")) or callable(step)):
        kind = f"the class {step.__name__}: make an instance" if isinstance(step, type) else type(step).__name__
        raise TypeError(
            f"a step with plan and advance, or a function (model, x, t_from, t_to, noise) -> x, expected; got {kind}"
        )
    if hasattr(step, "plan") and hasattr(step, "advance"):
        return step
    return FunctionStep(step)


def make_transition(
    step: Step | StepFunction, model: Model, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream
) -> Tensor:
    """The state at t_to, from x (B, *) at t_from and no past, by a single transition of a step."""
    step, model = as_step(step), as_model(model)
    (entry,) = step.plan(model.sde, [(t_from, t_to)])
    return step.advance(model, x, entry, stream, None)[0]


class Constraint(Protocol):
    """A projection after every transition: the state at t, from the state x (B, *) at t."""

    def __call__(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor: ...


@dataclass
class Samples:
    """What a sampler returns.

    x: samples (B, *) at t_min, denoised if asked for. nfe: evaluations of networks, counted where they run; backward:
    products with their Jacobians (backward passes) beside them. trajectory: the states after every kept transition, the
    first included, (K, B, *), or None.
    """

    x: Tensor
    nfe: int
    trajectory: Tensor | None
    backward: int = 0


class Sampler:
    """A list of transitions and what happens in each; the loop over them, once for every algorithm.

    A subclass defines `transitions` and `step`, or `plan` and `advance` if there is something to prepare or remember.

    Args:
        denoise_final: replace the last state by E[x_0 | x], one more evaluation.
    """

    def __init__(self, denoise_final: bool = False):
        self.denoise_final = denoise_final

    def transitions(self, sde: SDE) -> list[Transition]:
        """The pairs (t_from, t_to) to go through, from t_max to t_min, float64."""
        raise NotImplementedError(f"{type(self).__name__} must define transitions(sde)")

    def step(self, model: BaseModel, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream) -> Tensor:
        """The state at t_to; see `StepFunction`."""
        raise NotImplementedError(f"{type(self).__name__} must define step(model, x, t_from, t_to, noise)")

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> Sequence[Any]:
        """What can be computed before the loop, an entry for each transition."""
        return transitions

    def advance(self, model: BaseModel, x: Tensor, entry: Any, stream: RandomStream, memory: Any) -> tuple[Tensor, Any]:
        """The state after the transition of that entry, and what the next one may want to know; at first None."""
        t_from, t_to = entry
        return self.step(model, x, t_from, t_to, stream), None

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        cond: Any = None,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        constraint: Constraint | None = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        trajectory: bool | int = False,
        progress: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Samples:
        """Samples (B, *) at t_min.

        Args:
            model: the model, in eval mode.
            shape, x_T: the shape (B, *) of samples started from noise, or the states to start from, both at the first
                time of the grid: t_max, where noise is the prior, unless the grid says otherwise.
            cond: short for `model.given(cond)`.
            generator, seeds: randomness; with seeds, one per sample, a sample does not depend on its batch (what does
                says so: adapters of adaptive solvers, and a published rule of `Langevin`).
            constraint: applied to the state after each transition.
            callback: called with (index, t, x) after each transition; x is not to be written into.
            trajectory: True keeps the state after every transition, k after every k-th.
            progress: show a progress bar.
            device, dtype: of samples started from noise; by default the model's device and float32.

        Raises:
            ValueError: both or neither of shape and x_T, states that are not floating-point numbers (B, *), a number of
                seeds other than B, a shape where the grid starts at a time at which states are more than noise.
            RuntimeError: samples that are NaN or infinite.
        """
        if (every := int(trajectory)) < 0:
            raise ValueError(f"trajectory True, False or a positive number expected; got {trajectory}")
        model = as_model(model, cond)
        pairs = self.transitions(model.sde)
        x, noise = _start(model, pairs[0][0], shape, x_T, generator, seeds, device, dtype)
        memory, kept = None, [x] if every else []
        plan = progress_bar(self.plan(model.sde, pairs), title="sampling", unit="step", shown=progress)
        count = Evaluations()
        for i, (entry, (_, t)) in enumerate(zip(plan, pairs, strict=True)):
            with counting(count):  # what a callback evaluates is not part of it
                x, memory = self.advance(model, x, entry, noise, memory)
                if constraint is not None:
                    x = _constrained(constraint, model, x, t, noise)
            if callback is not None:
                callback(i, t, x)
            if every and (i + 1) % every == 0:
                kept.append(x)
        if self.denoise_final:
            with counting(count):
                x = model.predict(x, t).denoised
        _refuse_nan(x)
        return Samples(x, count.forward, torch.stack(kept) if kept else None, count.backward)


def _constrained(constraint: Constraint, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
    """The constrained state; another tensor where x was written into: it is not what a method remembers any more."""
    before = None if x.is_inference() else x._version
    constrained = constraint(model, x, t, stream)
    changed = before is None or x._version != before
    return constrained.clone() if constrained is x and changed else constrained


def _refuse_nan(x: Tensor) -> None:
    """Raises RuntimeError for samples that are not finite, named; the one time that the device is asked."""
    if x.device.type == "meta":
        return
    if bad := (~torch.isfinite(x.flatten(1)).all(dim=1)).nonzero().flatten().tolist():
        raise RuntimeError(
            f"{len(bad)} of {len(x)} samples are NaN or infinite, {bad[:8]} first: does the network give NaN, or is "
            "the method unstable at this number of steps? A callback sees every state"
        )


def _start(
    model: BaseModel,
    t: Tensor,
    shape: Sequence[int] | None,
    x_T: Tensor | None,
    generator: torch.Generator | None,
    seeds: Sequence[int] | None,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> tuple[Tensor, RandomStream]:
    """The state at t, given or drawn, and the stream of the draws to come."""
    if x_T is not None and shape is None:
        if not x_T.is_floating_point() or x_T.ndim < 2:
            raise ValueError(f"x_T of floating-point numbers (B, *) expected; got {x_T.dtype} {tuple(x_T.shape)}")
        return x_T, RandomStream(generator, seeds, len(x_T))
    if shape is None or x_T is not None:
        raise ValueError("a shape (B, *) or a starting state x_T expected, exactly one of them")
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"a shape (B, *) with at least one dimension a sample expected; got {tuple(shape)}")
    sde = model.sde
    if t < sde.t_max and float(sde.log_snr(t)) > MOST_SIGNAL:
        raise ValueError(
            f"states x_T expected by a sampler that starts at t={float(t):g}, where alpha={float(sde.alpha(t)):g} and "
            f"sigma={float(sde.sigma(t)):g}: noise alone is not their law"
        )
    stream = RandomStream(generator, seeds, shape[0])
    std = sde.prior_std if t == sde.t_max else float(sde.sigma(t))
    return std * stream.normal(torch.empty(tuple(shape), dtype=dtype, device=device or device_of(model))), stream
