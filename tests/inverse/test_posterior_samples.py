"""Samples of posteriors by name: their law, shapes, seeds and errors."""

import pytest
import torch

import scoresde as ss
from scoresde.inverse import (
    DPS,
    MMPS,
    Blur,
    Downsampling,
    Fourier,
    Grey,
    Inpainting,
    Linear,
    Nonlinear,
    sample_posterior,
)
from tests.conftest import close, f64, normal, oracle, within
from tests.inverse.cases import KERNEL, MASK

FLOW = ss.samplers.PredictorCorrector(ss.samplers.Heun(), steps=40)


@pytest.mark.parametrize(("method", "sampler"), [("mmps", FLOW), ("pigdm", FLOW), ("mmps", None)])
def test_samples_of_a_gaussian_have_the_exact_posterior(method, sampler):
    mixture = oracle((2,)).component(1) if method == "mmps" else ss.GaussianMixture(normal(1, 2), f64(1.0)[None])
    operator, y = Linear(f64(1.0, -0.5)[None], noise_std=0.4), f64(0.8)[None]
    posterior = mixture.posterior(operator, y)
    result = sample_posterior(
        mixture.score_model(ss.VP()), operator, y, 1500, method, sampler, seeds=range(1500), dtype=torch.float64
    )
    within(result.x, posterior.mean())
    centred = result.x - posterior.mean()
    within(torch.einsum("bi,bj->bij", centred, centred), posterior.covariance(), errors=6)
    assert result.nfe == result.backward == (100 if sampler is None else result.nfe)
    assert result.log_weights is None


def test_the_name_and_the_class_are_the_same_method_and_options_are_passed_on():
    model, operator, y = oracle((4, 4)).score_model(ss.VP()), Inpainting(MASK, 0.5), normal(7)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=5)
    kept = {"sampler": sampler, "seeds": range(2)}
    first = sample_posterior(model, operator, y, 2, "mmps", iterations=2, scale=0.5, **kept)
    second = sampler(MMPS(model, operator, y, 0.5, iterations=2), shape=(2, 4, 4), seeds=range(2))
    close(first.x, second.x)
    assert (first.nfe, first.backward) == (second.nfe, second.backward)
    close(
        sample_posterior(model, operator, y, 2, DPS, **kept).x, sample_posterior(model, operator, y, 2, "dps", **kept).x
    )


def test_the_condition_is_that_of_the_prior():
    mixture, operator, y = oracle((3,)), Inpainting([1, 0, 0], 0.5), f64(0.3)[None]
    model = mixture.score_model(ss.VP())
    kept = {"sampler": ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=5), "seeds": range(2)}
    first = sample_posterior(model, operator, y, 2, cond=1, **kept)
    close(first.x, sample_posterior(model.given(1), operator, y, 2, **kept).x)


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        (Inpainting(MASK, 0.5), (4, 4)),
        (Inpainting(MASK, 0.5), (2, 4, 4)),
        (Downsampling(2, noise_std=0.5), (1, 4, 4)),
        (Grey(0.5), (3, 2, 2)),
        (Fourier(MASK, 0.5), (1, 4, 4)),
        (Linear(normal(2, 4), noise_std=0.5, shape=(2, 2)), (2, 2)),
    ],
)
def test_the_shape_of_a_state_follows_from_the_measurement(operator, shape):
    model, y = oracle(shape).score_model(ss.VP()), operator(normal(3, *shape))
    kept = {"sampler": ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=2), "seeds": range(3)}
    for measured, expected in ((y[0], y[:1]), (y, y)):
        exact = sample_posterior(model, operator, measured, 3, shape=shape, **kept).x
        assert exact.shape == (3, *shape)
        if measured.ndim == 1 or len(shape) == 3:
            close(sample_posterior(model, operator, measured, 3, **kept).x, exact)
        close(sample_posterior(model, operator, expected, 3, shape=shape, **kept).x, exact)


def test_a_nonlinear_measurement_needs_the_shape():
    model, operator = oracle((3,)).score_model(ss.VP()), Nonlinear(lambda x: x.square().sum(dim=1, keepdim=True), 0.5)
    kept = {"sampler": ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=2), "seeds": range(2)}
    samples = sample_posterior(model, operator, f64(2.0)[None], 2, "dps", shape=(3,), **kept)
    close(samples.x, sample_posterior(model, operator, f64(2.0)[None], 2, DPS, shape=(3,), **kept).x)
    with pytest.raises(ValueError, match=r"nonlinear measurement: pass shape="):
        sample_posterior(model, operator, f64(2.0)[None], 2, "dps")


