"""Evidence bounds against closed forms of one Gaussian, identities of a mixture, and chains computed by hand."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import scoresde as ss
from scoresde import bounds, losses
from scoresde.data import Affine, Compose, Levels, Logit
from scoresde.dequantization import DataMap
from tests.conftest import DDPM, FINITE, close, exact_model, f64, normal, oracle, seeded, some, within
from tests.losses.networks import with_variance

SHAPES = [(3,), (1, 2, 2)]


def snr(sde, t):
    return sde.log_snr(f64(t)).exp()


class Constant(torch.nn.Module):
    """x_hat_0 = a number, or the condition, whatever the state."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = torch.nn.Parameter(f64(value))

    def forward(self, x, c_noise, cond=None):
        if isinstance(cond, dict):
            cond = cond["target"]
        return self.value.expand_as(x) if cond is None else cond.reshape(-1, *[1] * (x.ndim - 1)).expand_as(x)


def constant(sde, value=0.0):
    return ss.ScoreModel(Constant(value), sde, "data")


def repeated(x, n):
    """Every row of x n times in a row."""
    return x.repeat_interleave(n, dim=0)


# --- the continuous bound of one Gaussian


def gaussian_bound(sde, square, size, std):
    """The three terms of the exact score of N(m, std^2 I), at |x - m|^2 = square, integrated by hand.

    eps - eps_hat = w eps - (1 - w)(alpha/sigma)(x - m) with w = SNR s^2/(1 + SNR s^2), so with r = SNR s^2
    E|eps - eps_hat|^2 = d w^2 + r (1 - w)^2 |x - m|^2/s^2, whose integral over log SNR is the difference of
    d [log(1 + r) + 1/(1 + r)] - |x - m|^2/s^2 / (1 + r).
    """
    clean, noisy = (snr(sde, t) * std**2 for t in (sde.t_min, sde.t_max))

    def antiderivative(r):
        return size * (torch.log1p(r) + 1 / (1 + r)) - square / std**2 / (1 + r)

    diffusion = 0.5 * (antiderivative(clean) - antiderivative(noisy))
    left = size * (clean / (1 + clean)) ** 2 + square / std**2 * clean / (1 + clean) ** 2
    return diffusion, 0.5 * left + 0.5 * size * (2 * math.pi * std**2 / clean).log()


def prior_of(sde, x):
    at_end = Normal(sde.alpha(f64(sde.t_max)) * x, sde.sigma(f64(sde.t_max)))
    return kl_divergence(at_end, Normal(f64(0.0), f64(sde.prior_std))).flatten(1).sum(dim=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sde", FINITE)
def test_terms_of_a_gaussian_are_the_closed_integrals(sde, shape):
    std, mean, points, copies = 0.6, 0.5, normal(3, *shape), 50
    model = ss.GaussianMixture(torch.full((1, *shape), mean), f64(std)[None]).score_model(sde)
    x, size = repeated(points, copies), points[0].numel()
    result = bounds.continuous_nats(model, x, draws=16, seeds=range(len(x)))
    square = (points - mean).square().flatten(1).sum(dim=1)
    diffusion, reconstruction = gaussian_bound(sde, square, size, std)
    prior = prior_of(sde, points)
    assert list(result.terms) == ["prior", "diffusion", "reconstruction"]
    close(result.terms["prior"], repeated(prior, copies), rtol=1e-9, atol=1e-12)
    by_point = {name: values.reshape(3, copies).T for name, values in result.terms.items()}
    within(by_point["diffusion"], diffusion)
    within(by_point["reconstruction"], reconstruction)
    within(result.value.reshape(3, copies).T, prior + diffusion + reconstruction)
    # tight: what is left of -log p is the prior's mismatch, and of the order of 1/SNR at t_min
    exact = -Normal(mean, std).log_prob(points).flatten(1).sum(dim=1)
    gap = prior + diffusion + reconstruction - exact
    ends = snr(sde, sde.t_max) * (1 + square) + 1 / snr(sde, sde.t_min) * (1 + square) / std**4
    assert bool((gap.abs() < size * ends).all())


@pytest.mark.parametrize("times", [losses.UniformTime(), losses.LogNormal(-0.5, 1.5), losses.UniformLogSNR()])
def test_any_density_of_times_gives_the_same_bound(times):
    sde, std, x = ss.VP(t_min=0.05), 0.6, repeated(normal(1, 3), 200)
    model = ss.GaussianMixture(torch.zeros(1, 3), f64(std)[None]).score_model(sde)
    diffusion, _ = gaussian_bound(sde, x[0].square().sum(), 3, std)
    within(bounds.continuous_nats(model, x, draws=8, times=times, seeds=range(200)).terms["diffusion"], diffusion)


def test_strata_cover_the_time_of_each_sample():
    """Two times of each in every quarter of the log-SNR, after two at t_min for the decoder."""
    sde, seen = ss.VP(t_min=0.05), []

    class Watch(Constant):
        def forward(self, x, c_noise, cond=None):
            seen.append(c_noise.double())
            return super().forward(x, c_noise, cond)

    bounds.continuous_nats(ss.ScoreModel(Watch(), sde, "data"), torch.zeros(40, 2), draws=8, seeds=range(40))
    log_snr = sde.log_snr(torch.stack(seen[2:]))
    clean, noisy = sde.log_snr(f64(sde.t_min, sde.t_max))
    place = (clean - log_snr) / (clean - noisy)
    lowest = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])[:, None] / 4
    assert bool(((place >= lowest - 1e-9) & (place <= lowest + 0.25 + 1e-9)).all())
    assert float(place.std(dim=1).min()) > 0.05  # independent over samples
    assert float((place[0] - place[1]).abs().min()) > 0  # and over the two of a stratum
    close(torch.stack(seen[:2]), torch.full((2, 40), sde.t_min, dtype=torch.float64))


