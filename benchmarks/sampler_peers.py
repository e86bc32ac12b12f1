"""Samplers of other projects, run on a model of this library.

    pip install --no-deps k-diffusion azula
    pip install diffusers

A run is a function (model, x_T, evaluations) -> x. It starts from the states x_T at t_max, evaluates the network at
most `evaluations` times, and returns E[x_0 | x] at its smallest positive noise level. All of these libraries do so if
their last noise level is zero; this evaluation is counted. Each library uses its own coordinates, coefficients and
dtypes, and is given the exact schedule:

- k-diffusion uses y = x/alpha and s = sigma/alpha, and accepts any noise levels s;
- azula uses x and a schedule (alpha, sigma) over equally spaced times from 1 to 0, which are mapped to the times of a
  grid of this library;
- diffusers uses y = x / (alpha^2 + sigma^2)^(1/2), which is x on a variance-preserving path, and a table of 1,000
  values of y's alpha^2 at equal steps in t. Where it rounds a noise level to an entry of this table to get the
  network's time, the network gets the time of the exact noise level.

The sampling modules of k-diffusion and azula are imported without their packages, which need further dependencies.
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
NODES = 1000  # entries of the table of diffusers


def levels(sde: SDE, grid: Grid, count: int) -> Tensor:
    """Return sigma/alpha at `count` times of a grid, from t_max to t_min, float64."""
    return torch.exp(-0.5 * sde.log_snr(grid(sde, count - 1)))


def time_of(sde: SDE, ratio: Tensor) -> Tensor:
    """Return the time at which sigma/alpha equals `ratio`, float64, clamped to the range of the path."""
    return sde.time(-2 * float64(ratio).cpu().log()).clamp(sde.t_min, sde.t_max)


def k_diffusion(name: str, grid: Grid, cost: int = 1, **options: Any) -> Run:
    """`sample_<name>` of k-diffusion.

    Args:
        name: the name of the sampler.
        grid: the grid of the noise levels.
        cost: evaluations per step.
        options: arguments of the sampler; with `eta`, each step draws new noise.
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
    """`<name>Sampler` of azula, followed by an evaluation of the denoiser.

    Args:
        name: the name of the sampler.
        grid: the grid of times.
        cost: evaluations per step.
        options: arguments of the sampler.
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
        name: the name of the scheduler.
        cost: evaluations per step.
        final: "zero": the last step of the scheduler ends at noise level zero. "level": it ends at the first entry of
            the table, and an evaluation of the denoiser follows. "repeat": the scheduler would end there with a step of
            zero length, which the evaluation of the denoiser replaces.
        scaled: whether the states of the scheduler are x/alpha.
        options: arguments of the scheduler.
    """

    def run(model: ScoreModel, x: Tensor, evaluations: int) -> Tensor:
        sde, dtype = model.sde, x.dtype
        nodes = torch.linspace(sde.t_min, sde.t_max, NODES, dtype=torch.float64)
        scheduler = scheduler_of_diffusers(name, (sde.alpha(nodes) / norm(sde, nodes)).square(), options)
        steps = (evaluations - 1) // cost + (final != "level")
        scheduler.set_timesteps(steps)
        sigmas = getattr(scheduler, "sigmas", None)
        timesteps = scheduler.timesteps if final != "repeat" else scheduler.timesteps[:-1]
        x = x / (sde.alpha(nodes[-1]) if scaled else norm(sde, nodes[-1])).to(x)
        for label in timesteps:
            index = getattr(scheduler, "step_index", None) or 0
            t = nodes[int(label)] if name == "DDIM" or sigmas is None else time_of(sde, sigmas[index])
            eps = model.noise(norm(sde, t).to(x) * scheduler.scale_model_input(x, label), t)
            x = scheduler.step(eps, label, x).prev_sample.to(dtype)
        return x if final == "zero" else model.denoise(norm(sde, nodes[0]).to(x) * x, nodes[0])

    return run


def norm(sde: SDE, t: Tensor) -> Tensor:
    """Return (alpha^2 + sigma^2)^(1/2) at time t, float64: 1 on a variance-preserving path."""
    return torch.hypot(sde.alpha(t), sde.sigma(t))


def scheduler_of_diffusers(name: str, squared: Tensor, options: dict[str, Any]) -> Any:
    """Return a scheduler with the given float64 table of alpha^2 in place of its product of float32 betas."""
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
    """Return whether a package is not installed."""
    return importlib.util.find_spec(package) is None


def sampling_of_azula() -> types.ModuleType:
    """Import azula.sample without the networks of its package."""
    return module_of_azula("sample")


def module_of_azula(name: str) -> types.ModuleType:
    """Import a module of azula, such as "guidance.dps", without its packages, which import further ones."""
    whole = f"azula.{name}"
    if whole in sys.modules:
        return sys.modules[whole]
    found = importlib.util.find_spec("azula")
    if found is None:
        raise ModuleNotFoundError("azula is not installed: pip install --no-deps azula")
    (folder,) = found.submodule_search_locations or ()
    packages = {}
    for package in ("azula", "azula.nn", "azula.guidance"):
        packages[package] = types.ModuleType(package)
        packages[package].__path__ = [f"{folder}/{package.partition('.')[2]}"]
    with mock.patch.dict(sys.modules, packages):
        loaded = importlib.import_module(whole)
    sys.modules[whole] = loaded
    return loaded
