"""Correctors: their stationary law on a Gaussian is known in closed form."""

import pytest
import torch

import scoresde as ss
from scoresde.random_stream import RandomStream

T = torch.tensor(0.5, dtype=torch.float64)


def stationary_variance(corrector, sde, shape, steps=400, n=4000):
    """Empirical variance after many corrector steps on N(0, 1) data, started from its marginal at T."""
    model = ss.GaussianMixture(torch.zeros(1, *shape), torch.ones(1)).score_model(sde)
    stream = RandomStream(torch.Generator().manual_seed(0))
    like = torch.empty(n, *shape, dtype=torch.float64)
    x = torch.sqrt(sde.alpha(T) ** 2 + sde.sigma(T) ** 2) * stream.normal(like)
    for _ in range(steps):
        x = corrector(model, x, T, stream)
    return float(x.var())


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE(), ss.Rectified()], ids=str)
@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
def test_langevin_has_its_own_stationary_law(sde, shape):
    """x + h s + (2h)^(1/2) z on N(0, v) settles at v / (1 - h / 2v), with h = 2 (snr sigma)^2 whatever the state."""
    variance = float(sde.alpha(T) ** 2 + sde.sigma(T) ** 2)
    step = 2 * float(0.3 * sde.sigma(T)) ** 2
    expected = variance / (1 - step / (2 * variance))
    assert stationary_variance(ss.samplers.Langevin(snr=0.3), sde, shape) == pytest.approx(expected, rel=0.04)


def test_annealed_langevin_is_ncsn_s_update():
    sde = ss.VE()
    model = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(sde)
    x = torch.ones(3, 2, dtype=torch.float64)
    stream = RandomStream(torch.Generator().manual_seed(1))
    z = RandomStream(torch.Generator().manual_seed(1)).normal(x)
    # 1907.05600, algorithm 1: alpha_i = epsilon sigma_i^2 / sigma_L^2, with epsilon = 2e-5 and sigma_L = 0.01
    rate = 2e-5 * sde.sigma(T) ** 2 / 0.01**2
    expected = x + rate / 2 * model.score(x, T) + rate.sqrt() * z
    torch.testing.assert_close(ss.samplers.AnnealedLangevin(steps=1)(model, x, T, stream), expected)