MODEL = oracle((4, 4)).score_model(ss.VP())


def test_constraints_and_samplers_of_measurements_by_name():
    operator, y, kept = Inpainting(MASK, 0.1), normal(7), {"shape": (2, 4, 4), "seeds": [3, 4]}
    few, constraint = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=3), ss.inverse.Replacement(operator, y)
    expected = {
        "replacement": (few(MODEL, constraint=constraint, **kept), {"sampler": few}),
        "repaint": (
            ss.inverse.RePaint(4, jump=1, repeats=2)(MODEL, constraint=constraint, **kept),
            {"steps": 4, "jump": 1, "repeats": 2},
        ),
        "ddrm": (ss.inverse.DDRM(operator, y, steps=3, eta=0.5)(MODEL, **kept), {"steps": 3, "eta": 0.5}),
        "ddnm": (ss.inverse.DDNM(operator, y, steps=3)(MODEL, **kept), {"steps": 3}),
    }
    for method, (samples, options) in expected.items():
        result = sample_posterior(MODEL, operator, y, 2, method, seeds=[3, 4], **options)
        assert torch.equal(result.x, samples.x)
        assert (result.nfe, result.log_evidence) == (samples.nfe, None)


def test_a_function_gives_the_part_of_a_method():
    """A posterior model, a constraint or a sampler; a sampler takes no other."""
    operator, y, seeds = Inpainting(MASK, 0.1), normal(7), [3, 4]
    few = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=3)
    for name, build, options, sampler in (
        ("pigdm", ss.inverse.PiGDM, {}, few),
        ("replacement", lambda model, *measured: ss.inverse.Replacement(*measured), {}, few),
        ("repaint", lambda *_: ss.inverse.RePaint(4, 1, 2), {"steps": 4, "jump": 1, "repeats": 2}, None),
        ("ddnm", lambda model, *measured: ss.inverse.DDNM(*measured, steps=3), {"steps": 3}, None),
    ):
        named = sample_posterior(MODEL, operator, y, 2, name, sampler, seeds=seeds, **options)
        assert torch.equal(sample_posterior(MODEL, operator, y, 2, build, sampler, seeds=seeds).x, named.x)
    with pytest.raises(ValueError, match="method RePaint is a sampler itself"):
        sample_posterior(MODEL, operator, y, 2, lambda *_: ss.inverse.RePaint(4), few)


def test_particles_have_weights_and_the_evidence():
    operator, y = Inpainting(MASK, 0.5), normal(7)
    particles = ss.inverse.TwistedParticles(steps=5, threshold=0.3)(MODEL, operator, y, (6, 4, 4), seed=3, batch_size=4)
    result = sample_posterior(MODEL, operator, y, 6, "particles", seeds=[3], steps=5, threshold=0.3, batch_size=4)
    assert torch.equal(result.x, particles.x)
    assert torch.equal(result.log_weights, particles.log_weights)
    assert (result.log_evidence, result.stderr) == (particles.log_evidence, particles.stderr)
    with pytest.raises(ValueError, match="one seed for all particles"):
        sample_posterior(MODEL, operator, y, 6, "particles", seeds=range(6))
    with pytest.raises(ValueError, match="method 'ddrm' is a sampler itself"):
        sample_posterior(MODEL, operator, y, 6, "ddrm", ss.samplers.ProbabilityFlow())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (Inpainting(MASK), torch.zeros(7), 2, "mmmps"),
            ValueError,
            "method must be one of dps, pigdm, mmps, trained, .*, particles; got 'mmm",
        ),
        ((Inpainting(MASK), torch.zeros(7), 2, 5), TypeError, "method must be a name or a function.*got 5"),
        ((Inpainting(MASK), torch.zeros(6), 2), ValueError, r"y must be one measurement of Inpainting.*got \(6,\)"),
        ((Inpainting(MASK), torch.zeros(3, 3, 7), 2), ValueError, r"for each of the n=2 samples; got \(3, 3, 7\)"),
        ((Inpainting(MASK), [0.0], 2), TypeError, "y must be a tensor; got list"),
        ((Inpainting(MASK), torch.zeros(7), -1), ValueError, "n must be at least 0; got -1"),
        ((Blur(KERNEL), torch.zeros(4, 4), 2, "dps"), ValueError, "needs noise_std > 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        sample_posterior(MODEL, *arguments)
