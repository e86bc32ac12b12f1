"""Correctors: their stationary law on a Gaussian is known in closed form."""

import pytest
import torch

import scoresde as ss
from scoresde.random_stream import RandomStream
from scoresde.samplers import MALA, AnnealedLangevin, Langevin
from tests.conftest import close, f64, normal, seeded

T = f64(0.5)
STANDARD = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1))


def chain(corrector, mixture, sde, x, seed=1):
    """The states after a corrector at T, in float64."""
    return corrector(mixture.score_model(sde), x, T, RandomStream(seeded(seed)))


@pytest.mark.parametrize(("sde", "shape"), [(ss.VP(), (3,)), (ss.VE(), (1, 2, 2))], ids=str)
def test_langevin_has_its_own_stationary_law(sde, shape):
    """x + h s + (2h)^(1/2) z on N(0, v) settles at v / (1 - h / 2v), with h = 2 (snr sigma)^2 for every state."""
    mixture, n = ss.GaussianMixture(torch.zeros(1, *shape), torch.ones(1)), 8000
    variance = float(sde.alpha(T) ** 2 + sde.sigma(T) ** 2)
    step = 2 * float(0.3 * sde.sigma(T)) ** 2
    x = chain(Langevin(snr=0.3, steps=40), mixture, sde, variance**0.5 * normal(n, *shape))
    expected = variance / (1 - step / (2 * variance))
    assert float(x.var()) == pytest.approx(expected, rel=4.5 * (2 / x.numel()) ** 0.5)


def test_annealed_langevin_is_the_update_of_ncsn():
    """1907.05600, algorithm 1: alpha_i = epsilon sigma_i^2 / sigma_L^2, with epsilon = 2e-5 and sigma_L = 0.01."""
    sde, x = ss.VE(), torch.ones(3, 2, dtype=torch.float64)
    rate, z = 2e-5 * sde.sigma(T) ** 2 / 0.01**2, RandomStream(seeded(1)).normal(x)
    expected = x + rate / 2 * STANDARD.score_model(sde).score(x, T) + rate.sqrt() * z
    close(chain(AnnealedLangevin(steps=1), STANDARD, sde, x), expected, 1e-7)


def test_the_published_rule_of_langevin():
    """h = 2 (snr mean|z| / mean|score|)^2 (2011.13456, algorithm 5)."""
    sde, x = ss.VE(), torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    z, score = RandomStream(seeded(1)).normal(x), STANDARD.score_model(sde).score(x, T)
    h = 2 * (0.16 * z.norm(dim=1).mean() / score.norm(dim=1).mean()) ** 2
    expected = x + h * score + (2 * h).sqrt() * z
    close(chain(Langevin(rule="batch_mean"), STANDARD, sde, x), expected, 1e-7)


# MALA


def gaussian(*stds):
    return ss.GaussianMixture(torch.zeros(1, len(stds)), f64(*stds)[None])


def test_mala_leaves_an_anisotropic_gaussian_where_the_unadjusted_chain_does_not():
    """The variance v of the unadjusted chain settles at v / (1 - h / 2v)."""
    sde, mixture, n, step = ss.Karras(), gaussian(0.05, 0.5, 2.0), 10_000, 0.5
    variance = (sde.alpha(T) * mixture.stds[0]).square() + sde.sigma(T).square()
    start = mixture.sample(n, sde, T, generator=seeded())
    adjusted = chain(MALA(step, 30), mixture, sde, start).var(dim=0)
    unadjusted = chain(AnnealedLangevin(2 * step, 30), mixture, sde, start).var(dim=0)
    expected = variance / (1 - step * sde.sigma(T).square() / (2 * variance))
    error = 4.5 * (2 / n) ** 0.5
    close(adjusted / variance, torch.ones_like(variance), rtol=0, atol=error)
    close(unadjusted / expected, torch.ones_like(variance), rtol=0, atol=error)
    assert expected[0] / variance[0] - 1 > 4 * error


