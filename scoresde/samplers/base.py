"""The one sampling loop: a list of transitions, and a step that makes each of them.

A sampler goes from the prior at t_max to data at t_min over transitions (t_from, t_to). What happens in a transition is
a step: a function of the model, the state and the two times that returns the new state and keeps nothing. Everything a
step draws comes from the `Noise` it is handed, so that a sample depends on its seed alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scoresde.protocols import Condition, ScoreModel
from scoresde.score import Counted
from scoresde.sdes import SDE
from scoresde.tensors import Noise

Transition = tuple[Tensor, Tensor]
Grid = Callable[[SDE, int], Tensor]


class Step(Protocol):
    """One transition: the state at t_to, from the state x (B, *) at t_from; times float64, ()."""

    def __call__(
        self, model: ScoreModel, x: Tensor, t_from: Tensor, t_to: Tensor, noise: Noise, cond: Condition
    ) -> Tensor: ...


class Constraint(Protocol):
    """A projection after every transition: the state at t, from the state x (B, *) at t."""

    def __call__(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor: ...


@dataclass
class Samples:
    """What a sampler returns.

    x: samples (B, *) at t_min, denoised if asked for. nfe: network evaluations of each sample, counted.
    trajectory: the states after every kept transition, the first included, (K, B, *), or None.
    """

    x: Tensor
    nfe: int
    trajectory: Tensor | None


@dataclass(frozen=True)
class UniformTime:
    """steps + 1 times from t_max to t_min, uniform in t, float64.

    Args:
        end: the last time, t_min unless given. The VP models of 2011.13456 are sampled down to 1e-3 (appendix C).

    Raises:
        ValueError: in a call, an end outside of the SDE's range.
    """

    end: float | None = None

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        end = sde.t_min if self.end is None else self.end
        if not sde.t_min <= end < sde.t_max:
            raise ValueError(f"an end in [{sde.t_min:g}, {sde.t_max:g}) expected; got {end:g}")
        return torch.linspace(sde.t_max, end, steps + 1, dtype=torch.float64)


uniform_time = UniformTime()


def uniform_log_snr(sde: SDE, steps: int) -> Tensor:
    """steps + 1 times from t_max to t_min, uniform in log-SNR, float64."""
    ends = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64))
    if not bool(torch.isfinite(ends).all()):
        raise ValueError(f"a finite log-SNR at both ends expected; {type(sde).__name__} has {ends.tolist()}")
    times = sde.time(torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64))
    times[0], times[-1] = sde.t_max, sde.t_min
    return times


GRIDS: dict[str, Grid] = {"uniform_time": uniform_time, "uniform_log_snr": uniform_log_snr}


def resolve_grid(grid: str | Grid) -> Grid:
    """The grid of that name, or the function given.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(grid, str):
        return grid
    if grid not in GRIDS:
        raise ValueError(f"grid among {', '.join(GRIDS)}, or a function (sde, steps) -> times, expected; got {grid!r}")
    return GRIDS[grid]


def transitions(times: Tensor) -> list[Transition]:
    """Consecutive pairs of a grid of times."""
    return list(pairwise(times))


class Sampler:
    """A list of transitions and a step; the loop over them, once for every algorithm.

    A subclass defines `transitions` and `step`.

    Args:
        denoise_final: replace the last state by E[x_0 | x], one more evaluation.
    """

    def __init__(self, denoise_final: bool = False):
        self.denoise_final = denoise_final

    def transitions(self, sde: SDE) -> list[Transition]:
        """The pairs (t_from, t_to) to go through, from t_max to t_min, float64."""
        raise NotImplementedError(f"{type(self).__name__} must define transitions(sde)")

    def step(
        self, model: ScoreModel, x: Tensor, t_from: Tensor, t_to: Tensor, noise: Noise, cond: Condition = None
    ) -> Tensor:
        """The state at t_to; see `Step`."""
        raise NotImplementedError(f"{type(self).__name__} must define step(model, x, t_from, t_to, noise, cond)")

    def __call__(
        self,
        model: ScoreModel,
        shape: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        cond: Condition = None,
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
            model: the score model, in eval mode.
            shape, x_T: the shape (B, *) of samples started from the prior, or the states at t_max to start from.
            cond: the network's condition.
            generator, seeds: randomness; with seeds, one per sample, a sample does not depend on its batch.
            constraint: applied to the state after each transition.
            callback: called with (index, t, x) after each transition.
            trajectory: True keeps the state after every transition, k after every k-th.
            progress: show a progress bar.
            device, dtype: of samples started from the prior; by default the model's device and float32.

        Raises:
            ValueError: both or neither of shape and x_T, a number of seeds other than B.
        """
        x, noise = _start(model, shape, x_T, generator, seeds, device, dtype)
        counted, every = Counted(model), int(trajectory)
        kept = [x] if every else []
        with torch.no_grad():
            for i, (t_from, t_to) in enumerate(tqdm(self.transitions(model.sde), "sampling", disable=not progress)):
                x = self.step(counted, x, t_from, t_to, noise, cond)
                if constraint is not None:
                    x = constraint(x, t_to, noise)
                if callback is not None:
                    callback(i, t_to, x)
                if every and (i + 1) % every == 0:
                    kept.append(x)
            if self.denoise_final:
                x = counted.predict(x, t_to, cond).denoised
        return Samples(x, counted.nfe, torch.stack(kept) if kept else None)


def _start(
    model: ScoreModel,
    shape: Sequence[int] | None,
    x_T: Tensor | None,
    generator: torch.Generator | None,
    seeds: Sequence[int] | None,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Noise]:
    """The state at t_max, given or drawn from the prior, and the stream of the draws to come."""
    if x_T is not None and shape is None:
        return x_T, Noise(x_T.shape, generator, seeds, x_T.device, x_T.dtype)
    if shape is None or x_T is not None:
        raise ValueError("a shape (B, *) or a starting state x_T expected, exactly one of them")
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"a shape (B, *) with at least one dimension a sample expected; got {tuple(shape)}")
    noise = Noise(shape, generator, seeds, device or _device(model), dtype)
    return model.sde.prior_std * noise.normal(), noise


def _device(model: ScoreModel) -> torch.device:
    """Where the model's parameters are; the CPU for a model without any."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))
