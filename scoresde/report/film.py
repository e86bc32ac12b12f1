r"""Paths of samples from noise to data, which the report computes with the model.

The same noise is carried to data twice, in equal steps of log-SNR: by the probability-flow ODE (DPM-Solver++ of second
order), and by the reverse SDE (SDE-DPM-Solver++ of second order). A state x_t = alpha x_0 + sigma eps grows or shrinks
along the path as alpha and sigma do. It is shown at the scale of the data,

    y_t = x_t s / (alpha^2 s^2 + sigma^2)^(1/2),

with s^2 the mean variance of the coordinates of x_{t_min}, so that paths of all SDEs have about the same scale. The
denoised view E[x_0 | x_t] is the network's estimate of the mean of the data given the state.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from scoresde.protocols import Transform
from scoresde.samplers import DPMSolverPP, PredictorCorrector
from scoresde.score import ScoreModel


@dataclass
class FilmSettings:
    """Settings of the film.

    samples, steps: number of samples and of steps of each path; None for numbers that suit the kind of data.
    frames: largest number of times shown. seed: the seed of the first sample.
    """

    samples: int | None = None
    steps: int | None = None
    frames: int = 9
    seed: int = 0


@dataclass(frozen=True)
class Film:
    """Paths of S samples from noise to data at K + 1 times, at the scale of the data, in data units.

    log_snr: (K + 1,), increasing. flow, reverse: (K + 1, S, *), paths of the ODE and of the SDE from the same noise.
    frames: indices of the times that are shown, in about equal steps of the angle atan(sigma / (alpha s)), with s as in
    the module docstring. denoised: (len(frames), S, *), the denoised views of the flow at these times.
    """

    log_snr: Tensor
    flow: Tensor
    reverse: Tensor
    frames: list[int]
    denoised: Tensor


@torch.no_grad()
def run_film(
    model: ScoreModel, transform: Transform, shape: list[int], samples: int, steps: int, frames: int = 9, seed: int = 0
) -> Film:
    """Compute a film with 2 * steps + frames evaluations of the network for each sample.

    Args:
        model: in eval mode, on its device.
        transform: maps data to model space.
        shape: the shape of a state.
        samples: number of samples, drawn from the seeds seed, seed + 1, ...
        steps: number of steps of each path.
        frames: largest number of times shown, from 2 to steps + 1.
        seed: the seed of the first sample.

    Raises:
        ValueError: a number is out of range.
        RuntimeError: samples are not finite.
    """
    check_numbers(samples, steps, frames)
    seeds, sde = range(seed, seed + samples), model.sde
    paths = []
    for level in (0.0, 1.0):
        sampler = PredictorCorrector(DPMSolverPP(2, l=level), steps=steps, grid="uniform_log_snr")
        trajectory = sampler(model, shape=(samples, *shape), seeds=seeds, trajectory=True).trajectory
        paths.append(cast(Tensor, trajectory))
    transitions = sampler.transitions(sde)
    times = torch.stack([transitions[0][0], *(later for _, later in transitions)])
    alpha, sigma = sde.alpha(times).cpu(), sde.sigma(times).cpu()
    flow_variance, reverse_variance = (path[-1].cpu().double().var(dim=0).mean() for path in paths)
    chosen = spread(torch.atan2(sigma, alpha * flow_variance.sqrt()), frames)
    denoised = torch.stack([model.predict(paths[0][i], times[i]).denoised for i in chosen])

    def rescaled(path: Tensor, variance: Tensor) -> Tensor:
        scale = (variance / (alpha.square() * variance + sigma.square())).sqrt()
        return path.cpu() * scale.to(path.dtype).reshape(-1, *(1,) * (path.ndim - 1))

    def in_data_units(x: Tensor) -> Tensor:
        return transform.inverse(x.flatten(0, 1)).unflatten(0, x.shape[:2]).cpu()

    flow, reverse = rescaled(paths[0], flow_variance), rescaled(paths[1], reverse_variance)
    return Film(sde.log_snr(times).cpu(), in_data_units(flow), in_data_units(reverse), chosen, in_data_units(denoised))


def check_numbers(samples: int, steps: int, frames: int) -> None:
    """Raise ValueError unless samples >= 2, steps >= 2 and 2 <= frames <= steps + 1."""
    if samples < 2 or steps < 2 or not 2 <= frames <= steps + 1:
        raise ValueError(
            "a film needs samples >= 2, steps >= 2 and frames from 2 to steps + 1; got "
            f"samples={samples}, steps={steps}, frames={frames}"
        )


def spread(values: Tensor, count: int) -> list[int]:
    """Return the indices of at most `count` values of a monotonic sequence: about equally spaced, with both ends."""
    targets = torch.linspace(float(values[0]), float(values[-1]), count, dtype=torch.float64)
    nearest = (values.double()[None] - targets[:, None]).abs().argmin(dim=1).tolist()
    return sorted({0, len(values) - 1, *nearest})
