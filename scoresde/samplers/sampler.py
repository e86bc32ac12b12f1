"""The sampling loop: a list of transitions, and a step that makes each of them.

A sampler goes from the prior at t_max to data at t_min over transitions (t_from, t_to). A step takes the state at
t_from and returns the state at t_to; the step object itself stores no state. The plan of a step holds the coefficients
of all transitions, computed in float64 before the loop. The memory holds the values that one transition passes to the
next, such as past evaluations of a multistep method. All draws come from a `RandomStream`, so with seeds a sample
depends on its seed alone. The loop never synchronises with the device.

Transitions may go up again, to more noise (RePaint, 2201.09865); `samplers.linear` describes how its methods do this.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from scoresde.configured import Configured
from scoresde.counting import Evaluations, counting
from scoresde.prior_mismatch import prior_mismatches, warn_of_mismatch
from scoresde.progress import progress_bar
from scoresde.protocols import Model
from scoresde.random_stream import RandomStream
from scoresde.result_table import Result, cost, counted, range_of, states
from scoresde.samplers.grids import Grid, Transition, uniform_time
from scoresde.score import BaseModel, device_of
from scoresde.sdes import SDE
from scoresde.tensors import (
    at_least_float32,
    check_instance,
    check_real,
    check_shape_of_states,
    dimensions,
    empty_states,
)
from scoresde.wrappers import for_inference

MOST_SIGNAL = math.log(0.1)  # samples may start from pure noise if the log-SNR at the first time is at most this

StepFunction = Callable[[BaseModel, Tensor, Tensor, Tensor, RandomStream], Tensor]
"""(model, x, t_from, t_to, stream) -> the state at t_to, from the state x (B, *) at t_from; times float64, ()."""


@runtime_checkable
class Step(Protocol):
    """A step that prepares all transitions before the loop, and may pass a memory from one transition to the next.

    plan: returns one entry for each transition. advance: takes the entry of a transition, and returns the state at its
    end and the memory for the next transition; the first transition gets the memory None. A step may have an attribute
    `grid`, its default grid of times, which should also work with few steps; without it, the steps are equal in t.
    """

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> Sequence[Any]: ...
    def advance(
        self, model: BaseModel, x: Tensor, entry: Any, stream: RandomStream, memory: Any
    ) -> tuple[Tensor, Any]: ...


class CallableStep(Configured):
    """A step that can be called like a sampler: with its own grid of times, and `default_steps` transitions."""

    default_steps = 500

    def __call__(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        *,
        steps: int | None = None,
        **options: Any,
    ) -> "Samples":
        """Draw samples by this step alone, `PredictorCorrector(self, steps=steps)(model, shape, ...)`.

        Args:
            model, shape, x_T: see `Sampler.__call__`.
            steps: number of transitions; default `default_steps`, with which the step is accurate on the paths of this
                library. A `PredictorCorrector` also takes another grid, a corrector and `denoise_final`.
            options: further arguments of `Sampler.__call__`, such as cond, seeds, trajectory and progress.
        """
        from scoresde.samplers.predictor_corrector import PredictorCorrector  # which imports this module

        return PredictorCorrector(self, steps=steps or self.default_steps)(model, shape, x_T, **options)  # type: ignore[arg-type]


class PlainStep(CallableStep):
    """A step that prepares nothing and passes no memory to the next transition. A subclass defines `step`."""

    grid: Grid = uniform_time

    def step(self, model: BaseModel, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream) -> Tensor:
        """Return the state at t_to; see `StepFunction`."""
        raise NotImplementedError(f"{type(self).__name__} must define step(model, x, t_from, t_to, stream)")

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> Sequence[Any]:
        """Return one entry for each transition: the pair (t_from, t_to) itself."""
        return transitions

    def advance(self, model: BaseModel, x: Tensor, entry: Any, stream: RandomStream, memory: Any) -> tuple[Tensor, Any]:
        """Return the state at the end of the transition `entry`, and None as the memory for the next transition."""
        t_from, t_to = entry
        return self.step(model, x, t_from, t_to, stream), None


class FunctionStep(PlainStep):
    """A step that calls a given function (`StepFunction`)."""

    def __init__(self, function: StepFunction):
        self.function = function

    def step(self, model: BaseModel, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream) -> Tensor:
        return self.function(model, x, t_from, t_to, stream)


def as_step(step: Step | StepFunction) -> Step:
    """Return a step unchanged, and a function as a `FunctionStep`.

    Raises:
        TypeError: `step` is neither a step nor a function.
    """
    if not isinstance(step, type):
        if isinstance(step, Step):
            return step
        if callable(step):
            return FunctionStep(step)
    kind = f"the class {step.__name__}: call it" if isinstance(step, type) else type(step).__name__
    raise TypeError(
        f"a step must have plan and advance, or be a function (model, x, t_from, t_to, stream) -> x; got {kind}"
    )


ConstraintFunction = Callable[[BaseModel, Tensor, Tensor, RandomStream], Tensor]
"""A projection after every transition: (model, x, t, stream) -> the constrained state, from the state x (B, *) at t."""


class StateConstraint(Configured):
    """A projection of the states of a run. A subclass defines `__call__`, and overrides the other methods as needed."""

    def __call__(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return the constrained state at t, from the state x (B, *)."""
        return x

    def start(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return the first state, from pure noise x at t; not called if the sampler was given x_T."""
        return x

    def time(self, t_from: Tensor, t_to: Tensor) -> Tensor | None:
        """Return the t at which the constraint is called after this transition; None to leave the state unchanged."""
        return t_to

    def finish(self, model: BaseModel, x: Tensor, t: Tensor) -> Tensor:
        """Return the sample, from the last state x at t, or from E[x_0 | x] with `denoise_final`."""
        return x


class _Unconstrained(StateConstraint):
    def time(self, t_from: Tensor, t_to: Tensor) -> None:
        return None


class _FunctionConstraint(StateConstraint):
    def __init__(self, function: ConstraintFunction):
        self.function = function

    def __call__(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        return self.function(model, x, t, stream)


def as_constraint(constraint: StateConstraint | ConstraintFunction | None) -> StateConstraint:
    """Return a constraint unchanged, and a function (model, x, t, stream) -> x, or None, as a constraint.

    Raises:
        TypeError: `constraint` is none of them.
    """
    if constraint is None:
        return _Unconstrained()
    check_instance("constraint", constraint, "__call__")
    return constraint if isinstance(constraint, StateConstraint) else _FunctionConstraint(constraint)


@dataclass(repr=False)
class Samples(Result):
    """The result of a sampler.

    x: samples (B, *) at t_min, denoised if requested. nfe: number of evaluations of the network (of all networks, if
    the model has several). backward: number of products with Jacobians of networks (backward passes). trajectory: the
    first state, and the states after the transitions chosen by `trajectory`, (K, B, *); None if not requested.
    """

    x: Tensor
    nfe: int
    trajectory: Tensor | None
    backward: int = 0

    def heading(self) -> str:
        return f"Samples: {counted(len(self.x), 'sample')}"

    def rows(self) -> dict[str, str]:
        rows = {"states": states(self.x), "range": range_of(self.x), "evaluations": cost(self.nfe, self.backward)}
        return rows if self.trajectory is None else {**rows, "trajectory": counted(len(self.trajectory), "state")}


class Sampler(PlainStep):
    """A list of transitions and a step for each of them.

    A subclass defines `transitions` and `step`. If it precomputes coefficients, or passes a memory from one transition
    to the next, it defines `plan` and `advance` in place of `step`.

    Args:
        denoise_final: if True, replace the last state by E[x_0 | x], which costs one more evaluation.
    """

    def __init__(self, denoise_final: bool = False):
        self.denoise_final = denoise_final

    def transitions(self, sde: SDE) -> list[Transition]:
        """Return the pairs (t_from, t_to) from t_max to t_min, float64."""
        raise NotImplementedError(f"{type(self).__name__} must define transitions(sde)")

    def transitions_of(self, model: BaseModel) -> list[Transition]:
        """Return the transitions for a model; a subclass may let them depend on more than its SDE."""
        return self.transitions(model.sde)

    def start(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return the first state, from pure noise x at t; not called if x_T is given."""
        return x

    def denoise(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return E[x_0 | x] of the last state; only called if denoise_final is True."""
        return model.predict(x, t).denoised

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        cond: Any = None,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        constraint: StateConstraint | ConstraintFunction | None = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        trajectory: bool | int = False,
        progress: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Samples:
        """Draw samples (B, *) at t_min.

        Args:
            model: the model, in eval mode.
            shape, x_T: give one of them: the shape (B, *) of samples that start from pure noise, or the states x_T
                (B, *) to start from. Sampling starts at the first time of the grid, usually t_max. Pure noise is drawn
                from the prior at t_max, and from N(0, sigma^2 I) at a smaller t.
            cond: condition, short for `model.given(cond)`.
            generator, seeds: a generator for the batch, or one seed per sample. With seeds, a sample does not depend on
                the others in its batch, except where documented (adapters of adaptive solvers, and a published rule of
                `Langevin`).
            constraint: a function (model, x, t, stream) -> x, applied to the state after each transition. A
                `StateConstraint` also chooses these transitions, and changes the first state and the result.
            callback: called with (index, t, x) after each transition; it must not write into x.
            trajectory: False stores no states; True stores the state after every transition, an integer k the state
                after every k-th transition.
            progress: if True, show a progress bar.
            device, dtype: device and dtype of samples that start from noise; default: the model's device and float32.
                During the run states are at least float32: in half precision the small updates of many steps would be
                lost.

        Warns:
            PriorMismatch: the samples started from pure noise, but the noise at t_max does not hide the data.

        Raises:
            ValueError: both or neither of shape and x_T are given, the states are not floating-point numbers (B, *),
                the number of seeds is not B, trajectory is negative, shape is given although states at the first time
                are not pure noise, there are neither transitions nor `denoise_final`, a step or a constraint returns
                another shape, or the model has dropout or BatchNorm in training mode.
            TypeError: a step or a constraint returns no tensor.
            RuntimeError: samples are NaN or infinite.
        """
        if not isinstance(trajectory, int) or (every := int(trajectory)) < 0:
            raise ValueError(f"trajectory must be True, False or a positive integer; got {trajectory}")
        constraint = as_constraint(constraint)
        if callback is not None:
            check_instance("callback", callback, "__call__")
        model = for_inference(model, cond)
        pairs = self.transitions_of(model)
        t = pairs[0][0] if pairs else torch.tensor(model.sde.t_max, dtype=torch.float64)
        if not pairs and not self.denoise_final:
            raise ValueError(f"a sampler must have transitions or denoise_final=True; got neither from {self!r}")
        if (shape is None) == (x_T is None):
            raise ValueError(f"give either a shape (B, *) or states x_T; got {'neither' if shape is None else 'both'}")
        x = empty_states(shape, dtype, device or device_of(model)) if x_T is None else x_T
        check_real("x_T", x)
        if not x.is_floating_point() or x.ndim < 2 or (x_T is None and not dimensions(x)):
            raise ValueError(f"states must be floating-point tensors (B, *); got {x.dtype} {tuple(x.shape)}")
        stream, dtype, x = RandomStream(generator, seeds, len(x)), x.dtype, at_least_float32(x)
        if x_T is None:
            x = self.start(model, _noise_std(model.sde, t) * stream.normal(x), t, stream)
            x = _constrained(constraint.start, model, x, t, stream)
        memory, states = None, [x] if every else []
        plan = self.plan(model.sde, pairs) if pairs else []
        plan = progress_bar(plan, title="sampling", unit="step", shown=progress)
        count = Evaluations()
        for i, (entry, (t_from, t)) in enumerate(zip(plan, pairs, strict=True)):
            with counting(count):  # evaluations of a callback are not counted
                before = x
                x, memory = self.advance(model, x, entry, stream, memory)
                check_shape_of_states("the result of a step", x, before)
                if (when := constraint.time(t_from, t)) is not None:
                    x = _constrained(constraint, model, x, when, stream)
            if callback is not None:
                callback(i, t, x)
            if every and (i + 1) % every == 0:
                states.append(x)
        if self.denoise_final:
            with counting(count):
                x = self.denoise(model, x, t, stream)
        x = constraint.finish(model, x, t).to(dtype)
        if x.device.type != "meta":
            _refuse_nan(x)
            if x_T is None:
                mismatches = prior_mismatches(model.sde, x, None if self.denoise_final else float(t))
                warn_of_mismatch(model.sde, mismatches, "samples", stacklevel=4)  # no_grad adds a stack entry
        return Samples(x, count.forward, torch.stack(states) if states else None, count.backward)


def _constrained(
    constraint: ConstraintFunction, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream
) -> Tensor:
    """Return the constrained state; a copy if the constraint wrote into x.

    Methods take a state as unchanged if it is the same tensor as before, so a changed state must be a new tensor.
    """
    before = None if x.is_inference() else x._version
    constrained = constraint(model, x, t, stream)
    check_shape_of_states("the constrained state", constrained, x)
    if not constrained.is_floating_point():
        return constrained.to(x.dtype)
    changed = before is None or x._version != before
    return constrained.clone() if constrained is x and changed else constrained


def _refuse_nan(x: Tensor) -> None:
    """Raise RuntimeError with the indices of the samples that are not finite, if any; synchronises with the device."""
    if bad := (~torch.isfinite(x.flatten(1)).all(dim=1)).nonzero().flatten().tolist():
        raise RuntimeError(
            f"{len(bad)} of {len(x)} samples are NaN or infinite (first indices {bad[:8]}): check that the network "
            "gives finite values, or take more steps; a callback sees the state after every transition"
        )


def _noise_std(sde: SDE, t: Tensor) -> float:
    """Return the standard deviation of the pure noise from which samples start at t.

    Raises:
        ValueError: states at t are not pure noise.
    """
    if t < sde.t_max and float(sde.log_snr(t)) > MOST_SIGNAL:
        raise ValueError(
            f"a sampler that starts at t={float(t):g} needs starting states x_T: with alpha={float(sde.alpha(t)):g} "
            f"and sigma={float(sde.sigma(t)):g}, states are not pure noise"
        )
    return sde.prior_std if t == sde.t_max else float(sde.sigma(t))
