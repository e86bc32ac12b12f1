"""Comparison with the samplers of diffusers: equal network, schedule, times and noise give equal samples.

A scheduler of diffusers evaluates the network at indices k of its table and ends in one of two ways:

    at sigma = 0 (`final_sigmas_type="zero"`, `set_alpha_to_one=True`): the last of its N steps gives E[x_0 | x], of
        first order for every method. Here it is N - 1 transitions between the indices, and `denoise_final=True`.
    at index 0 (`final_sigmas_type="sigma_min"`, `set_alpha_to_one=False`): the last step goes there. Here it is N
        transitions, with index 0 as the end of the grid.

`lower_order_final` counts the steps from the end, including the one to sigma = 0: it is `final=1` if the end is
index 0. In DPMSolverMultistepScheduler it acts only below 15 steps, and lowers the last step to order 1 and the one
before to order 2. With 15 steps or more and the end at sigma = 0, only the last step is of lower order: `final=0`.
`euler_at_final` stays off; it would make the last step to index 0 one of order 1.

Left out, because they compute something else: DEISMultistepScheduler, which has a polynomial in log(sigma/alpha), and
the third order of sde-dpmsolver++, where the 1/2 in the weight of the second difference has the opposite sign of that
in the deterministic formula and in k-diffusion.
"""

from functools import cache

import pytest
import torch

import scoresde as ss
from scoresde.random_stream import RandomStream
from tests.conftest import exact_model, normal, oracle, seeded


def setup_module():
    """Import diffusers when the first test runs: every process collects these tests, and few run them."""
    global diffusers
    diffusers = pytest.importorskip("diffusers")


LAST = 999
SHAPE = (16, 2)


class Learned(torch.nn.Module):
    """The noise of a mixture, and a variance that depends on state and time."""

    def __init__(self, mixture, sde):
        super().__init__()
        self.noise = exact_model(mixture, sde, "noise").network

    def forward(self, x, t, cond=None):
        return torch.cat([self.noise(x, t), torch.sin(3 * x + t[:, None])], dim=1)


@cache
def path():
    """The path through the table of the schedulers, whose default betas are those of DDPM (except Heun's)."""
    return ss.Tabulated.from_alphas_cumprod(diffusers.DDPMScheduler().alphas_cumprod.double())


@cache
def model(learned=False):
    """A network that predicts the noise, nonlinear in the state."""
    mixture = oracle(SHAPE[1:])
    if learned:
        return ss.ScoreModel(Learned(mixture, path()), path(), "noise", learned_variance=True)
    return exact_model(mixture, path(), "noise")


def theirs(scheduler, x, network, noise=None, **arguments):
    """The loop of a pipeline: the network at every timestep, and the scheduler's step."""
    for k in scheduler.timesteps:
        scaled, label = scheduler.scale_model_input(x, k), (k.double() / LAST).expand(len(x))
        if noise is not None:
            arguments["variance_noise"] = noise.normal(x)
        x = scheduler.step(network(scaled, label), k if k.is_floating_point() else int(k), x, **arguments).prev_sample
    return x


def ours(method, indices, x, model, denoise_final, **arguments):
    grid = torch.as_tensor(indices, dtype=torch.float64) / LAST
    sampler = ss.samplers.PredictorCorrector(method, grid=grid, denoise_final=denoise_final)
    return sampler(model, x_T=x, **arguments).x


def compare(scheduler, method, steps, denoise_final, noisy=False, **arguments):
    """The largest difference between the samples of the two, from the same starting states."""
    scheduler.set_timesteps(steps)
    indices = scheduler.timesteps.tolist() + ([] if denoise_final else [0])
    x = normal(*SHAPE, seed=3)
    noise = RandomStream(seeded(5)) if noisy else None
    samples = ours(method, indices, x, model(), denoise_final, generator=seeded(5))
    reference = theirs(scheduler, x, model().network, noise, **arguments)
    assert samples.std() > 0.3  # samples of the mixture, not of one point
    return float((samples - reference).abs().max())


