r"""What is computed of the model for the report: how samples come out of noise, and the paths they take.

The same noise is carried to data twice, in equal steps of log-SNR: by the probability-flow ODE (DPM-Solver++ of the
second order), and by the reverse SDE (the same method with noise, l = 1). A state x_t = alpha x_0 + sigma eps grows or
shrinks along the path as alpha and sigma do. It is shown at the scale of the data,

    y_t = x_t s / (alpha^2 s^2 + sigma^2)^(1/2),        s^2 the mean variance of the coordinates of x_{t_min},

so that one picture does for every SDE. Beside it stands the denoised view E[x_0 | x_t], the network's mean of the data
that the state may have come from.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from scoresde.protocols import Transform
from scoresde.samplers import DPMSolverPP, PredictorCorrector
from scoresde.score import ScoreModel


@dataclass(frozen=True)
class Film:
    """Frames (K,) of S samples on their way from noise to data, in data units.

    log_snr: (K,), increasing, in about equal steps of the angle atan(sigma / alpha s). states, denoised: (K, S, *), of
    the probability flow, at the scale of the data.
    """

    log_snr: Tensor
    states: Tensor
    denoised: Tensor


@dataclass(frozen=True)
class Paths:
    """The states of S samples at K + 1 times, at the scale of the data, in data units.

    log_snr: (K + 1,), increasing. flow, reverse: (K + 1, S, *), of the ODE and of the SDE from the same noise.
    """

    log_snr: Tensor
    flow: Tensor
    reverse: Tensor


@torch.no_grad()
def run_film(
    model: ScoreModel,
    transform: Transform,
    shape: list[int],
    samples: int,
    steps: int = 40,
    frames: int = 9,
    seed: int = 0,
) -> tuple[Film, Paths]:
    """The film and the paths of so many samples; 2 * steps + frames evaluations of the network for each.

    Args:
        model: in eval mode, on its device.
        transform: from data to model space.
        shape: of a state.
        samples: their number; they are drawn from the seeds seed, seed + 1, ...
        steps: of each path.
        frames: of the film at most, from 2 to steps + 1.
        seed: of the first sample.

    Raises:
        ValueError: a number that makes no sense.
        RuntimeError: samples that are not finite.
    """
    check_numbers(samples, steps, frames)
    states, times = _carried(model, 0.0, shape, steps, range(seed, seed + samples))
    others, _ = _carried(model, 1.0, shape, steps, range(seed, seed + samples))
    flow, reverse = _rescaled(states, times, model), _rescaled(others, times, model)
    chosen = spread(_angle(states, times, model), frames)
    denoised = [model.predict(states[i], times[i]).denoised for i in chosen]
    log_snr = model.sde.log_snr(times).cpu()

    def seen(x: Tensor) -> Tensor:
        return transform.inverse(x.flatten(0, 1)).reshape(x.shape).cpu()

    film = Film(log_snr[chosen], seen(flow[chosen]), seen(torch.stack(denoised)))
    return film, Paths(log_snr, seen(flow), seen(reverse))


def check_numbers(samples: int, steps: int, frames: int) -> None:
    """Raises ValueError for numbers that make no sense."""
    if samples < 2 or steps < 2 or not 2 <= frames <= steps + 1:
        raise ValueError(
            "samples >= 2, steps >= 2 and frames from 2 to steps + 1 expected; got "
            f"samples={samples}, steps={steps}, frames={frames}"
        )


def _carried(model: ScoreModel, level: float, shape: list[int], steps: int, seeds: range) -> tuple[Tensor, Tensor]:
    """The states (steps + 1, S, *) that noise is carried through at a noise level l, and their times."""
    sampler = PredictorCorrector(DPMSolverPP(2, l=level), steps=steps, grid="uniform_log_snr")
    pairs = sampler.transitions(model.sde)
    states = sampler(model, shape=(len(seeds), *shape), seeds=seeds, trajectory=True).trajectory
    return cast(Tensor, states), torch.stack([pairs[0][0], *(later for _, later in pairs)])


def spread(values: Tensor, count: int) -> list[int]:
    """Places of at most `count` values of a monotonic sequence, about equally far apart, both ends among them."""
    wanted = torch.linspace(float(values[0]), float(values[-1]), count, dtype=torch.float64)
    nearest = (values.double()[None] - wanted[:, None]).abs().argmin(dim=1).tolist()
    return sorted({0, len(values) - 1, *nearest})


def _angle(states: Tensor, times: Tensor, model: ScoreModel) -> Tensor:
    """atan(sigma / alpha s) at those times: pi/2 in noise, 0 in data, half of that where both are as strong."""
    return torch.atan2(model.sde.sigma(times).cpu(), model.sde.alpha(times).cpu() * _variance(states).sqrt())


def _variance(states: Tensor) -> Tensor:
    """The mean variance of the coordinates of the last of the states (K, S, *)."""
    return states[-1].cpu().double().var(dim=0).mean()


def _rescaled(states: Tensor, times: Tensor, model: ScoreModel) -> Tensor:
    """States (K, S, *) at those times (K,), at the scale of the data; see the module."""
    variance = _variance(states)
    alpha, sigma = (c.cpu() for c in (model.sde.alpha(times), model.sde.sigma(times)))
    scale = (variance / (alpha.square() * variance + sigma.square())).sqrt()
    return states.cpu() * scale.to(states.dtype).reshape(-1, *(1,) * (states.ndim - 1))