def test_mala_moves_a_wrong_law_to_the_gaussian():
    mixture, sde, n = gaussian(0.3, 1.0), ss.VP(), 10_000
    variance = (sde.alpha(T) * mixture.stds[0]).square() + sde.sigma(T).square()
    x = chain(MALA(0.5, 100), mixture, sde, 2 * normal(n, 2) + 1)
    close(x.var(dim=0) / variance, torch.ones_like(variance), rtol=0, atol=4.5 * (2 / n) ** 0.5)
    assert (x.mean(dim=0).abs() < 4.5 * (variance / n).sqrt()).all()


def sharp_mixture():
    """Five Gaussians in 8 dimensions with details of 0.05 to 0.3."""
    stds = 0.05 + 0.25 * torch.rand(5, 8, generator=seeded(5), dtype=torch.float64)
    return ss.GaussianMixture(normal(5, 8, seed=6), stds)


def test_mala_is_nearer_to_a_mixture_than_the_unadjusted_chain_at_equal_cost():
    """In the mean log-density: unadjusted, -0.1 or more for a step of 0.1 sigma^2; adjusted, none seen."""
    sde, mixture, n = ss.VP(), sharp_mixture(), 4000
    start = mixture.sample(n, sde, T, generator=seeded())
    wrong = start + 0.5 * sde.sigma(T) * normal(*start.shape, seed=2)

    def deficit(corrector, x):
        x = chain(corrector, mixture, sde, x)
        return float((mixture.log_prob(start, sde, T.expand(n)) - mixture.log_prob(x, sde, T.expand(n))).mean())

    steps = (0.1, 0.4)
    assert max(abs(deficit(MALA(h, 39), start)) for h in steps) < 0.15
    unadjusted = [deficit(AnnealedLangevin(2 * h, 40), start) for h in steps]
    assert unadjusted[0] > 0.1
    assert unadjusted[1] > 0.6
    best = min(deficit(AnnealedLangevin(2 * h, 4), wrong) for h in (0.1, 0.2, 0.4))
    assert deficit(MALA(0.4, 3), wrong) < 0.6 * best


@pytest.mark.parametrize("size", [64, 1024])
def test_mala_accepts_half_of_the_documented_steps(size):
    sde, mixture = ss.VP(), gaussian(*[1e-3] * size)
    x = mixture.sample(400, sde, T, generator=seeded())
    y = chain(MALA(1.5 * size ** (-1 / 3), 1), mixture, sde, x)
    assert float((y != x).any(dim=1).double().mean()) == pytest.approx(0.5, abs=0.12)


def test_mala_costs_one_evaluation_more_than_its_steps_and_does_not_depend_on_the_batch():
    sde, mixture, calls = ss.VE(), sharp_mixture(), []
    model, x = mixture.score_model(sde), mixture.sample(4, sde, T, generator=seeded())
    model.network.register_forward_hook(lambda *_: calls.append(1))
    together = MALA(1.0, 6)(model, x, T, RandomStream(seeds=[4, 1, 7, 2]))
    assert len(calls) == 7
    close(together[2:3], MALA(1.0, 6)(model, x[2:3], T, RandomStream(seeds=[7])), 1e-10, 1e-10)


def test_mala_does_not_hide_a_network_that_gives_nan():
    model = ss.ScoreModel(lambda x, c_noise, cond: torch.where(x > 0, torch.nan, x), ss.VP())
    assert MALA()(model, torch.ones(2, 3), T, RandomStream(seeds=[0, 1])).isnan().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Langevin(snr=0),
        lambda: Langevin(steps=0),
        lambda: Langevin(rule="norm"),
        lambda: AnnealedLangevin(step=4),
        lambda: AnnealedLangevin(steps=0),
        lambda: MALA(step=0),
        lambda: MALA(steps=0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match=r"needs|must be"):
        make()
