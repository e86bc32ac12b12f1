"""Posterior samplers of azula, run on a model and an operator of this library.

    pip install --no-deps azula

A run is a function (model, operator, y, x_T, passes) -> x. It starts from the states x_T (B, *) at t_max, makes at most
`passes` forward and backward passes through the network for each sample, and returns the states at t_min. Each sample
has its own measurement, y (B, *m). azula's own coefficients are used, on the times of a grid of this library, see
`sampler_peers`. Two of its conventions matter for a comparison:

- DPS takes one norm |y - A(D)| over the whole batch, so that its step shrinks with the size of the batch. The adapter
  multiplies zeta by B^(1/2), which makes a step as long as that of a batch of one, up to the spread of the norms.
- MMPS with k iterations makes k + 1 backward passes: the last one turns the solution into the correction.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from sampler_peers import module_of_azula
from torch import Tensor

from scoresde import SDE, ScoreModel
from scoresde.inverse import Operator
from scoresde.samplers.grids import Grid

PosteriorRun = Callable[[ScoreModel, Operator, Tensor, Tensor, int], Tensor]


class Denoiser:
    """A model of this library as a denoiser of azula, at times u from 1 to 0 that are mapped to those of a grid."""

    def __init__(self, model: ScoreModel, times: Tensor):
        self.model, self.times = model, times

    def time(self, u: Tensor) -> Tensor:
        """Return the time of the grid for u."""
        return self.times[((1 - u) * (len(self.times) - 1)).round().long().cpu()]

    def schedule(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma."""
        sde: SDE = self.model.sde
        return sde.alpha(self.time(u)), sde.sigma(self.time(u))

    def __call__(self, x: Tensor, u: Tensor) -> types.SimpleNamespace:
        """Return E[x_0 | x_t] as the attribute `mean`."""
        return types.SimpleNamespace(mean=self.model.denoise(x, self.time(u)))


def azula_dps(grid: Grid, length: float) -> PosteriorRun:
    """`DPSSampler`, which is DDPM with steps of length zeta = `length` / steps along the gradient of |y - A(D)|."""

    def run(model: ScoreModel, operator: Operator, y: Tensor, x: Tensor, passes: int) -> Tensor:
        steps = passes // 2
        sampler = module_of_azula("guidance.dps").DPSSampler(
            Denoiser(model, grid(model.sde, steps)), y, operator, length / steps * len(x) ** 0.5, **_settings(steps)
        )
        return sampler(x)

    return run


def azula_pgdm(grid: Grid, eta: float) -> PosteriorRun:
    """`PGDMSampler`, which is DDIM with noise `eta` and a step along the pulled-back pseudo-inverse."""

    def run(model: ScoreModel, operator: Operator, y: Tensor, x: Tensor, passes: int) -> Tensor:
        steps = passes // 2
        sampler = module_of_azula("guidance.pgdm").PGDMSampler(
            Denoiser(model, grid(model.sde, steps)), y, operator, operator.pseudo_inverse, eta=eta, **_settings(steps)
        )
        return sampler(x)

    return run


def azula_mmps(grid: Grid, sampler: str, iterations: int, **options: Any) -> PosteriorRun:
    """`MMPSDenoiser` with its default solver, in `<sampler>Sampler`; its measurements are vectors."""

    def run(model: ScoreModel, operator: Operator, y: Tensor, x: Tensor, passes: int) -> Tensor:
        steps, variance = passes // (2 + iterations), operator.noise_std.square()
        denoiser = module_of_azula("guidance.mmps").MMPSDenoiser(
            Denoiser(model, grid(model.sde, steps)), y.flatten(1), lambda x: operator(x).flatten(1),
            lambda v: variance.to(v) * v, iterations=iterations,
        )  # fmt: skip
        return getattr(module_of_azula("sample"), f"{sampler}Sampler")(denoiser, **_settings(steps), **options)(x)

    return run


def _settings(steps: int) -> dict[str, Any]:
    if steps < 1:
        raise ValueError("the budget must allow at least one step")
    return {"steps": steps, "silent": True, "dtype": torch.float64}
