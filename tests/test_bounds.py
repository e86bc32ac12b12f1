"""Evidence bounds against closed forms of one Gaussian, identities of a mixture, and chains computed by hand."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import scoresde as ss
from scoresde import bounds, losses
from scoresde.data import Affine, Compose, Levels, Logit
from scoresde.dequantization import DataMap
from tests.conftest import DDPM, INSTANCES, PATHS, close, exact_model, f64, normal, oracle, seeded, within
from tests.losses.networks import column, with_variance

SHAPES = [(3,), (1, 2, 2)]


def snr(sde, t):
    return sde.log_snr(f64(t)).exp()


class Constant(torch.nn.Module):
    """x_hat_0 = a number, or the condition."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = torch.nn.Parameter(f64(value))

    def forward(self, x, c_noise, cond=None):
        if isinstance(cond, dict):
            cond = cond["target"]
        return self.value.expand_as(x) if cond is None else column(cond, x).expand_as(x)


def constant(sde, value=0.0):
    return ss.ScoreModel(Constant(value), sde, "data")


def repeated(x, n):
    """Each row of x, n times in a row."""
    return x.repeat_interleave(n, dim=0)


def squared(x):
    """|x|^2 of each sample, (B,)."""
    return x.square().flatten(1).sum(dim=1)


def gaussian(std, shape, mean=0.0):
    return ss.GaussianMixture(torch.full((1, *shape), mean), f64(std)[None])


def calibrated(result, values):
    """The root mean square of the standard errors is the spread of the values, all estimates of one number."""
    stderr = result.per_image_stderr if isinstance(result, bounds.Bound) else result.stderr
    assert float(stderr.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.15)


# --- the continuous bound of one Gaussian


