"""Log-likelihoods of a model of this library as other projects compute them, with a given probe.

    pip install --no-deps k-diffusion flow_matching

Only the sampling module of k-diffusion is imported: its package requires torchvision, clip and others, which are not
used here and are replaced by mocks if they are missing. A project that uses other coordinates is converted by the exact
change of variables. All projects therefore have the same limit: log p of x taken as x(t_min), under the prior of the
SDE at t_max, with z^T J z for the given probe z in place of the trace of the Jacobian J. The coordinates differ by a
scalar function of time, which leaves this limit unchanged because |z|^2 = d for a Rademacher probe in d dimensions.

In every project the states have the dtype of the network, as in normal use.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from scoresde import ScoreModel
from scoresde.tensors import broadcast, dimensions, float64


class Outcome(NamedTuple):
    """log p in nats (B,), float64, and the number of evaluations of the flow and its divergence per image."""

    value: Tensor
    evaluations: float


def state_dtype(model: ScoreModel) -> torch.dtype:
    """Return the dtype of the network, or float64 if it has no parameters."""
    return next((parameter.dtype for parameter in model.parameters()), torch.float64)


def score_sde(model: ScoreModel, x: Tensor, probe: Tensor, tolerance: float = 1e-5) -> Outcome:
    """The convention of yang-song/score_sde_pytorch (2011.13456, section D.2; its default tolerance is 1e-5).

    SciPy's RK45 integrates in t one float64 vector of all images and their log-densities, which both enter the error
    norm. The velocity f x - g^2/2 score takes a forward pass without a graph, the divergence a second forward pass and
    a backward pass. The network receives states rounded to its dtype. The schedule is that of this library, in float64.
    """
    sde, count, dtype = model.sde, len(x), state_dtype(model)
    kept = probe.to(dtype)

    def drift(state: Tensor, t: Tensor) -> Tensor:
        f, g = sde.drift(t), sde.diffusion(t)
        return broadcast(f, state) * state - 0.5 * broadcast(g.square(), state) * model.score(state, t)

    def divergence(state: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = state.detach().requires_grad_()
            product = torch.autograd.grad((drift(leaf, t) * kept).sum(), leaf)[0]
        return (product * kept).flatten(1).sum(dim=1)

    def slope(t: float, vector: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(vector[:-count]).reshape(x.shape).to(x.device, dtype)
        times = torch.full((count,), t, dtype=torch.float64)
        with torch.no_grad():
            velocity = drift(state, times)
        return np.concatenate([flat(velocity), flat(divergence(state, times))])

    start = np.concatenate([flat(x), np.zeros(count)])
    solved = solve_ivp(slope, (sde.t_min, sde.t_max), start, method="RK45", rtol=tolerance, atol=tolerance)
    final = torch.from_numpy(solved.y[:, -1])
    value = sde.prior_log_prob(final[:-count].reshape(x.shape)) + final[-count:]
    return Outcome(value, float(solved.nfev))


def flat(x: Tensor) -> np.ndarray:
    """Return the entries of a tensor as a float64 vector."""
    return x.detach().double().cpu().flatten().numpy()


def k_diffusion(model: ScoreModel, x: Tensor, probe: Tensor, tolerance: float = 1e-4) -> Outcome:
    """k-diffusion's `log_likelihood`: dopri5 of torchdiffeq in sigma; its default tolerance is 1e-4.

    Its states are y = x/alpha with noise s = sigma/alpha. Its denoiser is D(y, s) = E[x_0 | x = alpha y] at the time
    where sigma/alpha is s, and p(x) = p(y) / alpha^d.
    """
    sde, dtype = model.sde, state_dtype(model)
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    alpha, ratio = sde.alpha(ends), sde.sigma(ends) / sde.alpha(ends)

    def denoiser(y: Tensor, s: Tensor) -> Tensor:
        t = sde.time(-2 * float64(s).cpu().log())
        return model.denoise(broadcast(sde.alpha(t), y) * y, t)

    def kept(like: Tensor, high: int) -> Tensor:
        """Return the draw of 0 and 1 from which k-diffusion computes its probe."""
        return ((probe + 1) / 2).to(like)

    start = (x / float(alpha[0])).to(dtype)
    with mock.patch.object(torch, "randint_like", kept):
        value, info = sampling_of_k_diffusion().log_likelihood(
            denoiser, start, float(ratio[0]), float(ratio[1]), atol=tolerance, rtol=tolerance
        )
    return Outcome(float64(value.detach()).cpu() - dimensions(x) * alpha[0].log(), float(info["fevals"]))


def flow_matching(
    model: ScoreModel, x: Tensor, probe: Tensor, tolerance: float = 1e-5, steps: int | None = None
) -> Outcome:
    """flow_matching's `ODESolver.compute_likelihood`, on its linear path from noise to data.

    On this path y = s x_0 + (1 - s) eps = x / (alpha + sigma) with s = alpha / (alpha + sigma). The velocity with
    respect to s is E[x_0 | x] - E[eps | x], and p(x) = p(y) / (alpha + sigma)^d. The time of the solver runs from 0 to
    1 while s runs from its value at t_max to that at t_min.

    Args:
        model, x, probe: the model, the points and the fixed probe, both (B, *).
        tolerance: the tolerance of dopri5; the library's default is 1e-5.
        steps: use this many steps of the midpoint rule instead of dopri5; its guide has 100 (2412.06264, section 3.6).
    """
    sde, dtype, evaluations = model.sde, state_dtype(model), 0
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    size = sde.alpha(ends) + sde.sigma(ends)
    noisy, clean = sde.alpha(ends) / size
    scale = sde.prior_std / size[0]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        s = noisy + float64(t).cpu().clamp(0, 1) * (clean - noisy)  # dopri5 steps beyond the end and interpolates
        time = sde.time(2 * (s.log() - (1 - s).log()))
        state = broadcast(sde.alpha(time) + sde.sigma(time), x) * x
        return model.predict(state, time).combine(clean - noisy, noisy - clean)

    def kept(like: Tensor) -> Tensor:
        """Return the draw from whose sign flow_matching computes its probe."""
        return -probe.to(like)

    def log_p0(y: Tensor) -> Tensor:
        return sde.prior_log_prob(float64(y) / scale * sde.prior_std) - dimensions(y) * (scale / sde.prior_std).log()

    how: dict[str, Any] = {"method": "dopri5", "step_size": None, "atol": tolerance, "rtol": tolerance}
    if steps is not None:
        how = {"method": "midpoint", "step_size": 1 / steps}
    solver = importlib.import_module("flow_matching.solver").ODESolver(velocity)
    with mock.patch.object(torch, "randn_like", kept), default_dtype(dtype):
        _, value = solver.compute_likelihood((x / float(size[1])).to(dtype), log_p0, **how)
    return Outcome(float64(value.detach()).cpu() - dimensions(x) * size[1].log(), float(evaluations))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype within the block; flow_matching's probe has it, independently of the states."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def flow_matching_midpoint(model: ScoreModel, x: Tensor, probe: Tensor, steps: int = 100) -> Outcome:
    """`flow_matching` with the midpoint rule."""
    return flow_matching(model, x, probe, steps=steps)


PACKAGES: dict[Callable, str] = {
    k_diffusion: "k_diffusion",
    flow_matching: "flow_matching",
    flow_matching_midpoint: "flow_matching",
}


def missing(run: Callable) -> str | None:
    """Return the package that a function of this module needs if it is not installed, else None."""
    package = PACKAGES.get(run)
    return package if package and importlib.util.find_spec(package) is None else None


def sampling_of_k_diffusion() -> types.ModuleType:
    """Import k_diffusion.sampling without its package, with mocks of torchsde and torchvision if they are missing."""
    if "k_diffusion.sampling" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        raise ModuleNotFoundError("k-diffusion is not installed: pip install --no-deps k-diffusion")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations or ())  # skips the imports of its __init__
    unused = ("torchsde", "torchvision", "torchvision.transforms")
    stand_ins = {name: mock.MagicMock() for name in unused if importlib.util.find_spec(name.partition(".")[0]) is None}
    with mock.patch.dict(sys.modules, {**stand_ins, "k_diffusion": package}):
        loaded = importlib.import_module("k_diffusion.sampling")
    sys.modules["k_diffusion.sampling"] = loaded
    return loaded