# --- the continuous bound of a mixture


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sde", some("vp", "sub-vp", "ve", "rectified"))
def test_the_diffusion_of_the_exact_score_is_a_difference_of_divergences(sde, shape):
    """KL(q(x_t | x) || p_t) at t_min less that at t_max, each by plain averages of exact densities: no integral."""
    mixture, points, copies = oracle(shape), oracle(shape).sample(2, generator=seeded(5)), 200
    x = repeated(points, copies)

    def divergence(t):
        alpha, sigma = sde.alpha(f64(t)), sde.sigma(f64(t))
        many = repeated(points, 4000)
        noisy = alpha * many + sigma * normal(*many.shape, seed=7)
        log_q = Normal(alpha * many, sigma).log_prob(noisy).flatten(1).sum(dim=1)
        return (log_q - mixture.log_prob(noisy, sde, t)).reshape(2, 4000).T

    result = bounds.continuous_nats(mixture.score_model(sde), x, draws=16, seeds=range(len(x)))
    estimate = result.terms["diffusion"].reshape(2, copies).T
    exact = divergence(sde.t_min) - divergence(sde.t_max)
    error = (estimate.var(dim=0) / copies + exact.var(dim=0) / 4000).sqrt()
    assert bool(((estimate.mean(dim=0) - exact.mean(dim=0)).abs() < 4.5 * error).all())
    assert float(error.max()) < 0.2 * x[0].numel()


@pytest.mark.parametrize("sde", some("vp", "sub-vp", "ve"))
def test_the_bound_is_above_the_density_and_a_wrong_score_adds_its_error(sde):
    """A constant error c of the noise adds |c|^2/2 (log SNR(t_min) - log SNR(t_max) + 1), on average over the data."""
    mixture, n, wrong = oracle((3,)), 1500, 0.4
    x = mixture.sample(n, generator=seeded(3))
    exact, off = (
        bounds.continuous_nats(
            exact_model(mixture, sde, "noise", amount, lambda x, t: torch.ones_like(x)), x, draws=8, seeds=range(n)
        ).value
        for amount in (0.0, wrong)
    )
    gap = exact + mixture.log_prob(x)
    error = float(gap.std()) / n**0.5
    assert error < 0.3
    assert -4.5 * error < float(gap.mean()) < 4.5 * error + float(prior_of(sde, x).mean()) + 0.01
    span = sde.log_snr(f64(sde.t_min)) - sde.log_snr(f64(sde.t_max))
    within(off - exact, 0.5 * 3 * wrong**2 * (span + 1))


# --- the continuous bound of levels, in bits


IMAGES = torch.randint(0, 8, (5, 1, 2, 2), generator=seeded(1))


def model_of_levels(transform, sde, mean=4.0, std=2.5):
    """N(mean, std^2) over the values of levels, seen through an affine transform."""
    slope = float(transform(f64(1.0)) - transform(f64(0.0)))
    centre = transform(f64(mean)).expand(1, 1, 2, 2)
    return ss.GaussianMixture(centre, f64(std * slope)[None]).score_model(sde)


@pytest.mark.parametrize("transform", [Levels(8, -1, 1), Levels(8, 0, 3), Affine(0.5, -2)], ids=str)
def test_bits_of_dequantised_levels(transform):
    """E|x + u - m|^2 = |x + 1/2 - m|^2 + d/12 over the dequantisations, in the closed form of a Gaussian."""
    sde, std, slope = ss.VP(), 2.5, float(transform(f64(1.0)) - transform(f64(0.0)))
    model = model_of_levels(transform, sde, 4.0, std)
    images = repeated(IMAGES, 60)
    result = bounds.continuous(model, images, transform, draws=16, batch_size=128)
    spread = slope**2 * 4 / 12
    square = slope**2 * (IMAGES + 0.5 - 4).square().flatten(1).sum(dim=1) + spread
    diffusion, reconstruction = gaussian_bound(sde, square, 4, std * slope)
    prior = prior_of(sde, transform(IMAGES.double() + 0.5)) + 0.5 * sde.alpha(f64(1.0)) ** 2 * spread
    bits = 4 * math.log(2)
    terms = {name: values.reshape(5, 60).T for name, values in result.terms.items()}
    within(terms["prior"], prior / bits)
    within(terms["diffusion"], diffusion / bits)
    within(terms["reconstruction"], reconstruction / bits)
    close(terms["change_of_variables"], torch.full((60, 5), -math.log2(slope), dtype=torch.float64))
    # of a density of bits: the scale of the data is gone, and the gap to the density is the prior's mismatch
    exact = -Normal(4.0, std).log_prob(IMAGES + 0.5).flatten(1).sum(dim=1) + 0.5 * 4 / 12 / std**2
    within(result.per_image.reshape(5, 60).T, (exact + prior) / bits)


