"""Replacement against the published update formulas, RePaint against the exact conditional, and the grid of jumps."""

from itertools import pairwise

import pytest
import torch

import scoresde as ss
from scoresde.inverse import Grey, Inpainting, Linear, Nonlinear
from scoresde.inverse.constraints import RePaint, Replacement, Resampled, corrected
from scoresde.random_stream import RandomStream
from scoresde.samplers import Ancestral, Langevin, PredictorCorrector, ReverseDiffusion
from scoresde.samplers.grids import uniform_log_snr
from tests.conftest import close, f64, make_transition, normal, oracle, seeded
from tests.convert.reference import converted

# The matrix of the published code (controllable_generation.py): its first column is the grey direction.
M = f64(
    [5.7735014e-01, -8.1649649e-01, 4.7008697e-08],
    [5.7735026e-01, 4.0824834e-01, 7.0710671e-01],
    [5.7735026e-01, 4.0824822e-01, -7.0710683e-01],
)
GREY_AXIS = f64(1, 0, 0).reshape(3, 1, 1)
CHECKPOINTS = ["ddpmpp_vp_continuous", "ncsnpp_ve_continuous"]


def published(model, data, mask, times, noise, decouple, couple):
    """The update formulas of the published sampler, with the steps of this library, and noise() for randn_like.

    Every corrector and predictor step is followed by a replacement at the time of its start. The last step starts at
    the last time, and only its mean is used, x_mean, here E[x_0 | x] with the mean of the known data. (The published
    x_mean overwrites x with the noisy state first, so that its unknown part keeps the noise of the last step.)
    """
    sde, corrector, known = model.sde, Langevin(snr=0.16), decouple(data)

    def replaced(x, t):
        mean, std = sde.alpha(t) * known, sde.sigma(t)
        masked_data = mean + decouple(noise()) * std
        return couple(decouple(x) * (1 - mask) + masked_data * mask), mean

    x = couple(known * mask + decouple(sde.prior_std * noise()) * (1 - mask))
    for t, following in pairwise(times):
        x, _ = replaced(corrector(model, x, t, Drawn(noise)), t)
        x, _ = replaced(make_transition(ReverseDiffusion(), model, x, t, following, Drawn(noise)), t)
    x, mean = replaced(corrector(model, x, times[-1], Drawn(noise)), times[-1])
    return couple(decouple(model.denoise(x, times[-1])) * (1 - mask) + mean * mask)


class Drawn(RandomStream):
    """A stream of the draws of a function."""

    def __init__(self, noise):
        self.noise = noise

    def normal(self, like, rows=None):
        return self.noise()


@torch.no_grad()
def against_published(model, operator, data, mask, decouple=lambda x: x, couple=lambda x: x):
    times, draws = uniform_log_snr(model.sde, 4), RandomStream(seeded(1))
    expected = published(model, data, mask.double(), times, lambda: draws.normal(data), decouple, couple)
    constraint = Replacement(operator, operator(data), published=True)
    corrector = corrected(Langevin(snr=0.16), constraint)
    sampler = PredictorCorrector(ReverseDiffusion(), corrector, grid=times, order="corrector_first", denoise_final=True)
    x = sampler(model, shape=data.shape, generator=seeded(1), constraint=constraint, dtype=torch.float64).x
    close(x, expected, 1e-5, 1e-5 * float(expected.abs().max()))


def models():
    exact = oracle((3, 2, 2))
    yield from (exact.score_model(sde) for sde in (ss.VP(), ss.VE()))


def test_inpainting_is_that_of_score_sde():
    data, mask = normal(2, 3, 2, 2, seed=5), (normal(3, 2, 2, seed=6) > 0)
    for model in models():
        against_published(model, Inpainting(mask), data, mask)


def decouple(x):
    """The colour space of the published code."""
    return torch.einsum("bihw,ij->bjhw", x, M)


def couple(x):
    return torch.einsum("bihw,ij->bjhw", x, torch.inverse(M))


def test_colourisation_is_that_of_score_sde():
    """Grey images have equal channels; their space is the first of an orthogonal colour space."""
    data = normal(2, 1, 2, 2, seed=5).expand(2, 3, 2, 2)
    for model in models():
        against_published(model, Grey(), data, GREY_AXIS, decouple, couple)


@pytest.mark.filterwarnings("ignore::scoresde.prior_mismatch.PriorMismatch")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_converted_checkpoint_restores_with_the_published_formulas(name):
    model = converted(name, "ema").model
    data, mask = normal(1, 3, 16, 16, seed=5), torch.zeros(3, 16, 16, dtype=torch.bool)
    mask[:, :, :4] = True
    against_published(model, Inpainting(mask), data, mask)
    grey = data[:, :1].expand(-1, 3, -1, -1)
    against_published(model, Grey(), grey, GREY_AXIS, decouple, couple)


