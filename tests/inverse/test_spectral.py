"""DDRM and DDNM: their published formulas, the marginals that they keep, and exact measurements without noise."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.inverse import Linear, Nonlinear
from scoresde.inverse.constraints import Replacement, Resampled
from scoresde.inverse.operators import singular_axes
from scoresde.inverse.spectral import DDNM, DDRM
from scoresde.random_stream import RandomStream
from scoresde.samplers import Ancestral, PredictorCorrector
from tests.conftest import close, f64, normal, oracle, seeded, within
from tests.inverse.cases import OPERATORS, by_functions

SEVERAL = f64(2.0, 0.5, 0.05, 0.0)  # singular values
TURN = torch.linalg.qr(normal(4, 4)).Q


def operator(noise=0.2):
    matrix = torch.linalg.qr(normal(3, 3, seed=1)).Q @ (SEVERAL.diag()[:3] @ TURN)
    return Linear(matrix, noise_std=noise, shape=(2, 2))


class Known(torch.nn.Module):
    """A network that knows x_0, as data prediction."""

    def __init__(self, x0):
        super().__init__()
        self.x0 = x0

    def forward(self, x, label, cond=None):
        return self.x0.to(x).expand(x.shape)


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE()], ids=["vp", "ve"])
@pytest.mark.parametrize("settings", [{}, {"eta": 0.3, "eta_b": 0.6}, None], ids=["ddrm", "ddrm 0.6", "ddnm"])
def test_a_transition_keeps_the_marginal_if_the_model_knows_the_data(settings, sde):
    """For x_t ~ q(x_t | x_0) and a measurement of x_0 with fresh noise, x_s ~ N(alpha x_0, sigma^2 I).

    2201.11793, proposition 3.1; 2212.00490, section 3.3. For DDRM, any number of transitions with one measurement keeps
    it; in DDNM, the second one starts from a state that depends on the noise of the measurement.
    """
    n, x0, op = 4000, normal(2, 2, seed=3), operator()
    y, times = op.measure(x0.expand(n, 2, 2), seeded(4)), [sde.t_max, 0.6, 0.3, 0.05]
    model, options = ss.ScoreModel(Known(x0), sde, "data"), {"grid": times, "denoise_final": False}
    sampler = DDNM(op, y, **options) if settings is None else DDRM(op, y, **options, **settings)
    stream, x = RandomStream(seeds=range(n)), None
    for entry in sampler.plan(sde, sampler.transitions(sde)):
        here, target = entry
        if x is None or settings is None:
            x = here.alpha * x0 + here.sigma * stream.normal(normal(n, 2, 2))
        x, _ = sampler.advance(model, x, entry, stream, None)
        unit = (x - target.alpha * x0).flatten(1) / target.sigma
        within(unit, torch.zeros(4, dtype=torch.float64), 5)
        within(torch.einsum("ni,nj->nij", unit, unit), torch.eye(4, dtype=torch.float64), 5)


def test_ddrm_has_the_formulas_of_the_paper():
    """2201.11793, eq. 7 and 8, coordinate by coordinate in units of alpha; the draws are taken from the same stream."""
    sde, eta, eta_b, noise = ss.VE(), 0.7, 0.9, 0.2
    op, model = operator(noise), oracle((2, 2)).score_model(sde)
    y = normal(1, 3, seed=5)
    sampler = DDRM(op, y, grid=[sde.t_max, 0.7, 0.5, 0.3, 0.05], eta=eta, eta_b=eta_b, denoise_final=False)
    states = sampler(model, shape=(1, 2, 2), seeds=[3], trajectory=True, dtype=torch.float64).trajectory
    stream, (values, axes) = RandomStream(seeds=[3]), singular_axes(op.matrix)
    first = stream.normal(normal(1, 2, 2))
    ybar = axes @ torch.linalg.pinv(op.matrix) @ y[0]
    top = float(sde.sigma(f64(sde.t_max)))
    expected = []
    for i, s in enumerate(values.tolist()):
        z = (axes @ first.flatten())[i] * top
        seen = s > 0 and noise / s <= top
        expected.append(float(ybar[i] + z / top * math.sqrt(top**2 - noise**2 / s**2)) if seen else float(z))
    close(axes @ states[0].flatten(), f64(*expected), 1e-6)
    for (t, following), x, result in zip(sampler.transitions(sde), states, states[1:], strict=False):
        sigma, then = float(sde.sigma(t)), float(sde.sigma(following))
        xbar, mean = axes @ x.flatten(), axes @ model.denoise(x, t).flatten()
        z, expected = axes @ stream.normal(x).flatten(), []
        for i, s in enumerate(values.tolist()):
            if s == 0:
                drift, std = math.sqrt(1 - eta**2) * then * (xbar[i] - mean[i]) / sigma, eta * then
                expected.append(float(mean[i] + drift + std * z[i]))
            elif then < noise / s:
                drift = math.sqrt(1 - eta**2) * then * (ybar[i] - mean[i]) / (noise / s)
                expected.append(float(mean[i] + drift + eta * then * z[i]))
            else:
                std = math.sqrt(then**2 - noise**2 / s**2 * eta_b**2)
                expected.append(float((1 - eta_b) * mean[i] + eta_b * ybar[i] + std * z[i]))
        close(axes @ result.flatten(), f64(*expected), 1e-6, 1e-9)


def test_ddnm_without_noise_is_the_ancestral_step_at_the_rectified_data():
    """2212.00490, algorithm 1: x_0 is replaced by A^+ y + (I - A^+ A) x_0; as a model, in the ancestral sampler."""
    op, model = operator(0.0), oracle((2, 2)).score_model(ss.VP())
    y = normal(3, 3, seed=5)

    class Rectified(ss.ModelWrapper):
        def predict(self, x, t):
            views = self.model.predict(x, t)
            before = views.denoised
            return ss.ShiftedViews(views, before, before + op.pseudo_inverse(y - op(before)))

    options = {"shape": (3, 2, 2), "seeds": range(3), "dtype": torch.float64}
    expected = PredictorCorrector(Ancestral(), steps=8, grid="uniform_time", denoise_final=True)(
        Rectified(model), **options
    )
    result = DDNM(op, y, steps=8)(model, **options)
    close(result.x, expected.x, 1e-6, 1e-8)
    assert result.nfe == expected.nfe == 9


@pytest.mark.parametrize("make", [DDRM, DDNM])
def test_a_measurement_without_noise_is_reproduced(make):
    op, model = operator(0.0), oracle((2, 2)).score_model(ss.VP())
    y, options = normal(3, 3, seed=5), {"dtype": torch.float64}
    result = make(op, y, steps=10)(model, shape=(3, 2, 2), seeds=[4, 5, 6], **options)
    close(op(result.x), y, 1e-9, 1e-9)
    assert result.nfe == 11
    alone = make(op, y[1], steps=10)(model, shape=(1, 2, 2), seeds=[5], **options).x
    close(alone, result.x[1:2], 1e-9)
    again = make(op, y, steps=6, grid=Resampled(2, 3))(model, shape=(3, 2, 2), seeds=[4, 5, 6], **options)
    close(op(again.x), y, 1e-9, 1e-9)
    assert again.nfe == 7 + 2 * 2 * 2


def test_the_residual_of_ddrm_is_that_of_the_last_noise_level_above_the_measurement():
    """Times at which sigma/alpha goes from 1 past the noise 0.05, or is 0.05 once: far above the noise, or about it."""
    sde, op = ss.VE(sigma_min=0.01, sigma_max=10.0), Linear(f64([1.0, 0.0])[None], noise_std=0.05)
    model, y = ss.GaussianMixture(f64([0.4, 0.0])[None], f64(0.3)[None]).score_model(sde), f64(1.0)[None]
    residuals = []
    for level in (0.02, 0.0501):
        times = sde.time(-2 * f64(10.0, 1.0, level, 0.01).log())
        x = DDRM(op, y, grid=times)(model, shape=(200, 2), seeds=range(200), dtype=torch.float64).x
        residuals.append(float((op(x) - y).square().mean().sqrt()) / 0.05)
    assert residuals[0] > 6
    assert residuals[1] < 1.5


@pytest.mark.parametrize("name", [name for name, (known, _) in OPERATORS.items() if known.has_spectrum])
def test_measurements_of_every_operator_with_known_singular_values_are_reproduced(name):
    op, shape = OPERATORS[name]
    model = ss.GaussianMixture(torch.zeros(1, *shape), torch.ones(1)).score_model(ss.VP())
    y = op(normal(2, *shape, seed=5))
    for method in (DDRM(op, y, steps=2), DDNM(op, y, steps=2)):
        close(op(method(model, shape=(2, *shape), seeds=[0, 1], dtype=torch.float64).x), y, 1e-6, 1e-6)
    sampler = PredictorCorrector(Ancestral(), steps=2)
    x = sampler(model, shape=(2, *shape), seeds=[0, 1], constraint=Replacement(op, y), dtype=torch.float64).x
    close(op(x), y, 1e-6, 1e-6)


@pytest.mark.parametrize("make", [DDRM, DDNM])
def test_bad_input_is_refused(make):
    model, y = oracle((4,)).score_model(ss.VP()), normal(1, 2)
    cases = {
        "noise_std must be one number": Linear(normal(2, 4), noise_std=f64(0.1, 0.2)),
        "y must be one measurement": Linear(normal(3, 4), noise_std=0.1),
    }
    for message, op in cases.items():
        with pytest.raises(ValueError, match=message):
            make(op, y, steps=2)(model, shape=(3, 4))
    with pytest.raises(TypeError, match=r"singular values of .* are not known"):
        make(by_functions(normal(2, 4), (4,)), y, steps=2)(model, shape=(3, 4))
    with pytest.raises(TypeError, match="needs a linear operator"):
        make(Nonlinear(lambda x: x, 0.1), y)
    with pytest.raises(ValueError, match="steps must be"):
        make(cases["y must be one measurement"], y, steps=0)
    with pytest.raises(ValueError, match="eta must be"):
        DDRM(cases["y must be one measurement"], y, eta=1.5)