def gaussian_bound(sde, square, size, std):
    """The diffusion and the reconstruction of the exact score of N(m, std^2 I), at |x - m|^2 = square.

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
@pytest.mark.parametrize("sde", PATHS)
def test_the_terms_of_a_gaussian_are_the_closed_integrals(sde, shape):
    """Also where no signal is left at t_max."""
    std, mean, points, copies = 0.6, 0.5, normal(3, *shape), 50
    x, size = repeated(points, copies), points[0].numel()
    result = bounds.continuous_nats(gaussian(std, shape, mean).score_model(sde), x, draws=16, seeds=range(len(x)))
    square = squared(points - mean)
    diffusion, reconstruction = gaussian_bound(sde, square, size, std)
    prior = prior_of(sde, points)
    assert list(result.terms) == ["prior", "diffusion", "reconstruction"]
    close(result.terms["prior"], repeated(prior, copies), rtol=1e-9, atol=1e-12)
    by_point = {name: values.reshape(3, copies).T for name, values in result.terms.items()}
    within(by_point["diffusion"], diffusion)
    within(by_point["reconstruction"], reconstruction)
    within(result.value.reshape(3, copies).T, prior + diffusion + reconstruction)
    # The bound is tight up to the prior's mismatch and a difference of the order of 1/SNR at t_min.
    exact = -Normal(mean, std).log_prob(points).flatten(1).sum(dim=1)
    gap = prior + diffusion + reconstruction - exact
    ends = snr(sde, sde.t_max) * (1 + square) + 1 / snr(sde, sde.t_min) * (1 + square) / std**4
    assert bool((gap.abs() < size * ends).all())


@pytest.mark.parametrize("times", [losses.UniformTime(), losses.LogNormal(-0.5, 1.5), losses.UniformLogSNR()])
def test_every_density_of_times_gives_the_same_bound(times):
    sde, std, x = ss.VP(t_min=0.05), 0.6, repeated(normal(1, 3), 200)
    diffusion, _ = gaussian_bound(sde, x[0].square().sum(), 3, std)
    model = gaussian(std, (3,)).score_model(sde)
    within(bounds.continuous_nats(model, x, draws=8, times=times, seeds=range(200)).terms["diffusion"], diffusion)


def test_each_sample_has_two_times_in_every_stratum():
    """In every quarter of the log-SNR, after two draws at t_min for the decoder."""
    sde, times = ss.VP(t_min=0.05), []

    class Spy(Constant):
        def forward(self, x, c_noise, cond=None):
            times.append(c_noise.double())
            return super().forward(x, c_noise, cond)

    bounds.continuous_nats(ss.ScoreModel(Spy(), sde, "data"), torch.zeros(40, 2), draws=8, seeds=range(40))
    log_snr = sde.log_snr(torch.stack(times[2:]))
    clean, noisy = sde.log_snr(f64(sde.t_min, sde.t_max))
    fraction = (clean - log_snr) / (clean - noisy)
    lowest = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])[:, None] / 4
    assert bool(((fraction >= lowest - 1e-9) & (fraction <= lowest + 0.25 + 1e-9)).all())
    assert float(fraction.std(dim=1).min()) > 0.05  # independent over samples
    assert float((fraction[0] - fraction[1]).abs().min()) > 0  # and within a stratum
    close(torch.stack(times[:2]), torch.full((2, 40), sde.t_min, dtype=torch.float64))


# --- the continuous bound of a mixture


@pytest.mark.parametrize(
    ("path", "shape"), [("vp", (3,)), ("sub-vp", (1, 2, 2)), ("ve", (1, 2, 2)), ("rectified", (3,))]
)
def test_the_diffusion_of_the_exact_score_is_a_difference_of_divergences(path, shape):
    """KL(q(x_t | x) || p_t) at t_min minus that at t_max, each a plain average of exact densities."""
    sde, mixture, points, copies = INSTANCES[path], oracle(shape), oracle(shape).sample(2, generator=seeded(5)), 200
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


@pytest.mark.parametrize("path", ["vp", "sub-vp", "ve"])
def test_the_bound_is_above_the_density_and_a_wrong_score_adds_its_error(path):
    """A constant error c of the noise adds |c|^2/2 (log SNR(t_min) - log SNR(t_max) + 1), on average over the data."""
    sde, mixture, n, wrong = INSTANCES[path], oracle((3,)), 1500, 0.4
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
    """N(mean, std^2) over the values of levels, under an affine transform."""
    slope = float(transform(f64(1.0)) - transform(f64(0.0)))
    return gaussian(std * slope, (1, 2, 2), float(transform(f64(mean)))).score_model(sde)


@pytest.mark.parametrize("transform", [Levels(8, -1, 1), Levels(8, 0, 3), Affine(0.5, -2)], ids=str)
def test_the_bits_of_dequantised_levels(transform):
    """E|x + u - m|^2 = |x + 1/2 - m|^2 + d/12 over the dequantisations, in the closed form of a Gaussian."""
    sde, std, slope = ss.VP(), 2.5, float(transform(f64(1.0)) - transform(f64(0.0)))
    result = bounds.continuous(
        model_of_levels(transform, sde), repeated(IMAGES, 60), transform, draws=16, batch_size=128
    )
    spread = slope**2 * 4 / 12
    diffusion, reconstruction = gaussian_bound(sde, slope**2 * squared(IMAGES + 0.5 - 4) + spread, 4, std * slope)
    prior = prior_of(sde, transform(IMAGES.double() + 0.5)) + 0.5 * sde.alpha(f64(1.0)) ** 2 * spread
    bits = 4 * math.log(2)
    terms = {name: values.reshape(5, 60).T for name, values in result.terms.items()}
    within(terms["prior"], prior / bits)
    within(terms["diffusion"], diffusion / bits)
    within(terms["reconstruction"], reconstruction / bits)
    close(terms["change_of_variables"], torch.full((60, 5), -math.log2(slope), dtype=torch.float64))
    # In bits the scale of the data cancels, and the gap to the density is the prior's mismatch.
    exact = -Normal(4.0, std).log_prob(IMAGES + 0.5).flatten(1).sum(dim=1) + 0.5 * 4 / 12 / std**2
    within(result.per_image.reshape(5, 60).T, (exact + prior) / bits)


def test_the_summary_of_a_set_of_images():
    transform, model = Levels(8), model_of_levels(Levels(8), ss.VP())
    result = bounds.continuous(model, IMAGES, transform, draws=8)
    close(torch.stack(list(result.terms.values())).sum(dim=0), result.per_image)
    assert result.mean == pytest.approx(float(result.per_image.mean()))
    assert result.stderr == pytest.approx(float(result.per_image.std()) / math.sqrt(5))
    assert result.monte_carlo == pytest.approx(float(result.per_image_stderr.square().mean().sqrt()) / math.sqrt(5))
    conventions = result.conventions
    assert "upper bound" in conventions["quantity"]
    assert "not of the probability flow" in conventions["quantity"]
    assert conventions["times"] == "UniformLogSNR, 8 in 4 strata per image"
    assert "uniform" in conventions["dequantization"]
    assert "t_min=1e-05, 2 draws" in conventions["decoder"]
    assert "t_max=1" in conventions["prior"]
    close(bounds.continuous(model, IMAGES, transform, draws=8, seeds=range(5)).per_image, result.per_image)
    single = bounds.continuous(model, IMAGES[:1], transform, draws=8)
    assert single.stderr is None
    assert single.mean == pytest.approx(float(result.per_image[0]))
    assert single.monte_carlo == pytest.approx(float(result.per_image_stderr[0]))


@pytest.mark.parametrize(
    ("dequantization", "transform"),
    [(ss.Uniform(), Levels(8)), (ss.Variational((1, 2, 2), 8).requires_grad_(False), Affine(0.5, -2))],
    ids=["uniform", "flow"],
)
def test_a_data_map_is_its_transform_and_its_dequantisation(dequantization, transform):
    model = model_of_levels(transform, ss.VP())
    parts = bounds.continuous(model, IMAGES, transform, dequantization=dequantization, draws=4)
    whole = bounds.continuous(model, IMAGES, DataMap(transform, dequantization), draws=4)
    close(whole.per_image, parts.per_image, rtol=0)
    assert whole.conventions == parts.conventions
    assert str(dequantization) in whole.conventions["dequantization"]
    assert whole.conventions["transform"] == str(transform)


def test_the_density_of_the_dequantisation_enters_the_bound():
    """q = Beta(1, 2): log q = log 2(1 - u), E u = 1/3, Var u = 1/18, E log q = log 2 - 1/2."""

    class Beta:
        def sample(self, images, stream):
            u = 1 - stream.uniform(images).sqrt()
            return images + u, (2 * (1 - u)).log().flatten(1).sum(dim=1)

        def start(self, sde, transform):
            return None

    transform, sde, std = Levels(8), ss.VP(), 2.5
    images = repeated(IMAGES, 60)
    result = bounds.continuous(model_of_levels(transform, sde), images, transform, dequantization=Beta())
    within(result.terms["change_of_variables"], math.log2(4) + (math.log(2) - 0.5) / math.log(2))
    square = squared(IMAGES + 1 / 3 - 4) + 4 / 18
    exact = 0.5 * square / std**2 + 4 * math.log(std * math.sqrt(2 * math.pi)) + 4 * (math.log(2) - 0.5)
    prior = result.terms["prior"].reshape(5, 60).mean(dim=1)
    within(result.per_image.reshape(5, 60).T, exact / (4 * math.log(2)) + prior)


# --- standard errors


@pytest.mark.parametrize("draws", [2, 8, 32])
def test_the_standard_error_is_calibrated(draws):
    """For one image with many seeds; the differences between strata do not count as noise."""
    images, model = IMAGES[:1].expand(400, 1, 2, 2), oracle((1, 2, 2)).score_model(ss.VP())
    result = bounds.continuous(model, images, Levels(8), draws=draws)
    calibrated(result, result.per_image)
    assert result.monte_carlo == pytest.approx(result.stderr, rel=0.15)


def test_the_standard_error_of_states_is_calibrated_and_a_single_draw_has_none():
    x, model = oracle((3,)).sample(1, generator=seeded(2)).expand(600, 3), oracle((3,)).score_model(ss.VE())
    result = bounds.continuous_nats(model, x, draws=8, seeds=range(600))
    calibrated(result, result.value)
    single = bounds.continuous_nats(model, x, draws=1, seeds=range(600))
    assert single.stderr is None
    assert float(single.value.std()) > 1.5 * float(result.value.std())
    error = math.hypot(float(single.value.std()), float(result.value.std())) / math.sqrt(600)
    assert abs(float(single.value.mean() - result.value.mean())) < 4.5 * error


def test_the_decoder_enters_the_standard_error():
    """On a short path most of the noise is the decoder's: that of -c eps, with an error c of the model's noise."""
    sde, x = ss.VE(sigma_min=0.5, sigma_max=0.6), torch.zeros(600, 3)
    model = exact_model(oracle((3,)), sde, "noise", 3.0, lambda x, t: torch.ones_like(x))
    result = bounds.continuous_nats(model, x, draws=32, seeds=range(600))
    assert float(result.terms["reconstruction"].std()) > 3 * float(result.terms["diffusion"].std())
    calibrated(result, result.value)


def test_the_control_variate_removes_the_unexplained_noise():
    """In every stratum: for wide data at small t eps_hat = 0, and without control the error is that of |eps|^2."""
    sde = ss.VE(sigma_min=1e-3, sigma_max=1e-1)
    result = bounds.continuous_nats(
        gaussian(30.0, (8,)).score_model(sde), torch.zeros(200, 8), draws=8, seeds=range(200)
    )
    half_range = 0.5 * float(sde.log_snr(f64(sde.t_min)) - sde.log_snr(f64(sde.t_max)))
    assert float(result.value.std()) < 1e-3 * half_range * math.sqrt(2 * 8 / 2)
    close(result.terms["diffusion"], torch.full((200,), 8 * half_range, dtype=torch.float64), rtol=1e-4)


# --- batches, gradients, conditions


@pytest.mark.parametrize("draws", [1, 2, 6])
def test_a_sample_does_not_depend_on_its_batch(draws):
    model, x, seeds = oracle((1, 2, 2)).score_model(ss.VP()), normal(4, 1, 2, 2), [3, 1, 4, 1]
    together = bounds.continuous_nats(model, x, draws=draws, seeds=seeds)
    for i, seed in enumerate(seeds):
        alone = bounds.continuous_nats(model, x[i : i + 1], draws=draws, seeds=[seed])
        close(alone.value, together.value[[i]], rtol=1e-9)
        for name, values in together.terms.items():
            close(alone.terms[name], values[[i]], rtol=1e-9)


@pytest.mark.parametrize("bound", [bounds.continuous, bounds.discrete])
def test_bits_do_not_depend_on_the_batch_size(bound):
    arguments = {"draws": 6} | ({"times": losses.Nodes(5)} if bound is bounds.discrete else {})
    model = model_of_levels(Levels(8), ss.VP(t_min=0.01))
    whole, parts = (bound(model, IMAGES, Levels(8), batch_size=size, **arguments) for size in (5, 2))
    close(whole.per_image, parts.per_image, rtol=1e-9)
    close(whole.per_image_stderr, parts.per_image_stderr, rtol=1e-9)
    shuffled = bound(model, IMAGES[[3, 0]], Levels(8), seeds=[3, 0], **arguments)
    close(shuffled.per_image, whole.per_image[[3, 0]], rtol=1e-9)


def test_gradients_in_the_data_are_those_of_the_closed_form():
    sde, std, points, copies = ss.VP(t_min=0.05), 0.6, normal(2, 3), 300
    x, clean = repeated(points, copies).requires_grad_(), points.clone().requires_grad_()
    result = bounds.continuous_nats(gaussian(std, (3,)).score_model(sde), x, draws=8, seeds=range(len(x)))
    diffusion, reconstruction = gaussian_bound(sde, clean.square().sum(dim=1), 3, std)
    closed = {"diffusion": diffusion, "reconstruction": reconstruction, "prior": prior_of(sde, clean)}
    for name, expected in closed.items():
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
def test_the_condition_reaches_the_network_with_its_image(as_dict):
    """x_hat_0 = the condition y: diffusion = (SNR(t_min) - SNR(t_max)) |x - y|^2 / 2, without noise in a chain."""
    sde, transform, y = ss.VP(t_min=0.05), Levels(8), f64(-1.0, -0.3, 0.0, 0.4, 2.0)
    x, fall = transform(IMAGES + 0.5), snr(sde, sde.t_min) - snr(sde, sde.t_max)
    expected = 0.5 * fall * squared(x - column(y, x)) / (4 * math.log(2))

    def cond(copies=1):
        return {"target": repeated(y, copies)} if as_dict else repeated(y, copies)

    chain = bounds.discrete(constant(sde), IMAGES, transform, cond(), times=losses.Nodes(6), batch_size=2)
    close(chain.terms["diffusion"], expected, rtol=1e-8)
    conditional = constant(sde).given(cond())
    close(bounds.discrete(conditional, IMAGES, transform, times=losses.Nodes(6)).per_image, chain.per_image, rtol=1e-12)
    result = bounds.continuous(constant(sde), repeated(IMAGES, 40), transform, cond(40), draws=16, batch_size=64)
    spread = 0.5 * fall * (2 / 8) ** 2 / 12 / math.log(2)
    within(result.terms["diffusion"].reshape(5, 40).T, expected + spread)
    nats = bounds.continuous_nats(constant(sde), x, cond(), draws=128, seeds=range(5))
    close(bounds.continuous_nats(conditional, x, draws=128, seeds=range(5)).value, nats.value, rtol=0)
    away = nats.terms["diffusion"] - expected * 4 * math.log(2)
    assert bool((away.abs() < 4.5 * nats.stderr).all())
    assert float(nats.stderr.max()) < 4.0


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
        noisy = 0.77  # x_t: the difference of the means does not depend on it
        chosen = tilde if variance == "posterior" else beta
        model_step = Normal(a * guess + b * noisy, chosen.sqrt())
        expected.append(kl_divergence(Normal(a * x + b * noisy, tilde.sqrt()), model_step))
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
    assert (result.per_image_stderr, result.monte_carlo) == (None, None)
    assert result.stderr == pytest.approx(float(result.per_image.std()) / 2)


def test_the_conventions_of_a_chain():
    model, images = with_variance(constant(ss.VP(t_min=0.05)), 0.4), IMAGES % 4
    options = {"transform": Affine(0.5, -1.25), "times": losses.Nodes(4), "draws": 4, "levels": 4}
    conventions = {
        variance: bounds.discrete(model, images, variance=variance, **options).conventions
        for variance in bounds.chain.VARIANCES
    }
    assert len({each["variance"] for each in conventions.values()}) == 3
    forward = conventions["forward"]
    assert "upper bound" in forward["quantity"]
    assert forward["levels"] == "level k at T(k + 1/2), from -1 to 0.5 in model space, not dequantised"
    assert forward["chain"].startswith("4 nodes from t=0.05 to 1;")
    assert "4 draws of the steps in 2 strata" in forward["chain"]
    assert forward["decoder"] == "Gaussian over bins of width 0.5, the first and the last open"
    assert "scale=0.5" in forward["transform"]


@pytest.mark.parametrize("images", [torch.arange(4)[:, None], IMAGES[:, 0] % 4, IMAGES % 4], ids=lambda x: str(x.ndim))
def test_a_learned_variance_lies_between_posterior_and_forward(images):
    exact = oracle(tuple(images.shape[1:])).score_model(ss.VP(t_min=0.02))

    def bound(model, variance):
        return bounds.discrete(model, images, Levels(4), variance=variance, times=losses.Nodes(5))

    fixed = {name: bound(exact, name) for name in ("posterior", "forward")}
    for fraction, name in ((0.0, "posterior"), (1.0, "forward")):
        learned = bound(with_variance(exact, fraction), "learned")
        close(learned.per_image, fixed[name].per_image, rtol=1e-9)
        close(learned.steps, fixed[name].steps, rtol=1e-9)
        close(bound(with_variance(exact, 0.5), name).per_image, fixed[name].per_image, rtol=1e-9)
        assert not torch.allclose(bound(with_variance(exact, 0.5), "learned").per_image, fixed[name].per_image)


def chain_of_a_gaussian(sde, nodes, square, size, std):
    """The sum over steps, Sigma = beta_tilde: (SNR_s - SNR_t)/2 E|x - x_hat_0|^2 at t (2107.00630, eq. 13)."""
    ratio = sde.log_snr(nodes).exp()
    r = ratio[1:] * std**2
    residual = size * std**2 * r / (1 + r) ** 2 + square / (1 + r) ** 2
    return 0.5 * ((ratio[:-1] - ratio[1:]) * residual).sum()


def test_the_chain_converges_to_the_continuous_bound():
    transform, sde, std = Levels(8), ss.VP(t_min=0.1), 2.5 / 4
    model, images = model_of_levels(transform, sde), IMAGES[:1].expand(300, 1, 2, 2)
    square = (transform(IMAGES[0] + 0.5) - transform(f64(4.0))).square().sum()
    limit, _ = gaussian_bound(sde, square, 4, std)
    gaps = []
    for steps in (4, 16, 64):
        nodes = torch.linspace(0.1, 1.0, steps + 1, dtype=torch.float64)
        expected = chain_of_a_gaussian(sde, nodes, square, 4, std)
        result = bounds.discrete(model, images, transform, times=losses.Nodes(steps + 1))
        within(result.terms["diffusion"] * 4 * math.log(2), expected)
        gaps.append(float(expected - limit))
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 0  # first order in the step
    assert gaps[2] < 0.06 * float(limit)


@pytest.mark.parametrize("draws", [2, 8, 20])
def test_a_subset_of_the_steps_is_unbiased_and_calibrated(draws):
    sde, n = ss.Tabulated.from_alphas_cumprod(torch.from_numpy(DDPM[::40].copy())), 500
    model, images = oracle((1, 2, 2)).score_model(sde), IMAGES[:1].expand(n, 1, 2, 2)
    full = bounds.discrete(model, images[:200], Levels(8))
    subset = bounds.discrete(model, images, Levels(8), draws=draws)
    close(subset.terms["prior"][:200], full.terms["prior"])
    for name in ("diffusion", "reconstruction"):
        ours, theirs = subset.terms[name], full.terms[name]
        error = math.hypot(float(ours.std()) / n**0.5, float(theirs.std()) / 200**0.5)
        assert abs(float(ours.mean() - theirs.mean())) < 4.5 * error
    calibrated(subset, subset.per_image)
    assert subset.monte_carlo == pytest.approx(subset.stderr, rel=0.15)
    (mean, error), (visited_mean, visited_error) = full.per_step(), subset.per_step()
    assert float(mean.sum()) == pytest.approx(float(full.terms["diffusion"].mean()))
    assert bool(((visited_mean - mean).abs() < 5 * (error.square() + visited_error.square()).sqrt()).all())
    visits = (~subset.steps.isnan()).sum(dim=1)
    assert int(visits.max()) <= draws
    assert int(visits.min()) >= draws // 2


@pytest.mark.parametrize(
    ("draws", "falls"), [(2, [1] * 7), (4, [5] * 3 + [1] * 4), (6, [5, 5, 1, 1, 3, 3, 3]), (14, [7, 1, 6, 2, 5, 3, 4])]
)
def test_strata_of_unequal_size_are_weighted_by_it(draws, falls):
    """If the SNR falls equally in the steps of a stratum and x_hat_0 = 0, any draws give the exact sum.

    Twice as many draws as steps visit each step.
    """
    ratio = 1 + f64(*falls, 0).flip(0).cumsum(0).flip(0)
    result = bounds.discrete(constant(ss.Tabulated(ratio.log())), IMAGES, Levels(8), draws=draws)
    square = squared(Levels(8)(IMAGES + 0.5).double()) / 4
    close(result.terms["diffusion"], 0.5 * sum(falls) * square / math.log(2), rtol=1e-6)
    expected = (0.5 * square[:, None] * f64(*falls) / math.log(2)).where(~result.steps.isnan(), torch.nan)
    torch.testing.assert_close(result.steps, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert draws < 14 or not bool(result.steps.isnan().any())


def test_a_path_that_ends_without_signal_has_a_chain():
    sde, transform = ss.ZeroTerminalSNR(ss.VP(t_min=0.1)), Levels(8)
    nodes = torch.linspace(0.1, 1.0, 9, dtype=torch.float64)
    images = IMAGES[:1].expand(300, 1, 2, 2)
    result = bounds.discrete(model_of_levels(transform, sde), images, transform, times=losses.Nodes(9))
    assert float(result.terms["prior"].abs().max()) < 1e-6
    square = (transform(IMAGES[0] + 0.5) - transform(f64(4.0))).square().sum()
    within(result.terms["diffusion"] * 4 * math.log(2), chain_of_a_gaussian(sde, nodes, square, 4, 2.5 / 4))


# --- bad input


SDE, NOISELESS = ss.VP(t_min=0.05), ss.ScoreModel(Constant(), ss.VP(t_min=0.0), "v")


def refused(bound, arguments, error, message):
    """Check that otherwise valid arguments are refused."""
    valid = {"images": IMAGES, "transform": Levels(8), "model": constant(SDE)}
    valid |= {"times": losses.Nodes(4)} if bound is bounds.discrete else {"draws": 2}
    with pytest.raises(error, match=message):
        bound(**valid | arguments)


@pytest.mark.parametrize("bound", [bounds.continuous, bounds.discrete])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": IMAGES + 0.5}, ValueError, "images must be integer"),
        ({"images": IMAGES * torch.nan}, ValueError, "images must be integer"),
        ({"images": 2 * IMAGES + 7}, ValueError, "images must be integers from 0 to 7; got 7 to"),
        ({"draws": 3}, ValueError, "draws must be an even integer, at least 2 .*; got 3"),
        ({"draws": 0}, ValueError, "got 0"),
        ({"draws": 1}, ValueError, "got 1"),
        ({"seeds": [1, 2]}, ValueError, "seeds must have one entry per image, 5 in total; got 2"),
        ({"model": constant(SDE, math.nan)}, RuntimeError, r"not finite for 5 of 5 images, .* \[0, 1"),
        ({"model": ss.ScoreModel(torch.nn.Dropout(0.5), SDE)}, ValueError, r"call model.eval\(\)"),
    ],
)
def test_bad_arguments_of_both_bounds_are_refused(bound, arguments, error, message):
    refused(bound, arguments, error, message)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"times": losses.Nodes(4)}, TypeError, "use bounds.discrete"),
        ({"model": constant(ss.VP()), "dequantization": ss.TruncatedNormal()}, ValueError, "not clean data"),
        ({"model": NOISELESS}, ValueError, "no noise at t_min=0.*raise t_min"),
        ({"model": NOISELESS, "times": losses.UniformTime()}, ValueError, "no noise at t_min=0.*raise t_min"),
        ({"transform": DataMap(Levels(8))}, ValueError, r"\(dequantization=None\)"),
        ({"transform": DataMap(Levels(8), ss.Uniform()), "dequantization": ss.Uniform()}, ValueError, "exactly one"),
    ],
)
def test_bad_arguments_of_the_continuous_bound_are_refused(arguments, error, message):
    refused(bounds.continuous, arguments, error, message)


@pytest.mark.parametrize(
    ("options", "message"), [({"draws": 3}, "got 3"), ({"seeds": [0, 1], "generator": seeded()}, "got both")]
)
def test_bad_arguments_of_the_bound_in_nats_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bounds.continuous_nats(constant(SDE), normal(2, 3), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": IMAGES + 1}, r"images must be integers from 0 to 7; got 1"),
        ({"images": IMAGES - 1}, r"integers from 0 to 7"),
        ({"levels": 5}, r"from 0 to 4"),
        ({"variance": "fixed"}, "variance must be one of posterior, forward, learned; got 'fixed'"),
        ({"variance": "learned"}, "learned_variance=True"),
        ({"draws": 8}, "draws must be at most 6, two for each of the 3 steps; got 8"),
        ({"times": None}, "VP has no nodes"),
        ({"transform": Affine(0.25, -1)}, "does not define the number of grey levels: pass levels, such as 256"),
        ({"transform": Affine(-0.25, 1), "levels": 8}, "increasing and"),
        ({"transform": Compose([Affine(0.125), Logit()]), "levels": 8}, "equally spaced"),
        ({"model": NOISELESS}, r"posterior variance at node 1 .* of VP is 0: raise t_min"),
    ],
)
def test_bad_arguments_of_the_chain_are_refused(arguments, message):
    refused(bounds.discrete, arguments, ValueError, message)


def test_the_nats_of_data_are_the_bits_of_their_levels():
    images, transform = torch.randint(0, 4, (5, 2, 2), generator=seeded()), Levels(4, -1.0, 1.0)
    model, options = oracle((2, 2)).score_model(ss.VP()), {"draws": 8, "seeds": range(5)}
    result = bounds.continuous_nats(model, images, data_map=DataMap(transform, ss.Uniform()), **options)
    expected = bounds.continuous(model, images, transform, **options)
    close(result.value / (4 * math.log(2)), expected.per_image, rtol=1e-9)
    close(sum(estimates.mean(dim=0) for estimates in result.estimates), result.value, rtol=1e-9)
    with pytest.raises(ValueError, match="gives states at t="):
        bounds.continuous_nats(model, images, data_map=DataMap(transform, ss.TruncatedNormal()), **options)