def test_the_published_rule():
    """h = 2 (snr mean|z| / mean|score|)^2 (2011.13456, algorithm 5)."""
    sde = ss.VE()
    model = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(sde)
    x = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    stream = RandomStream(torch.Generator().manual_seed(1))
    z, score = RandomStream(torch.Generator().manual_seed(1)).normal(x), model.score(x, T)
    h = 2 * (0.16 * z.norm(dim=1).mean() / score.norm(dim=1).mean()) ** 2
    expected = x + h * score + (2 * h).sqrt() * z
    torch.testing.assert_close(ss.samplers.Langevin(rule="batch_mean")(model, x, T, stream), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ss.samplers.Langevin(snr=0),
        lambda: ss.samplers.Langevin(steps=0),
        lambda: ss.samplers.Langevin(rule="norm"),
        lambda: ss.samplers.AnnealedLangevin(step=4),
        lambda: ss.samplers.AnnealedLangevin(steps=0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def chain(corrector, mixture, sde, x, seed=1):
    """The states after a corrector at T, in float64."""
    return corrector(mixture.score_model(sde), x, T, RandomStream(torch.Generator().manual_seed(seed)))


def gaussian(*stds):
    return ss.GaussianMixture(torch.zeros(1, len(stds)), torch.tensor(stds, dtype=torch.float64)[None])


@pytest.mark.parametrize("sde", [ss.VP(), ss.Karras()], ids=str)
def test_mala_leaves_an_anisotropic_gaussian_where_the_unadjusted_chain_does_not(sde):
    """The variance v of the unadjusted chain settles at v / (1 - h / 2v)."""
    mixture, n, step = gaussian(0.05, 0.5, 2.0), 10_000, 0.5
    variance = (sde.alpha(T) * mixture.stds[0]).square() + sde.sigma(T).square()
    start = mixture.sample(n, sde, T, generator=torch.Generator().manual_seed(0))
    adjusted = chain(ss.samplers.MALA(step, 60), mixture, sde, start).var(dim=0)
    unadjusted = chain(ss.samplers.AnnealedLangevin(2 * step, 60), mixture, sde, start).var(dim=0)
    expected = variance / (1 - step * sde.sigma(T).square() / (2 * variance))
    error = 4.5 * (2 / n) ** 0.5
    torch.testing.assert_close(adjusted / variance, torch.ones_like(variance), rtol=0, atol=error)
    torch.testing.assert_close(unadjusted / expected, torch.ones_like(variance), rtol=0, atol=error)
    assert expected[0] / variance[0] - 1 > 4 * error


def test_mala_moves_a_wrong_law_to_the_gaussian():
    mixture, sde = gaussian(0.3, 1.0), ss.VP()
    variance = (sde.alpha(T) * mixture.stds[0]).square() + sde.sigma(T).square()
    wrong = 2 * torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    found = chain(ss.samplers.MALA(0.5, 100), mixture, sde, wrong)
    torch.testing.assert_close(found.var(dim=0) / variance, torch.ones_like(variance), rtol=0, atol=0.065)
    assert (found.mean(dim=0).abs() < 0.05).all()


def sharp_mixture():
    """Five Gaussians in 8 dimensions with details of 0.05 to 0.3."""
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    return ss.GaussianMixture(means, 0.05 + 0.25 * torch.rand(5, 8, generator=generator, dtype=torch.float64))


def test_mala_is_nearer_to_a_mixture_than_the_unadjusted_chain_at_equal_cost():
    """In the mean log-density: unadjusted, -0.2 for a step of 0.1 sigma^2, the more the larger; adjusted, none seen."""
    sde, mixture, n = ss.VP(), sharp_mixture(), 4000
    start = mixture.sample(n, sde, T, generator=torch.Generator().manual_seed(0))
    wrong = start + 0.5 * sde.sigma(T) * torch.randn(start.shape, generator=torch.Generator().manual_seed(2)).double()

    def deficit(x):
        return float((mixture.log_prob(start, sde, T.expand(n)) - mixture.log_prob(x, sde, T.expand(n))).mean())

    steps = (0.1, 0.2, 0.4)
    stationary = [deficit(chain(ss.samplers.MALA(h, 39), mixture, sde, start)) for h in steps]
    unadjusted = [deficit(chain(ss.samplers.AnnealedLangevin(2 * h, 40), mixture, sde, start)) for h in steps]
    assert max(map(abs, stationary)) < 0.15
    assert unadjusted[0] > 0.1
    assert unadjusted[2] > 0.6
    mended = deficit(chain(ss.samplers.MALA(0.4, 3), mixture, sde, wrong))
    best = min(deficit(chain(ss.samplers.AnnealedLangevin(2 * h, 4), mixture, sde, wrong)) for h in steps)
    assert mended < 0.6 * best


@pytest.mark.parametrize("size", [64, 1024])
def test_mala_s_acceptance_is_one_half_where_it_is_said_to_be(size):
    sde = ss.VP()
    mixture = gaussian(*[1e-3] * size)
    x = mixture.sample(400, sde, T, generator=torch.Generator().manual_seed(0))
    y = chain(ss.samplers.MALA(1.5 * size ** (-1 / 3), 1), mixture, sde, x)
    assert float((y != x).any(dim=1).double().mean()) == pytest.approx(0.5, abs=0.12)


class Counting:
    """A model that counts its evaluations."""

    def __init__(self, model):
        self.model, self.sde, self.count = model, model.sde, 0

    def predict(self, x, t):
        self.count += 1
        return self.model.predict(x, t)


def test_mala_costs_one_evaluation_more_than_its_steps_and_does_not_depend_on_the_batch():
    sde, mixture = ss.VE(), sharp_mixture()
    model, x = Counting(mixture.score_model(sde)), mixture.sample(4, sde, T, generator=torch.Generator().manual_seed(0))
    corrector = ss.samplers.MALA(step=1.0, steps=6)
    together = corrector(model, x, T, RandomStream(seeds=[4, 1, 7, 2]))
    assert model.count == 7
    alone = corrector(model, x[2:3], T, RandomStream(seeds=[7]))
    torch.testing.assert_close(together[2:3], alone, rtol=1e-10, atol=1e-10)


def test_mala_does_not_hide_a_network_that_gives_nan():
    def network(x, c_noise, cond):
        return torch.where(x > 0, torch.nan, x)

    model, x = ss.ScoreModel(network, ss.VP()), torch.ones(2, 3)
    assert ss.samplers.MALA()(model, x, T, RandomStream(seeds=[0, 1])).isnan().all()


@pytest.mark.parametrize("make", [lambda: ss.samplers.MALA(step=0), lambda: ss.samplers.MALA(steps=0)])
def test_mala_refuses_bad_arguments(make):
    with pytest.raises(ValueError, match="expected"):
        make()