def test_the_summary_of_a_set_of_images():
    transform, sde = Levels(8), ss.VP()
    result = bounds.continuous(model_of_levels(transform, sde), IMAGES, transform, draws=8)
    close(torch.stack(list(result.terms.values())).sum(dim=0), result.per_image)
    assert result.mean == pytest.approx(float(result.per_image.mean()))
    assert result.stderr == pytest.approx(float(result.per_image.std()) / math.sqrt(5))
    assert result.monte_carlo == pytest.approx(float(result.per_image_stderr.square().mean().sqrt()) / math.sqrt(5))
    assert result.per_image.shape == result.per_image_stderr.shape == (5,)
    words = result.conventions
    assert "upper bound" in words["quantity"]
    assert "not of the probability flow" in words["quantity"]
    assert "Levels(levels=8" in words["transform"]
    assert words["times"] == "UniformLogSNR, 8 in 4 strata per image"
    assert "uniform" in words["dequantization"]
    assert "t_min=1e-05, 2 draws" in words["decoder"]
    assert "t_max=1" in words["prior"]
    again = bounds.continuous(model_of_levels(transform, sde), IMAGES, transform, draws=8, seeds=range(5))
    close(again.per_image, result.per_image)
    one = bounds.continuous(model_of_levels(transform, sde), IMAGES[:1], transform, draws=8)
    assert one.stderr is None
    assert one.mean == pytest.approx(float(result.per_image[0]))
    assert one.monte_carlo == pytest.approx(float(result.per_image_stderr[0]))


MAPPED = [
    pytest.param(ss.Uniform(), Levels(8), id="uniform"),
    pytest.param(ss.Variational((1, 2, 2), 8).requires_grad_(False), Affine(0.5, -2), id="flow"),
]


@pytest.mark.parametrize(("dequantization", "transform"), MAPPED)
def test_a_map_of_levels_is_its_transform_and_its_dequantisation(dequantization, transform):
    model = model_of_levels(transform, ss.VP())
    parts = bounds.continuous(model, IMAGES, transform, dequantization=dequantization, draws=4)
    whole = bounds.continuous(model, IMAGES, DataMap(transform, dequantization), draws=4)
    close(whole.per_image, parts.per_image, rtol=0)
    assert whole.conventions == parts.conventions
    assert str(dequantization) in whole.conventions["dequantization"]
    assert whole.conventions["transform"] == str(transform)


def test_a_learned_dequantisation_enters_with_its_density():
    """q = Beta(1, 2): log q = log 2(1 - u); against its own integrals over u."""

    class Beta:
        def sample(self, images, noise):
            u = 1 - noise.uniform(images).sqrt()
            return images + u, (2 * (1 - u)).log().flatten(1).sum(dim=1)

        def start(self, sde, transform):
            return None

    transform, sde, std = Levels(8), ss.VP(), 2.5
    images = repeated(IMAGES, 60)
    result = bounds.continuous(model_of_levels(transform, sde, 4.0, std), images, transform, dequantization=Beta())
    # E u = 1/3, Var u = 1/18, E log 2(1 - u) = log 2 - 1/2
    within(result.terms["change_of_variables"], math.log2(4) + (math.log(2) - 0.5) / math.log(2))
    square = (IMAGES + 1 / 3 - 4).square().flatten(1).sum(dim=1) + 4 / 18
    exact = 0.5 * square / std**2 + 4 * math.log(std * math.sqrt(2 * math.pi)) + 4 * (math.log(2) - 0.5)
    prior = result.terms["prior"].reshape(5, 60).mean(dim=1)
    within(result.per_image.reshape(5, 60).T, exact / (4 * math.log(2)) + prior)


# --- errors, batches, gradients, conditions


@pytest.mark.parametrize("draws", [2, 8, 32])
def test_the_standard_error_is_calibrated(draws):
    """The spread of one image over seeds; strata whose means differ do not count as noise."""
    transform, n = Levels(8), 400
    mixture = oracle((1, 2, 2))
    result = bounds.continuous(mixture.score_model(ss.VP()), IMAGES[:1].expand(n, 1, 2, 2), transform, draws=draws)
    spread = float(result.per_image.std())
    assert float(result.per_image_stderr.square().mean().sqrt()) == pytest.approx(spread, rel=0.15)
    assert result.monte_carlo == pytest.approx(result.stderr, rel=0.15)