@pytest.mark.parametrize(
    ("settings", "eta", "denoise_final"),
    [
        ({"timestep_spacing": "leading", "set_alpha_to_one": True}, 0.5, True),
        ({"timestep_spacing": "trailing", "set_alpha_to_one": True}, 0.0, True),
        ({"timestep_spacing": "trailing", "set_alpha_to_one": True}, 1.0, True),
        ({"set_alpha_to_one": False, "steps_offset": 1}, 0.0, False),
        ({"set_alpha_to_one": False, "steps_offset": 1}, 1.0, False),
    ],
)
def test_ddim(settings, eta, denoise_final):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **settings)
    assert compare(scheduler, ss.samplers.DDIM(eta), 25, denoise_final, noisy=eta > 0, eta=eta) < 1e-4


SOLVERS = {
    "1": ({"order": 1}, {"solver_order": 1}),
    "2M": ({"order": 2, "form": "published"}, {"solver_order": 2, "solver_type": "midpoint"}),
    "2M-exact": ({"order": 2, "form": "exact"}, {"solver_order": 2, "solver_type": "heun"}),
    "3M": ({"order": 3, "form": "published"}, {"solver_order": 3}),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_dpm_solver_pp(name):
    arguments, settings = SOLVERS[name]
    scheduler = diffusers.DPMSolverMultistepScheduler(**settings)
    assert compare(scheduler, ss.samplers.DPMSolverPP(**arguments), 20, True) < 1e-4
    scheduler = diffusers.DPMSolverMultistepScheduler(**settings, final_sigmas_type="sigma_min")
    assert compare(scheduler, ss.samplers.DPMSolverPP(**arguments, final=1), 10, False) < 1e-4


@pytest.mark.parametrize("name", ["1", "2M", "2M-exact"])
def test_stochastic_dpm_solver_pp(name):
    arguments, settings = SOLVERS[name]
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **settings)
    assert compare(scheduler, ss.samplers.DPMSolverPP(**arguments, l=1), 20, True, noisy=True) < 1e-4


@pytest.mark.parametrize("form", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, form):
    settings = {"solver_order": order, "solver_type": form, "predict_x0": True, "final_sigmas_type": "sigma_min"}
    for final in (1, 0):
        scheduler = diffusers.UniPCMultistepScheduler(**settings, lower_order_final=final)
        assert compare(scheduler, ss.samplers.UniPC(order, form, final), 12, False) < 1e-4


def test_unipc_ending_at_the_data():
    """At order 3 its step before the last would be of order 2, unlike final=0; bh1 gives NaN at sigma = 0."""
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=2, solver_type="bh2", final_sigmas_type="zero")
    assert compare(scheduler, ss.samplers.UniPC(2, "bh2", final=0), 12, True) < 1e-4


def test_heun():
    """In y = x/alpha, and at integer indices: linspace(0, 999, 28) has steps of 37."""
    scheduler = diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace")
    scheduler.set_timesteps(28)
    indices = scheduler.timesteps.unique().flip(0).tolist()
    assert indices == list(range(LAST, -1, -37))
    x = normal(*SHAPE, seed=3)
    start = x / model().sde.alpha(torch.tensor(1.0, dtype=torch.float64))
    samples = ours(ss.samplers.Heun(), indices, x, model(), True)
    assert (samples - theirs(scheduler, start, model().network)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("variance", "name"), [("posterior", "fixed_small"), ("forward", "fixed_large"), ("learned", "learned_range")]
)
def test_ancestral(variance, name):
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type=name)
    scheduler.set_timesteps(20)
    learned, x = model(variance == "learned"), normal(*SHAPE, seed=3)
    samples = ours(ss.samplers.Ancestral(variance), scheduler.timesteps, x, learned, True, generator=seeded(5))
    reference = theirs(scheduler, x, learned.network, generator=seeded(5))
    assert (samples - reference).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("trailing", 1), ("linspace", 0)]
)
def test_indices_are_the_timesteps(spacing, offset):
    for steps in (*([1] if spacing == "trailing" else []), 2, 7, 50, 333, 1000 - offset):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
        scheduler.set_timesteps(steps)
        times = ss.samplers.Indices(spacing, offset=offset)(path(), steps)
        torch.testing.assert_close(times * LAST, scheduler.timesteps.double(), rtol=0, atol=1e-9)
