"""Few steps with the grid that each method has by default, on every path, against closed forms.

For one Gaussian every step is affine in the state and in its draws, so the mean and the variance of the samples are
propagated exactly, without sampling. How good each method must be is `few` in the table of methods.
"""

import pytest
import torch

import scoresde as ss
from scoresde.samplers import PredictorCorrector
from tests.conftest import INSTANCES, NOISY_END, f64, oracle, seeded
from tests.samplers.methods import EVERY_METHOD, METHODS, representatives, setup
from tests.samplers.test_orders import Units

OTHERS = {"cosine-1": ss.Cosine(t_max=1.0), "no-noise": ss.Rectified(t_min=0.0)}  # alpha(t_max) = 0, sigma(t_min) = 0
STEPS_PATHS = {name: sde for name, sde in INSTANCES.items() if name != "learned"} | OTHERS
FROM_NOISE = (*NOISY_END, "cosine-1")
HARDEST = ("sub-vp", "ve", "zero-snr-vp", "no-noise")  # the largest errors of almost every method are on one of these
MEAN, STD = f64(0.7, -0.5, 0.2), f64(0.2, 0.5, 1.0)
GAUSSIAN = ss.GaussianMixture(MEAN[None], STD[None])


def errors(step, model, steps, grid=None):
    """The largest error of the mean, in standard deviations, and of the variance, relative, from the prior to t_min."""
    sde, sampler = model.sde, PredictorCorrector(step, steps=steps, grid=grid)
    pairs = sampler.transitions(sde)
    x = torch.zeros(2 * len(pairs) + 2, 3, dtype=torch.float64)  # row 0: no noise; row k: the coefficient of draw k
    x[1] = sde.prior_std
    draws, memory = Units(), None
    for entry in sampler.plan(sde, pairs):
        x, memory = sampler.advance(model, x, entry, draws, memory)
    alpha, sigma = sde.alpha(pairs[-1][1]), sde.sigma(pairs[-1][1])
    variance = (alpha * STD).square() + sigma.square()
    mean = (x[0] - alpha * MEAN).abs() / variance.sqrt()
    return float(mean.max()), float(((x[1:] - x[0]).square().sum(dim=0) / variance - 1).abs().max())


@EVERY_METHOD
def test_the_default_grid_suits_the_method_on_every_path(name):
    """One method of each class on every path, the others on those with the largest errors."""
    method, is_representative = METHODS[name], name in representatives(METHODS)
    if getattr(setup(name, GAUSSIAN, ss.VP())[0], "variance", None) == "learned":
        return  # its draws are multiplied by the state
    for path, sde in STEPS_PATHS.items():
        if (path in FROM_NOISE and not method.from_noise) or (path == "no-noise" and not method.to_data):
            continue
        if not (is_representative or path in HARDEST):
            continue
        step, model = setup(name, GAUSSIAN, sde)
        for evaluations, tolerance in zip((10, 20), method.few, strict=True):
            mean, variance = errors(step, model, evaluations // method.evaluations)
            assert variance <= tolerance, (path, evaluations)
            assert mean < 0.25 or tolerance > 1, (path, evaluations)


FEWEST = {"sa-solver": 10, "heun": 10, "edm-40": 10, "euler-maruyama": 12, "stochastic-heun": 12}


@pytest.mark.parametrize(("name", "fewest"), FEWEST.items(), ids=FEWEST)
def test_from_the_documented_number_of_steps_on_the_variance_is_right_within_a_factor_of_two(name, fewest):
    method = METHODS[name]
    for path, sde in STEPS_PATHS.items():
        if (path in FROM_NOISE and not method.from_noise) or (path == "no-noise" and not method.to_data):
            continue
        step, model = setup(name, GAUSSIAN, sde)
        for steps in (fewest, fewest + 1, fewest + 3):
            assert errors(step, model, steps)[1] < 1, (path, steps)


NEARLY_CLEAN = {"sub-vp": ss.SubVP(), "vp to 1e-9": ss.VP(t_min=1e-9), "no-noise": ss.VP(t_min=0.0)}


@pytest.mark.parametrize("sde", NEARLY_CLEAN.values(), ids=NEARLY_CLEAN)
@pytest.mark.parametrize(
    ("name", "largest"),
    [("sa-solver", (0.5, 0.2)), ("dpm-solver++-3", (0.25, 0.2)), ("sde-dpm-solver++-2", (0.8, 0.65))],
)
def test_few_steps_suffice_on_a_path_that_ends_almost_without_noise(name, largest, sde):
    """SASolver gave a variance of 0.056 in place of 0.25 at 10 steps of sub-VP, and 0.16 at 12 steps."""
    for steps, tolerance in zip((10, 12), largest, strict=True):
        step, model = setup(name, GAUSSIAN, sde)
        assert errors(step, model, steps)[1] < tolerance, steps


@pytest.mark.parametrize("sde", [ss.VP(), ss.ZeroTerminalSNR(ss.VP())], ids=["vp", "zero-snr-vp"])
@pytest.mark.parametrize("name", ["sa-solver", "dpm-solver++-2", "dpm-solver++-3", "unipc", "angular-adams", "ddim"])
def test_multistep_defaults_have_the_moments_of_a_mixture_at_20_evaluations(name, sde):
    """Where equal steps in t give the 300-fold variance (SASolver) or the 4-fold one (DPMSolverPP(3))."""
    mixture, n, t = oracle((3,)), 4000, f64(sde.t_min)
    x = PredictorCorrector(METHODS[name].step, steps=20)(
        mixture.score_model(sde), shape=(n, 3), generator=seeded(), dtype=t.dtype
    ).x
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    variance = alpha.square() * mixture.covariance().diagonal() + sigma.square()
    assert ((x.mean(dim=0) - alpha * mixture.mean()).abs() / variance.sqrt()).max() < 4.5 / n**0.5 + 0.03
    assert (x.var(dim=0) / variance - 1).abs().max() < 4.5 * (2 / n) ** 0.5 + (0.15 if name == "ddim" else 0.05)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        *((name, "uniform_log_snr") for name in ("sa-solver", "dpm-solver++-2", "ddim")),
        *((name, "karras") for name in ("dpm-solver++-2", "ddim")),  # SASolver needs shorter steps from much noise
    ],
)
@pytest.mark.parametrize("sde", [ss.ZeroTerminalSNR(ss.VP()), ss.Rectified(t_min=0.0)], ids=["no-signal", "no-noise"])
def test_grids_in_log_snr_give_good_samples_where_it_is_infinite(sde, name, grid):
    """A grid in the angle, which begins and ends there too, has standard deviations of 2 and more for 1."""
    step, model = setup(name, GAUSSIAN, sde)
    assert errors(step, model, 20, grid)[1] < (0.6 if grid == "karras" else 0.35)


def test_a_step_without_a_grid_takes_equal_steps_in_t_and_annealed_langevin_in_log_snr():
    class Bare:
        def plan(self, sde, transitions):
            return transitions

        def advance(self, model, x, entry, stream, memory):
            return x, None

    for step in (Bare(), lambda model, x, t_from, t_to, stream: x):
        assert PredictorCorrector(step).grid is ss.samplers.uniform_time
    assert PredictorCorrector(corrector=ss.samplers.AnnealedLangevin()).grid is ss.samplers.bounded_log_snr
