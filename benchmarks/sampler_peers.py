"""Samplers of other projects, run on one of our models.

    pip install --no-deps k-diffusion azula
    pip install diffusers

A run is a function (model, x_T, evaluations) -> x. It starts from states at t_max, where all start from the same ones,
makes at most that many evaluations of the network, and ends with E[x_0 | x] at the smallest noise level it goes to:
that is what every one of these libraries does when its last level is zero, and that evaluation is counted. A library
keeps its own coordinates, coefficients and dtypes; what it is told about the schedule is exact:

- k-diffusion has y = x/alpha and s = sigma/alpha, and is given any levels s;
- azula has x, and a schedule (alpha, sigma) over times from 1 to 0 with equal steps: ours, through the times of a grid;
- diffusers has a table of 1,000 values of alpha^2, here those of the path at equal steps in t. Where it rounds a level
  to a node of that table, to tell the network a time, the network is told the level that was not rounded.

The modules of k-diffusion and azula are loaded alone: their packages import more than sampling needs.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from peers import sampling_of_k_diffusion
from torch import Tensor

from scoresde import SDE, ScoreModel
from scoresde.samplers.grids import Grid
from scoresde.tensors import broadcast, float64

Run = Callable[[ScoreModel, Tensor, int], Tensor]
NODES = 1000  # of the table of diffusers


def levels(sde: SDE, grid: Grid, count: int) -> Tensor:
    """sigma/alpha at `count` times of a grid, from t_max to t_min, float64."""
    return torch.exp(-0.5 * sde.log_snr(grid(sde, count - 1)))


def time_of(sde: SDE, ratio: Tensor) -> Tensor:
    """The time at which sigma/alpha has that value, float64, within the range of the path."""
    return sde.time(-2 * float64(ratio).cpu().log()).clamp(sde.t_min, sde.t_max)


def k_diffusion(name: str, grid: Grid, cost: int = 1, **options: Any) -> Run:
    """`sample_<name>` of k-diffusion.

    Args:
        name: of the sampler.
        grid: of the levels.
        cost: evaluations between two levels.
        options: of the sampler; with `eta`, its noise is drawn afresh for each step.
    """

    def run(model: ScoreModel, x: Tensor, evaluations: int) -> Tensor:
        sde = model.sde

        def denoiser(y: Tensor, s: Tensor) -> Tensor:
            t = time_of(sde, s)
            return model.denoise(broadcast(sde.alpha(t), y) * y, t)

        s = levels(sde, grid, 1 + (evaluations - 1) // cost)
        start = x / sde.alpha(torch.tensor(sde.t_max, dtype=torch.float64)).to(x)
        more = {"noise_sampler": lambda *_: torch.randn_like(x)} if "eta" in options else {}
        sample = getattr(sampling_of_k_diffusion(), f"sample_{name}")
        return sample(denoiser, start, torch.cat([s, s.new_zeros(1)]), disable=True, **options, **more)

    return run


def azula(name: str, grid: Grid, cost: int = 1, **options: Any) -> Run:
    """`<name>Sampler` of azula, and a last evaluation of its denoiser.

    Args:
        name: of the sampler.
        grid: of the times.
        cost: evaluations a step.
        options: of the sampler.
    """

    def run(model: ScoreModel, x: Tensor, evaluations: int) -> Tensor:
        sde, steps = model.sde, (evaluations - 1) // cost
        times = grid(sde, steps)

        def time(u: Tensor) -> Tensor:
            return times[((1 - u) * steps).round().long().cpu()]

        def schedule(u: Tensor) -> tuple[Tensor, Tensor]:
            return sde.alpha(time(u)).to(x.device), sde.sigma(time(u)).to(x.device)

        def denoiser(x: Tensor, u: Tensor) -> types.SimpleNamespace:
            return types.SimpleNamespace(mean=model.denoise(x, time(u)))

        denoiser.schedule = schedule
        sampler = getattr(sampling_of_azula(), f"{name}Sampler")
        found = sampler(denoiser, steps=steps, silent=True, dtype=torch.float64, **options)(x)
        return model.denoise(found.to(x.dtype), times[-1])

    return run


def diffusers(name: str, cost: int = 1, final: str = "zero", scaled: bool = False, **options: Any) -> Run:
    """`<name>Scheduler` of diffusers.

    Args:
        name: of the scheduler.
        cost: evaluations a step.
        final: "zero" where the scheduler's last step ends without noise; "level", where it ends at the first node of
            its table, and a last evaluation follows; "repeat", where it would end there with a step of no length,
            which that evaluation replaces.
        scaled: its states are x/alpha.
        options: of the scheduler.
    """

    def run(model: ScoreModel, x: Tensor, evaluations: int) -> Tensor:
        sde, dtype = model.sde, x.dtype
        nodes = torch.linspace(sde.t_min, sde.t_max, NODES, dtype=torch.float64)
        scheduler = scheduler_of_diffusers(name, sde.alpha(nodes).square(), options)
        steps = (evaluations - 1) // cost + (final != "level")
        scheduler.set_timesteps(steps)
        sigmas = getattr(scheduler, "sigmas", None)
        timesteps = scheduler.timesteps if final != "repeat" else scheduler.timesteps[:-1]
        if scaled:
            x = x / sde.alpha(nodes[-1]).to(x)
        for label in timesteps:
            index = getattr(scheduler, "step_index", None) or 0
            t = nodes[int(label)] if name == "DDIM" or sigmas is None else time_of(sde, sigmas[index])
            eps = model.noise(scheduler.scale_model_input(x, label), t)
            x = scheduler.step(eps, label, x).prev_sample.to(dtype)
        return x if final == "zero" else model.denoise(x, nodes[0])

    return run


def scheduler_of_diffusers(name: str, squared: Tensor, options: dict[str, Any]) -> Any:
    """A scheduler whose table of alpha^2 is that given, float64, and not its product of float32 betas."""
    kind = getattr(importlib.import_module("diffusers"), f"{name}Scheduler")
    betas = 1 - torch.cat([squared[:1], squared[1:] / squared[:-1]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = kind(num_train_timesteps=NODES, trained_betas=betas.numpy().astype(np.float32), **options)
    scheduler.alphas_cumprod = squared
    for attribute, value in (
        ("alpha_t", squared.sqrt()),
        ("sigma_t", (1 - squared).sqrt()),
        ("lambda_t", 0.5 * torch.logit(squared)),
    ):
        if hasattr(scheduler, attribute):
            setattr(scheduler, attribute, value)
    return scheduler


def missing(package: str) -> bool:
    """Whether a package is not installed."""
    return importlib.util.find_spec(package) is None


def sampling_of_azula() -> types.ModuleType:
    """azula.sample without the networks of its package."""
    if "azula.sample" in sys.modules:
        return sys.modules["azula.sample"]
    found = importlib.util.find_spec("azula")
    if found is None:
        raise ModuleNotFoundError("azula expected: pip install --no-deps azula")
    (folder,) = found.submodule_search_locations or ()
    packages = {}
    for name, path in (("azula", folder), ("azula.nn", f"{folder}/nn")):
        packages[name] = types.ModuleType(name)
        packages[name].__path__ = [path]
    with mock.patch.dict(sys.modules, packages):
        loaded = importlib.import_module("azula.sample")
    sys.modules["azula.sample"] = loaded
    return loaded
