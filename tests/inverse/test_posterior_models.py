"""Posterior models against the exact posterior of Gaussian data, where their approximation is none."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.inverse import DPS, MMPS, Blur, Grey, Inpainting, Linear, Nonlinear, PiGDM
from scoresde.random_stream import RandomStream
from tests.conftest import f64, make_transition, normal, oracle, paths_with, some
from tests.guidance.test_blends import close, states
from tests.inverse.cases import KERNEL, MASK, OPERATORS
from tests.test_linear_gaussian import noisy

TRACES = [ss.ExactTrace(), ss.ExactTrace(mode="forward"), ss.Hutchinson(probes=2)]
STD = 0.1
SOLVED = {"iterations": 60, "tolerance": 1e-14}


def isotropic(shape, std=0.7):
    return ss.GaussianMixture(normal(1, *shape, seed=4), f64(std)[None])


@paths_with("name", ["inpainting vectors", "box", "matrix", "singular matrix", "colour", "fourier"])
def test_converged_moment_matching_is_exact_for_a_gaussian(sde, name):
    operator, shape = OPERATORS[name]
    operator = noisy(Linear(operator, operator.adjoint), STD)
    mixture = oracle(shape).component(1)
    y = operator(mixture.sample(1))[0] + STD
    x, t = states(sde, shape)
    guided = MMPS(mixture.score_model(sde), operator, y, **SOLVED)
    exact = mixture.posterior(operator, y).score_model(sde)
    for view in ("score", "denoise", "velocity"):
        value, expected = getattr(guided, view)(x, t), getattr(exact, view)(x, t)
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@paths_with("std", [0.3, f64(0.2, 0.3, 0.4, 0.5)], ids=lambda std: type(std).__name__)
def test_pseudo_inverse_guidance_is_exact_for_isotropic_data(sde, std):
    """By singular values for one noise_std, by conjugate gradients for one for each entry."""
    operator, mixture = Inpainting(torch.tensor([[1, 1], [0, 1], [1, 0]]), std), isotropic((3, 2))
    y, (x, t) = normal(4, seed=7), states(sde, (3, 2))
    guided = PiGDM(mixture.score_model(sde), operator, y, data_std=0.7, tolerance=1e-14)
    exact = mixture.posterior(operator, y).score_model(sde)
    for view in ("score", "denoise"):
        close(getattr(guided, view)(x, t), getattr(exact, view)(x, t))


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE()], ids=["vp", "ve"])
@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_dps_multiplies_a_deviation_as_its_docstring_says(sde, noise):
    """An ancestral step for Gaussian data, from sigma/alpha = c, where it is steepest: stable for one noise level."""
    c, s, step = 0.7, 0.8, ss.samplers.Ancestral()
    model = ss.GaussianMixture(f64([0.3, -0.2])[None], f64(c)[None]).score_model(sde)
    guided = DPS(model, Linear(f64([s, 0.0])[None], noise_std=noise), f64(0.4)[None])
    r, end = c, 0.5 * c
    times = [sde.time(f64(-2 * math.log(ratio))) for ratio in (r, end)]
    x = f64([0.1, 0.2], [1.1, 0.2])
    moved = make_transition(step, guided, x, *times, RandomStream(seeds=[3, 3]))
    measured = (moved[1] - moved[0])[0] / (x[1] - x[0])[0] * sde.alpha(times[0]) / sde.alpha(times[1])
    prior = (c**2 + end**2) / (c**2 + r**2)
    guidance = (r**2 - end**2) * s**2 * c**4 / (noise**2 * (c**2 + r**2) ** 2)
    close(measured, f64(prior - guidance))
    assert (measured < -1) == (guidance > 1 + prior) == (noise == 0.05)


@pytest.mark.parametrize("name", ["bicubic", "blur", "grey", "a composition"])
def test_both_ways_to_invert_the_covariance_agree(name):
    operator, shape = OPERATORS[name]
    operator = noisy(operator, 0.2)
    model, (x, t) = oracle(shape).score_model(ss.VE()), states(ss.VE(), shape)
    y = operator(normal(1, *shape, seed=2))[0]
    functions = Linear(operator, operator.adjoint, noise_std=0.2)
    value, expected = (PiGDM(model, op, y, tolerance=1e-13).score(x, t) for op in (operator, functions))
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-7 * float(expected.detach().abs().max()))
    noisy(operator, 0.0)


@pytest.mark.parametrize("method", [PiGDM, MMPS])
def test_the_measurement_may_be_without_noise(method):
    sde, mixture = ss.VP(), isotropic((4, 4), 1.0)
    x, t = states(sde, (4, 4))
    y = normal(7, seed=7)
    limit = mixture.posterior(Inpainting(MASK, 1e-7), y).score_model(sde)
    value = method(mixture.score_model(sde), Inpainting(MASK), y).score(x[1:], t[1:])
    torch.testing.assert_close(value, limit.score(x[1:], t[1:]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sde", some("vp", "ve", "rectified"))
def test_dps_has_its_closed_form_for_a_gaussian(sde):
    """For N(0, s^2 I), E[x_0 | x] = c x with c = alpha s^2 / (alpha^2 s^2 + sigma^2), the Jacobian of which is c."""
    model = ss.GaussianMixture(torch.zeros(1, 3, 2), f64(0.7)[None]).score_model(sde)
    operator, y, (x, t) = Grey(STD), f64(0.3, -1.0)[None], states(sde, (3, 2))
    alpha, sigma = (part(t)[:, None, None] for part in (sde.alpha, sde.sigma))
    c = 0.49 * alpha / (0.49 * alpha.square() + sigma.square())
    residual = y - operator(c * x)
    pulled = c * operator.adjoint(residual)
    close(DPS(model, operator, y, 0.5).score(x, t), model.score(x, t) + 0.5 * pulled / STD**2)
    general = DPS(model, Nonlinear(operator, STD), y, 0.5)
    close(general.score(x, t), DPS(model, operator, y, 0.5).score(x, t))
    rate = 1000 / (sde.t_max - sde.t_min) / sde.diffusion(t).square()[:, None, None]
    norm = residual.flatten(1).norm(dim=1)[:, None, None]
    published = DPS(model, Grey(), y, 0.5, rule="published")
    close(published.score(x, t), model.score(x, t) + 0.5 * rate * pulled / norm)


@pytest.mark.parametrize("rank", ["one", "leading 1", "one each"])
def test_a_measurement_is_for_all_samples_or_one_for_each(rank):
    model, operator = oracle((4, 4)).score_model(ss.VP()), Inpainting(MASK, STD)
    x, t = states(model.sde, (4, 4), n=7)
    y = normal(7, 7, seed=3)  # as many samples as entries
    given = {"one": y[2], "leading 1": y[2:3], "one each": y}[rank]
    guided = MMPS(model, operator, given)
    for i in range(7):
        alone = MMPS(model, operator, y[i] if rank == "one each" else y[2]).score(x[i : i + 1], t[i])
        close(guided.score(x, t)[i : i + 1], alone)
        close(guided.rows(torch.tensor([5, i]), 7).rows(slice(1, 2), 2).score(x[i : i + 1], t[i]), alone)


@pytest.mark.parametrize("method", [DPS, PiGDM, MMPS])
def test_samples_do_not_depend_on_their_batch(method):
    model, operator = oracle((4, 4)).score_model(ss.VP()), Inpainting(MASK, 0.5)
    y, scale = normal(3, 7, seed=3), f64(0.5, 1.0, 0.0)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=8)
    together = sampler(method(model, operator, y, scale), shape=(3, 4, 4), seeds=range(3), dtype=torch.float64).x
    for i in range(3):
        guided = method(model, operator, y[i], scale[i])
        alone = sampler(guided, shape=(1, 4, 4), seeds=[i], dtype=torch.float64).x
        torch.testing.assert_close(alone[0], together[i], rtol=1e-7, atol=1e-8)


def test_costs_are_counted_in_the_network():
    model, operator, y = oracle((4, 4)).score_model(ss.VP()), Inpainting(MASK, 2.0), normal(7)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=10)
    for guided, backward in (
        (DPS(model, operator, y), 10),
        (PiGDM(model, operator, y), 10),
        (PiGDM(model, Inpainting(MASK, torch.full((7,), 2.0)), y), 10),
        (MMPS(model, operator, y, iterations=1), 10),
        (MMPS(model, operator, y, iterations=3, tolerance=0.0), 30),
        (MMPS(model, operator, y, tolerance=1e3), 10),
    ):
        result = sampler(guided, shape=(2, 4, 4), seeds=range(2))
        assert (result.nfe, result.backward) == (10, backward)


@pytest.mark.parametrize("trace", TRACES, ids=["reverse", "forward", "hutchinson"])
@pytest.mark.parametrize("method", [MMPS, PiGDM])
def test_the_likelihood_of_an_exact_posterior_model_is_that_of_the_posterior(method, trace):
    sde, mixture = ss.VP(), isotropic((2,), 1.0) if method is PiGDM else oracle((2,)).component(0)
    operator, y = Linear(f64(1.0, -0.5)[None], noise_std=0.3), f64(0.8)[None]
    posterior = mixture.posterior(operator, y)
    x = posterior.sample(3, generator=torch.Generator().manual_seed(0))
    guided = method(mixture.score_model(sde), operator, y)
    solver = ss.solvers.RungeKutta(steps=2)  # the same errors in both
    value, expected = (
        ss.log_prob(model, x, trace=trace, solver=solver, seeds=range(3)).value
        for model in (guided, posterior.score_model(sde))
    )
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-7)


MODEL = oracle((4, 4)).score_model(ss.VP())
X = torch.zeros(2, 4, 4)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: DPS(MODEL, Inpainting(MASK), X), ValueError, "DPS with rule='likelihood' needs noise_std > 0"),
        (lambda: DPS(MODEL, Grey(1.0), X, rule="steep"), ValueError, "rule must be one of likelihood, published"),
        (lambda: DPS(MODEL, MASK, X), TypeError, "an operator must be one of scoresde.inverse"),
        (lambda: MMPS(MODEL, Blur(KERNEL), [0.0]), TypeError, "y must be a Tensor"),
        (lambda: MMPS(MODEL, Blur(KERNEL), X / 0), ValueError, "y must be finite"),
        (lambda: MMPS(MODEL, Nonlinear(torch.sin), X), TypeError, "MMPS needs a linear operator; got Nonlinear"),
        (lambda: PiGDM(MODEL, Nonlinear(torch.sin), X), TypeError, "PiGDM needs a linear operator"),
        (lambda: MMPS(MODEL, Blur(KERNEL), X, iterations=0), ValueError, "iterations must be"),
        (lambda: PiGDM(MODEL, Blur(KERNEL), X, data_std=0.0), ValueError, "data_std must be"),
        (
            lambda: MMPS(MODEL, Inpainting(MASK), torch.zeros(6)).score(X, 0.5),
            ValueError,
            r"y must be one measurement \(7,\), or one for each of the 2 samples, \(2, 7\); got \(6,\)",
        ),
        (lambda: MMPS(MODEL, Blur(KERNEL), torch.zeros(3, 4, 4)).score(X, 0.5), ValueError, r"got \(3, 4, 4\)"),
        (lambda: MMPS(MODEL, Inpainting([1, 0]), X).score(X, 0.5), ValueError, "states must be"),
    ],
)
def test_bad_arguments_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