def test_the_standard_error_of_states_is_calibrated():
    x = oracle((3,)).sample(1, generator=seeded(2)).expand(600, 3)
    result = bounds.continuous_nats(oracle((3,)).score_model(ss.VE()), x, draws=8, seeds=range(600))
    assert float(result.stderr.square().mean().sqrt()) == pytest.approx(float(result.value.std()), rel=0.15)
    single = bounds.continuous_nats(oracle((3,)).score_model(ss.VE()), x, draws=1, seeds=range(600))
    assert single.stderr is None
    error = math.hypot(float(single.value.std()), float(result.value.std())) / math.sqrt(600)
    assert float(single.value.std()) > 1.5 * float(result.value.std())
    assert abs(float(single.value.mean() - result.value.mean())) < 4.5 * error


def test_the_decoder_enters_the_standard_error():
    """A short path, whose noise is the decoder's: that of -c eps, where the model's noise is off by c."""
    sde, x = ss.VE(sigma_min=0.5, sigma_max=0.6), torch.zeros(600, 3)
    model = exact_model(oracle((3,)), sde, "noise", 3.0, lambda x, t: torch.ones_like(x))
    result = bounds.continuous_nats(model, x, draws=32, seeds=range(600))
    assert float(result.terms["reconstruction"].std()) > 3 * float(result.terms["diffusion"].std())
    assert float(result.stderr.square().mean().sqrt()) == pytest.approx(float(result.value.std()), rel=0.15)


def test_the_noise_that_no_model_explains_is_controlled():
    """Of wide data at small t eps_hat = 0: without control the error would be that of |eps|^2."""
    sde = ss.VE(sigma_min=1e-3, sigma_max=1e-1)
    wide = ss.GaussianMixture(torch.zeros(1, 8), f64(30.0)[None]).score_model(sde)
    result = bounds.continuous_nats(wide, torch.zeros(200, 8), draws=2, seeds=range(200))
    half_range = 0.5 * float(sde.log_snr(f64(sde.t_min)) - sde.log_snr(f64(sde.t_max)))
    assert float(result.value.std()) < 1e-3 * half_range * math.sqrt(2 * 8 / 2)
    close(result.terms["diffusion"], torch.full((200,), 8 * half_range, dtype=torch.float64), rtol=1e-4)


@pytest.mark.parametrize("draws", [1, 2, 6])
def test_a_sample_does_not_depend_on_its_batch(draws):
    model, x, seeds = oracle((1, 2, 2)).score_model(ss.VP()), normal(4, 1, 2, 2), [3, 1, 4, 1]
    together = bounds.continuous_nats(model, x, draws=draws, seeds=seeds)
    for i, seed in enumerate(seeds):
        alone = bounds.continuous_nats(model, x[i : i + 1], draws=draws, seeds=[seed])
        close(alone.value, together.value[[i]], rtol=1e-9)
        for name, values in together.terms.items():
            close(alone.terms[name], values[[i]], rtol=1e-9)
    given = bounds.continuous_nats(model, x, draws=draws, stream=ss.random_stream.RandomStream(seeds=seeds))
    close(given.value, together.value)


@pytest.mark.parametrize("bound", [bounds.continuous, bounds.discrete])
def test_bits_do_not_depend_on_the_batch_size(bound):
    transform = Levels(8)
    arguments = {"draws": 6} | ({"times": losses.Nodes(5)} if bound is bounds.discrete else {})
    model = model_of_levels(transform, ss.VP(t_min=0.01))
    whole, parts = (bound(model, IMAGES, transform, batch_size=size, **arguments) for size in (5, 2))
    close(whole.per_image, parts.per_image, rtol=1e-9)
    close(whole.per_image_stderr, parts.per_image_stderr, rtol=1e-9)
    shuffled = bound(model, IMAGES[[3, 0]], transform, seeds=[3, 0], **arguments)
    close(shuffled.per_image, whole.per_image[[3, 0]], rtol=1e-9)


def test_gradients_in_the_data_are_those_of_the_closed_form():
    sde, std, points, copies = ss.VP(t_min=0.05), 0.6, normal(2, 3), 300
    model = ss.GaussianMixture(torch.zeros(1, 3), f64(std)[None]).score_model(sde)
    x, clean = repeated(points, copies).requires_grad_(), points.clone().requires_grad_()
    result = bounds.continuous_nats(model, x, draws=8, seeds=range(len(x)))
    diffusion, reconstruction = gaussian_bound(sde, clean.square().sum(dim=1), 3, std)
    for name, expected in (
        ("diffusion", diffusion),
        ("reconstruction", reconstruction),
        ("prior", prior_of(sde, clean)),
    ):
        (actual,) = torch.autograd.grad(result.terms[name].sum(), x, retain_graph=True)
        (exact,) = torch.autograd.grad(expected.sum(), clean, retain_graph=True)
        for i in range(2):
            within(actual[i * copies : (i + 1) * copies], exact[i]) if name != "prior" else close(actual[:1], exact[:1])
    assert not result.stderr.requires_grad


