"""Continuous schedulers of diffusers: steps of this library are theirs; `test_from_diffusers.py` has the tables."""

import pytest
import torch

import scoresde as ss
from scoresde.convert.from_diffusers import diffusers as convert
from scoresde.random_stream import RandomStream
from tests.conftest import close, make_transition
from tests.convert.test_from_diffusers import TINY, states


def setup_module():
    """Import diffusers when the first test runs, as in `test_from_diffusers.py`."""
    global hf
    hf = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return hf.UNet2DModel(**TINY).eval().requires_grad_(False)


FLOWS = {
    "plain": {},
    "shift": {"shift": 3.0},
    "steps": {"num_train_timesteps": 500, "shift": 0.5},
    "dynamic": {"use_dynamic_shifting": True},
}


@pytest.mark.parametrize("config", FLOWS.values(), ids=FLOWS)
def test_flow_matching_steps_are_theirs(network, config):
    """A step of DDIM along a straight line is Euler's; equal steps of time are those of the shifted scheduler."""
    scheduler = hf.FlowMatchEulerDiscreteScheduler(**config)
    model, x = convert((network, scheduler)).model, states(2, 3, 8, 8)
    sde, shift = model.sde, config.get("shift", 1.0)
    scheduler.set_timesteps(4, **({"mu": 0.0} if scheduler.config.use_dynamic_shifting else {}))
    sigmas = scheduler.sigmas.double()
    times = sde.time(2 * ((1 - sigmas[:-1]).log() - sigmas[:-1].log()))
    close(sde.sigma(times), sigmas[:-1], rtol=1e-6)
    close(sde.alpha(times), 1 - sigmas[:-1], rtol=0, atol=1e-6)
    for i in range(3):
        t, s = times[i], times[i + 1]
        step = make_transition(ss.samplers.DDIM(), model, x, t, s, RandomStream())
        expected = scheduler.step(network(x, scheduler.timesteps[i]).sample, scheduler.timesteps[i], x).prev_sample
        close(step, expected, rtol=1e-5, atol=1e-5)
        scheduler._step_index = None
    u = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    close(sde.sigma(u), shift * u / (1 + (shift - 1) * u))
    close(sde.sigma_dot(times), torch.func.vmap(torch.func.grad(sde.sigma))(times))
    inner = times[1:]
    close(
        sde.diffusion(inner).square(),
        2 * sde.sigma(inner) * (sde.sigma_dot(inner) - sde.drift(inner) * sde.sigma(inner)),
    )
    close(sde.time(sde.log_snr(inner)), inner)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_steps_are_theirs(network, kind, prediction):
    """The first step of the multistep solver is DDIM's too."""
    scheduler = getattr(hf, kind)(sigma_min=0.01, sigma_max=20.0, sigma_data=0.7, prediction_type=prediction)
    model = convert((network, scheduler)).model
    x = 20 * states(2, 3, 8, 8)
    assert (model.sde.t_min, model.sde.t_max) == (0.01, 20.0)
    scheduler.set_timesteps(4)
    for i in range(3):
        t, s = (scheduler.sigmas[k].double() for k in (i, i + 1))
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(i)
        scaled = scheduler.scale_model_input(x, scheduler.timesteps[i])
        output = network(scaled, scheduler.timesteps[i]).sample
        close(model.denoise(x, t), scheduler.precondition_outputs(x, output, t.float()), rtol=1e-5, atol=1e-5)
        expected = scheduler.step(output, scheduler.timesteps[i], x).prev_sample
        step = make_transition(ss.samplers.DDIM(), model, x, t, s, RandomStream())
        close(step, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        x = expected