@pytest.mark.parametrize("denoise_final", [False, True])
def test_the_measured_part_is_exact_and_each_sample_depends_on_its_own_measurement(denoise_final):
    operator, model = Linear(normal(2, 4), shape=(2, 2)), oracle((2, 2)).score_model(ss.VP())
    y = normal(3, 2, seed=2)
    sampler = PredictorCorrector(Ancestral(), steps=10, denoise_final=denoise_final)
    options = {"dtype": torch.float64}
    x = sampler(model, shape=(3, 2, 2), seeds=[4, 5, 6], constraint=Replacement(operator, y), **options).x
    close(operator(x), y, 1e-9)
    alone = sampler(model, shape=(1, 2, 2), seeds=[5], constraint=Replacement(operator, y[1]), **options).x
    close(alone, x[1:2], 1e-9)


def test_replacement_leaves_transitions_to_more_noise_alone_and_starts_with_known_data():
    operator, model = Linear(normal(2, 4), shape=(2, 2)), oracle((2, 2)).score_model(ss.VP())
    constraint, (low, high) = Replacement(operator, normal(2, seed=2)), f64(0.5, 0.6)
    assert constraint.time(low, high) is None
    assert constraint.time(high, low) is low
    assert Replacement(operator, normal(2), published=True).time(high, low) is high
    start, x = f64(0.3), normal(5000, 2, 2, seed=3)
    stream = RandomStream(seeded(4))
    moments = operator(constraint.start(model, x, start, stream)) - model.sde.alpha(start) * constraint.y
    expected = model.sde.sigma(start) ** 2 * operator.matrix @ operator.matrix.mT
    close(moments.mT.cov(), expected, 0.1, 0.05)


def test_repaint_approaches_the_exact_conditional_of_a_gaussian():
    """Replacement alone has a wrong mean and variance, since the two parts of a state do not fit."""
    rho, value, n, errors = 0.9, 1.5, 2000, []
    stds = f64((1 + rho) ** 0.5, (1 - rho) ** 0.5)[None]
    mixture = ss.GaussianMixture(torch.zeros(1, 2), stds, rotation=f64([1, -1], [1, 1]) / 2**0.5)
    constraint = Replacement(Inpainting([1, 0]), f64(value)[None])
    for repeats in (1, 9):
        sampler = RePaint(steps=40, jump=4, repeats=repeats, grid="uniform_log_snr")
        model = mixture.score_model(ss.VP())
        x = sampler(model, shape=(n, 2), generator=seeded(), constraint=constraint, dtype=torch.float64).x
        close(x[:, 0], f64(value).expand(n), 1e-12)
        errors.append((float(x[:, 1].mean()) - rho * value, float(x[:, 1].var()) - (1 - rho**2)))
    (mean, variance), (mended_mean, mended_variance) = errors
    assert mean < -0.4
    assert variance > 0.05
    assert abs(mended_mean) < 0.1
    assert abs(mended_variance) < 0.04


def test_the_grid_of_the_paper_makes_2410_steps_down():
    """250 steps, and nine repetitions of ten for each of 24 jumps, which start at node 1, 11, ..., 231."""
    sde = ss.VP()
    times = Resampled(10, 10)(sde, 250)
    assert int((times.diff() < 0).sum()) == 2410
    assert int((times.diff() > 0).sum()) == 24 * 9
    assert [float(times[0]), float(times[-1])] == [sde.t_max, sde.t_min]
    nodes = Resampled(10, 10, torch.arange(251).flip(0))(sde, 250).long()
    assert nodes[:-1][nodes.diff() > 0].unique().tolist() == list(range(1, 232, 10))


@pytest.mark.parametrize(
    ("jump", "repeats", "expected"),
    [
        (1, 1, [4, 3, 2, 1, 0]),
        (1, 2, [4, 3, 4, 3, 2, 3, 2, 1, 2, 1, 0]),
        (2, 3, [4, 3, 2, 1, 3, 2, 1, 3, 2, 1, 0]),
        (9, 5, [4, 3, 2, 1, 0]),
    ],
)
def test_the_nodes_of_a_resampled_grid(jump, repeats, expected):
    times = f64(0.0, 0.2, 0.4, 0.6, 1.0)
    assert Resampled(jump, repeats, times.flip(0))(ss.VP(), 4).tolist() == times[expected].tolist()


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="Replacement needs a linear operator"):
        Replacement(Nonlinear(lambda x: x, 0.1), f64(0.0))
    with pytest.raises(ValueError, match="jump must be"):
        RePaint(jump=0)
    sampler, model = PredictorCorrector(Ancestral(), steps=2), oracle((2, 2)).score_model(ss.VP())
    with pytest.raises(ValueError, match=r"y must be one measurement \(2,\)"):
        sampler(model, shape=(3, 2, 2), constraint=Replacement(Linear(normal(2, 4), shape=(2, 2)), normal(3)))