def test_gradients_in_the_parameters_are_those_of_the_closed_form():
    """x_hat_0 = c: (SNR(t_min) - SNR(t_max) and SNR(t_min)) |x - c|^2 / 2."""
    sde, x = ss.VP(t_min=0.1), normal(300, 3)
    model = constant(sde, 0.3)
    result = bounds.continuous_nats(model, x, draws=16, seeds=range(300))
    clean, noisy = snr(sde, sde.t_min), snr(sde, sde.t_max)
    slope = (0.3 - x).sum()
    (diffusion,) = torch.autograd.grad(result.terms["diffusion"].sum(), model.network.value, retain_graph=True)
    (decoder,) = torch.autograd.grad(result.terms["reconstruction"].sum(), model.network.value)
    assert float(diffusion) == pytest.approx(float((clean - noisy) * slope), rel=0.05)
    assert float(decoder) == pytest.approx(float(clean * slope), rel=1e-9)


@pytest.mark.parametrize("as_dict", [False, True])
def test_the_condition_reaches_the_network_of_its_image(as_dict):
    """x_hat_0 = the condition y: diffusion = (SNR(t_min) - SNR(t_max)) |x - y|^2 / 2, at every node without noise."""
    sde, transform, y = ss.VP(t_min=0.05), Levels(8), f64(-1.0, -0.3, 0.0, 0.4, 2.0)
    cond = {"target": y} if as_dict else y
    x = transform(IMAGES + 0.5)
    square = (x - y.reshape(-1, 1, 1, 1)).square().flatten(1).sum(dim=1)
    expected = 0.5 * (snr(sde, sde.t_min) - snr(sde, sde.t_max)) * square / (4 * math.log(2))
    chain = bounds.discrete(constant(sde), IMAGES, transform, cond, times=losses.Nodes(6), batch_size=2)
    close(chain.terms["diffusion"], expected, rtol=1e-8)
    given = bounds.discrete(constant(sde).given(cond), IMAGES, transform, times=losses.Nodes(6), batch_size=2)
    close(given.per_image, chain.per_image, rtol=0)
    levels = repeated(IMAGES, 40)
    many = {"target": repeated(y, 40)} if as_dict else repeated(y, 40)
    result = bounds.continuous(constant(sde), levels, transform, many, draws=16, batch_size=64)
    spread = 0.5 * (snr(sde, sde.t_min) - snr(sde, sde.t_max)) * (2 / 8) ** 2 / 12 / math.log(2)
    within(result.terms["diffusion"].reshape(5, 40).T, expected + spread)
    nats = bounds.continuous_nats(constant(sde), x, cond, draws=512, seeds=range(5))
    close(bounds.continuous_nats(constant(sde).given(cond), x, draws=512, seeds=range(5)).value, nats.value, rtol=0)
    away = nats.terms["diffusion"] - expected * 4 * math.log(2)
    assert bool((away.abs() < 4.5 * nats.stderr).all())
    assert float(nats.stderr.max()) < 1.0


# --- the chain


def posterior(sde, s, t):
    """q(x_s | x_t, x) = N(a x + b x_t, v), by conditioning the joint Gaussian of (x_s, x_t)."""
    (alpha_s, sigma_s), (alpha, sigma) = ((sde.alpha(time), sde.sigma(time)) for time in (s, t))
    covariance = alpha / alpha_s * sigma_s**2
    b = covariance / sigma**2
    return alpha_s - b * alpha, b, sigma_s**2 - b * covariance, sigma**2 - (alpha / alpha_s * sigma_s) ** 2


