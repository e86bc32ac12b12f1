"""The weightings of the papers, with the density that suits each."""

import pytest
import torch

import scoresde as ss
from scoresde import losses
from tests.conftest import FINITE, close, f64, normal, times
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


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="weighting must be one of variance, likelihood, karras, min_snr; got 'snr'"):
        losses.SlicedScoreMatching(weighting="snr")
