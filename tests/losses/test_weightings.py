"""The weightings of the papers, with the density that suits each."""

import pytest
import torch

import scoresde as ss
from scoresde import losses
from tests.conftest import FINITE, PATHS, close, exact_model, f64, normal, some, times
from tests.losses.published import SUITED, published_density, published_omega, snr


def terms_at(sde, t, *arguments, **options):
    model = ss.ScoreModel(lambda x, label, cond: x, sde)
    return losses.DenoisingScoreMatching(*arguments, **options)(model, normal(len(t), 2), t=t)


@pytest.mark.parametrize("weighting", list(SUITED))
@pytest.mark.parametrize("sde", FINITE)
def test_weights_are_the_published_ones(sde, weighting):
    t = times(sde, n=41)
    omega = published_omega(weighting, sde, t)
    close(losses.WEIGHTINGS[weighting]().omega(sde, t), omega, rtol=1e-7)
    terms = terms_at(sde, t, weighting)
    close(terms.weight, omega / published_density(SUITED[weighting], sde, t), rtol=1e-7)
    close(terms.t, t, rtol=0)
    if weighting == "likelihood":  # its importance weight is constant
        clean, noisy = sde.log_snr(f64(sde.t_min, sde.t_max))
        close(terms.weight, (clean - noisy).expand(41), rtol=1e-10)


def test_parameters_of_the_weightings():
    sde, t = ss.VP(), f64(0.1, 0.3, 0.9)
    close(losses.MinSNRWeighting(gamma=1.0).omega(sde, t) * (1 - 1e-5), torch.clamp(1 / snr(sde, t), max=1), rtol=1e-9)
    karras = losses.KarrasWeighting(sigma_data=2.0, mean=0.3, std=0.8)
    expected = (1 + 1 / snr(sde, t) / 4) * losses.LogNormal(0.3, 0.8).density(sde, t)
    close(karras.omega(sde, t), expected, rtol=1e-10)
    assert (karras.times.mean, karras.times.std) == (0.3, 0.8)


def test_users_can_define_weightings_and_densities():
    class Cubic(losses.TimeDensity):
        def quantile(self, sde, u):
            return u ** (1 / 3)

        def density(self, sde, t):
            return 3 * t**2

    class Half(losses.Weighting):
        def omega(self, sde, t):
            return torch.full_like(t, 0.5)

    t = f64(0.5, 0.9)
    close(terms_at(ss.VP(), t, Half(), times=Cubic()).weight, 0.5 / (3 * t**2))
    assert isinstance(losses.DenoisingScoreMatching(Half()).times, losses.UniformTime)
    for base in (losses.Weighting().omega, losses.TimeDensity().quantile, losses.TimeDensity().density):
        with pytest.raises(NotImplementedError, match="must define"):
            base(ss.VP(), t)


# Unit weight on the error of a view


def tanh_model(sde, prediction):
    return ss.ScoreModel(lambda x, label, cond: torch.tanh(x), sde, prediction)


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
@pytest.mark.parametrize("sde", PATHS)
def test_the_flow_matching_loss_is_the_squared_error_of_the_velocity(sde, shape):
    """2210.02747, eq. 9: ||u(x_t, t) - (alpha' x_0 + sigma' eps)||^2, here over d, from t_min to t_max."""
    t = torch.lerp(f64(sde.t_min), f64(sde.t_max), f64(0.0, 0.2, 0.7, 1.0))
    x0, eps, model = normal(4, *shape), normal(4, *shape, seed=1), tanh_model(sde, "velocity")
    column = (-1,) + (1,) * len(shape)
    target = sde.alpha_dot(t).reshape(column) * x0 + sde.sigma_dot(t).reshape(column) * eps
    expected = (torch.tanh(sde.perturb(x0, t, eps)) - target).square().flatten(1).mean(dim=1)
    terms = losses.DenoisingScoreMatching("velocity")(model, x0, t=t, noise=eps)
    close(terms.value, expected, rtol=1e-6)
    close(terms.weight, torch.ones_like(t), rtol=1e-12)


@pytest.mark.parametrize("sde", some("zero-snr-vp", "zero-snr-ve"))
@pytest.mark.parametrize(("weighting", "prediction"), [("v", "v"), ("data", "data"), ("velocity", "velocity")])
def test_unit_weight_trains_where_no_signal_is_left(sde, weighting, prediction):
    """There, x is noise and every error is one of x_0: its squared error has the weight 1, 1 and alpha'^2."""
    t, x0, eps = f64(sde.t_max), normal(5, 3), normal(5, 3, seed=1)
    model = tanh_model(sde, prediction)
    error = (model.denoise(sde.perturb(x0, t, eps), t) - x0).square().mean(dim=1)
    scale = sde.alpha_dot(t) ** 2 if weighting == "velocity" else 1.0
    close(losses.DenoisingScoreMatching(weighting)(model, x0, t=t, noise=eps).value, scale * error, rtol=1e-6)
    for other in ("variance", "min_snr"):  # the error of the noise is 0 there
        assert losses.DenoisingScoreMatching(other)(model, x0, t=t, noise=eps).value.abs().max() < 1e-12


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_the_minimum_of_the_flow_matching_loss_of_a_gaussian(std):
    r"""On x_t = (1 - t) x_0 + t eps it is \int_0^1 s^2 / ((1 - t)^2 s^2 + t^2) dt = pi s / 2."""
    sde = ss.Rectified(t_min=0.0, t_max=1.0)
    model = exact_model(ss.GaussianMixture(torch.zeros(1, 1), f64(std)[None]), sde, "velocity")
    t = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000).repeat_interleave(4)
    signs = f64([1, 1], [1, -1], [-1, 1], [-1, -1]).repeat(4000, 1)  # with exact second moments
    loss = losses.DenoisingScoreMatching("velocity")
    value = loss(model, std * signs[:, :1], t=t, noise=signs[:, 1:]).value.mean()
    close(value, f64(torch.pi * std / 2), rtol=1e-6)


def test_the_minimum_of_the_loss_of_v_of_a_standard_gaussian_is_one():
    sde = ss.ZeroTerminalSNR(ss.VP())
    model = ss.GaussianMixture(torch.zeros(1, 1), torch.ones(1)).score_model(sde)
    t = torch.linspace(0.01, 1.0, 50, dtype=torch.float64).repeat_interleave(4)
    signs = f64([1, 1], [1, -1], [-1, 1], [-1, -1]).repeat(50, 1)
    value = losses.DenoisingScoreMatching("v")(model, signs[:, :1], t=t, noise=signs[:, 1:]).value
    close(value.reshape(50, 4).mean(dim=1), torch.ones(50, dtype=torch.float64), rtol=1e-6)


def test_bad_views_are_refused():
    with pytest.raises(ValueError, match="view must be one of velocity, v, denoised, noise, score; got 'flow'"):
        losses.UnitWeighting("flow")
    for implicit in (losses.ImplicitScoreMatching, losses.SlicedScoreMatching):
        with pytest.raises(ValueError, match="must be of the view 'noise'; got one of the view 'velocity'"):
            implicit(weighting="velocity")


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="weighting must be one of variance, likelihood, karras, min_snr, velocity, v, data; got 'snr"
    ):
        losses.SlicedScoreMatching(weighting="snr")