@pytest.mark.parametrize("variance", ["posterior", "forward"])
@pytest.mark.parametrize("sde", [ss.VP(t_min=0.1), ss.SubVP(t_min=0.2), ss.VE(sigma_min=0.3, sigma_max=4.0)], ids=str)
def test_a_chain_of_three_nodes_by_hand(sde, variance):
    """One dimension, x_hat_0 = 0.2: every term is a number. DDPM's scaling of four levels, -1, -1/3, 1/3, 1."""
    transform, guess, levels = Levels(4, -4 / 3, 4 / 3), 0.2, torch.arange(4)[:, None]
    x = f64(-1.0, -1 / 3, 1 / 3, 1.0)
    nodes = f64(sde.t_min, (sde.t_min + sde.t_max) / 2, sde.t_max)
    expected = [prior_of(sde, x[:, None])]
    for s, t in ((0, 1), (1, 2)):
        a, b, tilde, beta = posterior(sde, nodes[s], nodes[t])
        noisy = 0.77  # x_t, which leaves the difference of the means alone
        chosen = tilde if variance == "posterior" else beta
        believed = Normal(a * guess + b * noisy, chosen.sqrt())
        expected.append(kl_divergence(Normal(a * x + b * noisy, tilde.sqrt()), believed))
        if s == 0:
            std = tilde.sqrt() if variance == "posterior" else sde.sigma(nodes[0])
    edges = Normal(f64(guess), std).cdf(f64(-2 / 3, 0.0, 2 / 3))
    masses = torch.cat([edges, f64(1.0)[None]]) - torch.cat([f64(0.0)[None], edges])
    result = bounds.discrete(constant(sde, guess), levels, transform, variance=variance, times=losses.Nodes(3))
    close(result.terms["prior"], expected[0] / math.log(2), rtol=1e-8)
    close(result.steps, torch.stack(expected[1:], dim=1) / math.log(2), rtol=1e-8)
    close(result.terms["diffusion"], result.steps.sum(dim=1))
    close(result.terms["reconstruction"], -masses.log2(), rtol=1e-8)
    close(result.per_image, sum(expected) / math.log(2) - masses.log2(), rtol=1e-8)
    close(result.nodes, nodes)
    assert result.per_image_stderr is None
    assert result.monte_carlo is None
    assert result.stderr == pytest.approx(float(result.per_image.std()) / 2)
    # whatever the states are, the decoder is a distribution over the levels
    close((-result.terms["reconstruction"] * math.log(2)).exp().sum(), f64(1.0))


def test_conventions_of_a_chain():
    model = with_variance(constant(ss.VP(t_min=0.05)), 0.4)
    images, transform = IMAGES % 4, Affine(0.5, -1.25)
    words = {
        variance: bounds.discrete(
            model, images, transform, variance=variance, times=losses.Nodes(4), draws=4, levels=4
        ).conventions
        for variance in bounds.chain.VARIANCES
    }
    assert len({text["variance"] for text in words.values()}) == 3
    text = words["forward"]
    assert "upper bound" in text["quantity"]
    assert text["levels"] == "level k at T(k + 1/2), from -1 to 0.5 in model space, not dequantised"
    assert text["chain"].startswith("4 nodes from t=0.05 to 1;")
    assert "4 draws of the steps in 2 strata" in text["chain"]
    assert text["decoder"] == "Gaussian over bins of width 0.5, the first and the last open"
    assert "scale=0.5" in text["transform"]


@pytest.mark.parametrize("images", [torch.arange(4)[:, None], IMAGES[:, 0] % 4, IMAGES % 4], ids=lambda x: str(x.ndim))
def test_a_learned_variance_runs_from_posterior_to_forward(images):
    exact = oracle(tuple(images.shape[1:])).score_model(ss.VP(t_min=0.02))
    arguments = {"transform": Levels(4), "times": losses.Nodes(5)}
    fixed = {name: bounds.discrete(exact, images, variance=name, **arguments) for name in ("posterior", "forward")}
    for fraction, name in ((0.0, "posterior"), (1.0, "forward")):
        learned = bounds.discrete(with_variance(exact, fraction), images, variance="learned", **arguments)
        close(learned.per_image, fixed[name].per_image, rtol=1e-9)
        close(learned.steps, fixed[name].steps, rtol=1e-9)
    between = bounds.discrete(with_variance(exact, 0.5), images, variance="learned", **arguments)
    assert not torch.allclose(between.per_image, fixed["posterior"].per_image)
    assert not torch.allclose(between.per_image, fixed["forward"].per_image)
    # a model that learns a variance can be measured with a fixed one
    ignored = bounds.discrete(with_variance(exact, 0.5), images, variance="forward", **arguments)
    close(ignored.per_image, fixed["forward"].per_image, rtol=1e-9)


def chain_of_a_gaussian(sde, nodes, square, size, std):
    """The sum over steps, Sigma = beta_tilde: (SNR_s - SNR_t)/2 E|x - x_hat_0|^2 at t (2107.00630, eq. 13)."""
    ratio = sde.log_snr(nodes).exp()
    r = ratio[1:] * std**2
    missing = size * std**2 * r / (1 + r) ** 2 + square / (1 + r) ** 2
    return 0.5 * ((ratio[:-1] - ratio[1:]) * missing).sum()


def test_the_chain_converges_to_the_continuous_bound():
    transform, sde, std = Levels(8), ss.VP(t_min=0.1), 2.5 / 4
    model, images = model_of_levels(transform, sde), IMAGES[:1].expand(400, 1, 2, 2)
    square = (transform(IMAGES[0] + 0.5) - transform(f64(4.0))).square().sum()
    limit, _ = gaussian_bound(sde, square, 4, std)
    x = transform(images + 0.5)
    within(bounds.continuous_nats(model, x, draws=16, seeds=range(400)).terms["diffusion"], limit)
    gaps = []
    for steps in (4, 16, 64):
        nodes = torch.linspace(0.1, 1.0, steps + 1, dtype=torch.float64)
        expected = chain_of_a_gaussian(sde, nodes, square, 4, std)
        result = bounds.discrete(model, images, transform, times=losses.Nodes(steps + 1))
        within(result.terms["diffusion"] * 4 * math.log(2), expected)
        gaps.append(float(expected - limit))
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 0  # first order in the step
    assert gaps[2] < 0.06 * float(limit)


def test_narrow_bins_are_the_density_at_the_decoder():
    """With many levels the decoder's integral is density times width: 256 levels under a decoder 30 bins wide."""
    sde, transform = ss.VP(t_min=0.15), Levels(256)
    images = torch.tensor([[40, 128], [90, 200]])
    result = bounds.discrete(constant(sde, 0.1), images, transform, variance="forward", times=losses.Nodes(3))
    density = Normal(f64(0.1), sde.sigma(f64(0.15))).log_prob(transform(images.double() + 0.5)) + math.log(2 / 256)
    close(result.terms["reconstruction"], -density.mean(dim=1) / math.log(2), rtol=1e-4)


@pytest.mark.parametrize("draws", [2, 8, 20])
def test_a_subset_of_the_steps_is_unbiased_and_calibrated(draws):
    sde = ss.Tabulated.from_alphas_cumprod(torch.from_numpy(DDPM[::40].copy()))
    mixture, transform, n = oracle((1, 2, 2)), Levels(8), 600
    model, images = mixture.score_model(sde), IMAGES[:1].expand(n, 1, 2, 2)
    full = bounds.discrete(model, images[:200], transform)
    some_steps = bounds.discrete(model, images, transform, draws=draws)
    close(some_steps.terms["prior"][:200], full.terms["prior"])
    for name in ("diffusion", "reconstruction"):
        ours, theirs = some_steps.terms[name], full.terms[name]
        error = math.hypot(float(ours.std()) / n**0.5, float(theirs.std()) / 200**0.5)
        assert abs(float(ours.mean() - theirs.mean())) < 4.5 * error
    spread = float(some_steps.per_image.std())
    assert float(some_steps.per_image_stderr.square().mean().sqrt()) == pytest.approx(spread, rel=0.15)
    assert some_steps.monte_carlo == pytest.approx(some_steps.stderr, rel=0.15)
    mean, error = full.per_step()
    assert float(mean.sum()) == pytest.approx(float(full.terms["diffusion"].mean()))
    seen, seen_error = some_steps.per_step()
    assert bool(((seen - mean).abs() < 5 * (error.square() + seen_error.square()).sqrt()).all())
    visited = (~some_steps.steps.isnan()).sum(dim=1)
    assert int(visited.max()) <= draws
    assert int(visited.min()) >= draws // 2


@pytest.mark.parametrize(("draws", "falls"), [(2, [1] * 7), (4, [5] * 3 + [1] * 4), (6, [5, 5, 1, 1, 3, 3, 3])])
def test_strata_of_unequal_size_are_weighted_by_it(draws, falls):
    """Where the steps of a stratum are alike, SNR falling by as much and x_hat_0 = 0, any draws give the exact sum."""
    ratio = 1 + f64(*falls, 0).flip(0).cumsum(0).flip(0)
    sde = ss.Tabulated(ratio.log())
    result = bounds.discrete(constant(sde), IMAGES, Levels(8), draws=draws)
    square = Levels(8)(IMAGES + 0.5).double().square().flatten(1).mean(dim=1)
    close(result.terms["diffusion"], 0.5 * sum(falls) * square / math.log(2), rtol=1e-6)
    expected = (0.5 * square[:, None] * f64(*falls) / math.log(2)).where(~result.steps.isnan(), torch.nan)
    torch.testing.assert_close(result.steps, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_twice_as_many_draws_as_steps_visit_each_step_twice():
    sde = ss.VP(t_min=0.05)
    model = oracle((3,)).score_model(sde)
    images, transform = torch.tensor([[0, 5, 7], [1, 2, 3]]), Levels(8)
    result = bounds.discrete(model, images, transform, times=losses.Nodes(5), draws=8)
    assert not bool(result.steps.isnan().any())
    close(result.steps.sum(dim=1), result.terms["diffusion"])


def test_a_path_that_ends_in_pure_noise_has_a_chain():
    sde, transform = ss.ZeroTerminalSNR(ss.VP(t_min=0.1)), Levels(8)
    nodes = torch.linspace(0.1, 1.0, 9, dtype=torch.float64)
    images = IMAGES[:1].expand(300, 1, 2, 2)
    result = bounds.discrete(model_of_levels(transform, sde), images, transform, times=losses.Nodes(9))
    assert float(result.terms["prior"].abs().max()) < 1e-6
    square = (transform(IMAGES[0] + 0.5) - transform(f64(4.0))).square().sum()
    within(result.terms["diffusion"] * 4 * math.log(2), chain_of_a_gaussian(sde, nodes, square, 4, 2.5 / 4))


# --- bad input


def good(bound):
    arguments = {"images": IMAGES, "transform": Levels(8), "model": constant(ss.VP(t_min=0.05))}
    return arguments | ({"times": losses.Nodes(4)} if bound is bounds.discrete else {"draws": 2})


class Broken(torch.nn.Module):
    def forward(self, x, c_noise, cond=None):
        return torch.where(x.flatten(1)[:, :1, None, None] < -10, 0.0, torch.nan) + x


@pytest.mark.parametrize("bound", [bounds.continuous, bounds.discrete])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"images": IMAGES + 0.5}, ValueError, "integer grey levels"),
        ({"images": IMAGES * torch.nan}, ValueError, "integer grey levels"),
        ({"draws": 3}, ValueError, r"even number of draws, 2 or more, .*got draws=3"),
        ({"draws": 0}, ValueError, "draws=0"),
        ({"draws": 1}, ValueError, "draws=1"),
        ({"seeds": [1, 2]}, ValueError, "one seed per image expected, 5 of them; got 2"),
        ({"model": ss.ScoreModel(Broken(), ss.VP(t_min=0.05))}, RuntimeError, r"not finite for 5 of 5 images, \[0, 1"),
        (
            {"model": ss.ScoreModel(torch.nn.Dropout(0.5), ss.VP(t_min=0.05))},
            ValueError,
            r"active dropout: call model.eval\(\)",
        ),
    ],
)
def test_bad_arguments_of_both(bound, arguments, error, words):
    with pytest.raises(error, match=words):
        bound(**good(bound) | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"times": losses.Nodes(4)}, TypeError, "use bounds.discrete"),
        ({"model": constant(ss.VP(t_min=0.05)), "dequantization": ss.TruncatedNormal()}, ValueError, "clean data"),
        ({"model": ss.ScoreModel(Constant(), ss.ZeroTerminalSNR(ss.VP()), "v")}, ValueError, "finite log-SNR"),
        (
            {"transform": DataMap(Levels(8))},
            ValueError,
            r"exactly one dequantisation, in the DataMap.*\(dequantization=None\)",
        ),
        (
            {"transform": DataMap(Levels(8), ss.Uniform()), "dequantization": ss.Uniform()},
            ValueError,
            "exactly one dequantisation",
        ),
    ],
)
def test_bad_arguments_of_the_continuous_bound(arguments, error, words):
    if "dequantization" in arguments:  # a path that reaches the noise of a level
        arguments = arguments | {"model": constant(ss.VP())}
    with pytest.raises(error, match=words):
        bounds.continuous(**good(bounds.continuous) | arguments)


def test_bad_arguments_of_the_bound_in_nats():
    x, model = normal(2, 3), constant(ss.VP(t_min=0.05))
    with pytest.raises(ValueError, match="draws=3"):
        bounds.continuous_nats(model, x, draws=3)
    with pytest.raises(ValueError, match="drop one"):
        bounds.continuous_nats(model, x, stream=ss.random_stream.RandomStream(), seeds=[0, 1])
    with pytest.raises(ValueError, match="drop one"):
        bounds.continuous_nats(model, x, seeds=[0, 1], generator=seeded())
    clean = ss.ScoreModel(Constant(), ss.VP(t_min=0.0), "v")
    with pytest.raises(ValueError, match=r"sigma\(t_min\) > 0 expected.*raise t_min"):
        bounds.continuous_nats(clean, x, times=losses.UniformTime())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"images": IMAGES + 1}, r"integer grey levels 0 \.\. 7 expected; got values from"),
        ({"images": IMAGES - 1}, r"integer grey levels 0 \.\. 7"),
        ({"levels": 5}, r"0 \.\. 4"),
        ({"variance": "fixed"}, "'posterior', 'forward' or 'learned' expected; got 'fixed'"),
        ({"variance": "learned"}, "learned_variance=True"),
        ({"draws": 8}, "draws <= 6, two at each of the 3 steps, expected; got draws=8"),
        ({"times": None}, "VP has none: pass Nodes"),
        ({"transform": Affine(0.25, -1)}, "number of levels expected.*pass levels=256"),
        ({"transform": Affine(-0.25, 1), "levels": 8}, "increasing order"),
        ({"transform": Compose([Affine(0.125), Logit()]), "levels": 8}, "equally spaced"),
        ({"model": ss.ScoreModel(Constant(), ss.VP(t_min=0.0), "v")}, r"posterior variances > 0 .* of VP.*raise t_min"),
    ],
)
def test_bad_arguments_of_the_chain(arguments, words):
    with pytest.raises(ValueError, match=words):
        bounds.discrete(**good(bounds.discrete) | arguments)
