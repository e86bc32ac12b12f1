"""The variational bound: closed forms, what is invariant and what is not, and its two gradients against autograd."""

import copy
import math

import pytest
import torch
from scipy.integrate import trapezoid
from torch.distributions import Normal, kl_divergence

import scoresde as ss
from scoresde import losses
from scoresde.data import Levels, Toy2D
from scoresde.training.learned_dequantization import negative_evidence
from tests.conftest import close, exact_model, f64, learned, normal, oracle, seeded, within
from tests.losses.networks import Trained


class Zero(torch.nn.Module):
    """F = 0: with KarrasPreconditioning(sigma_data=s) the exact score of N(0, s^2)."""

    def forward(self, x, c_noise, cond=None):
        return torch.zeros_like(x)


def unexplained(sde, t, std):
    """v = alpha^2 s^2 / (alpha^2 s^2 + sigma^2), the variance of the noise that x_t leaves unknown."""
    kept = (sde.alpha(t) * std).square()
    return kept / (kept + sde.sigma(t).square())


# --- the bound


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
@pytest.mark.parametrize("times", [None, losses.UniformLogSNR(), losses.LogNormal(0.0, 3.0)], ids=type)
@pytest.mark.parametrize("sde", [ss.VP(t_min=0.05), ss.VE(), learned()], ids=["vp", "ve", "learned"])
def test_terms_of_a_gaussian_are_the_closed_integrals(sde, times, shape):
    std, n = 0.6, 6000
    mixture = ss.GaussianMixture(torch.zeros(1, *shape), f64(std)[None])
    x, size = mixture.sample(n, generator=seeded(1)), torch.Size(shape).numel()
    terms = losses.VariationalBound(times, stratified=False)(mixture.score_model(sde), x, generator=seeded())
    t = sde.time(torch.linspace(*sde.log_snr(f64(sde.t_min, sde.t_max)).tolist(), 4001, dtype=torch.float64))
    within(terms.diffusion, 0.5 * trapezoid(unexplained(sde, t, std), -sde.log_snr(t)))
    at_end = Normal(sde.alpha(f64(sde.t_max)) * x, sde.sigma(f64(sde.t_max)))
    prior = kl_divergence(at_end, Normal(f64(0.0), f64(sde.prior_std))).flatten(1).sum(dim=1) / size
    close(terms.prior, prior, rtol=1e-9, atol=1e-12)
    first = f64(sde.t_min)
    entropy = Normal(f64(0.0), sde.sigma(first) / sde.alpha(first)).entropy()
    close(terms.reconstruction, entropy.expand(n), rtol=1e-12)
    close(terms.value, terms.prior + terms.diffusion + terms.reconstruction)


@pytest.mark.parametrize("sde", [ss.VP(), ss.SubVP(), learned()], ids=["vp", "sub-vp", "learned"])
def test_the_bound_is_above_the_density_and_a_wrong_score_adds_its_error(sde):
    mixture, n, wrong = oracle((3,)), 4000, 0.4
    x, loss = mixture.sample(n, generator=seeded(3)), losses.VariationalBound(losses.UniformLogSNR())
    exact, off = (
        loss(exact_model(mixture, sde, "noise", amount, lambda x, t: torch.ones_like(x)), x, generator=seeded()).value
        for amount in (0.0, wrong)
    )
    gap = float((exact + mixture.log_prob(x) / 3).mean())
    error = float((exact + mixture.log_prob(x) / 3).std()) / n**0.5
    assert -4.5 * error < gap < 4.5 * error + 0.01
    span = sde.log_snr(f64(sde.t_min)) - sde.log_snr(f64(sde.t_max))
    within(off - exact, 0.5 * wrong**2 * span)


def test_it_is_the_bound_of_learned_dequantisations_in_the_units_of_the_data():
    """That of `training.learned_dequantization` is of x(t_min), which is alpha(t_min) times smaller."""
    transform, sde, images = Levels(8), learned(gamma_min=-4.0), torch.randint(0, 8, (6, 1, 2, 2), generator=seeded(1))
    model = oracle((1, 2, 2)).score_model(sde)

    class Centres:
        def sample(self, images, noise):
            return images + 0.5, torch.zeros(len(images), dtype=torch.float64)

        def start(self, sde, transform):
            return None

    y = transform(images.double() + 0.5)
    other = negative_evidence(model, images, transform, Centres(), generator=seeded()) + transform.log_det(images)
    terms = losses.VariationalBound(losses.UniformLogSNR())(model, y, generator=seeded())
    close(4 * terms.value, other - 4 * sde.alpha(f64(sde.t_min)).log(), rtol=1e-9, atol=1e-9)


def test_the_bound_does_not_depend_on_the_path_between_its_ends():
    """2107.00630, section 5.1, for a score that is not exact either; the variance does."""
    mixture, n, found, spreads = oracle((3,)), 20_000, [], []
    x = mixture.sample(n, generator=seeded(1))
    for seed, spread in ((0, 0.0), (1, 2.0), (2, 4.0)):
        sde = learned(seed, spread, gamma_min=-6.0, gamma_max=8.0)
        model = exact_model(mixture, sde, "noise", 0.3, lambda x, t: torch.tanh(x))
        loss = losses.VariationalBound(stratified=False)
        terms = loss(model, x, generator=seeded(seed))
        found.append(terms.diffusion)
        spreads.append(float(terms.diffusion.std()))
        close(terms.reconstruction[0], losses.VariationalBound()(model, x[:2]).reconstruction[0])
    for values in found[1:]:
        error = (values.var() / n + found[0].var() / n).sqrt()
        assert abs(float(values.mean() - found[0].mean())) < 4 * float(error)
        assert float(error) < 0.05 * float(values.mean())
    assert max(spreads) > 1.2 * min(spreads)


# --- the two gradients


def small(times=None, batch=7):
    """A model of two dimensions in float64 on a path that learns, with its data, times and noise."""
    sde = ss.LearnedVP(gamma_min=-3.0, gamma_max=4.0, units=5).double()
    with torch.no_grad():
        sde.ends += f64(0.2, -0.1)
        sde.shape += normal(3, 5, seed=4)
    model = ss.ScoreModel(Trained((2,)).double(), sde, ss.predictions.KarrasPreconditioning(0.8))
    t = torch.rand(batch, generator=seeded(5), dtype=torch.float64)
    return model, normal(batch, 2), t, normal(batch, 2, seed=1)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_one_backward_pass_gives_the_gradients_of_the_bound_and_of_the_variance(batch):
    model, x, t, noise = small(batch=batch)
    terms = losses.VariationalBound()(model, x, t=t, noise=noise)
    terms.value.mean().backward()
    sde, network = model.sde, list(model.network.parameters())[:-2]  # without the head that this model leaves out
    # The terms again, with the path's own functions and nothing in the way of its gradients.
    plain = losses.DenoisingScoreMatching("likelihood", losses.UniformTime(), reduction="half_sum")
    diffusion = plain(model, x, t=t, noise=noise).value / 2
    bound = (diffusion + sde.prior_divergence(x) / 2).mean() - 0.5 * sde.log_snr(f64(0.0))
    close(terms.value.mean(), bound + 0.5 * math.log(2 * math.pi * math.e))
    spread = diffusion.var() if batch > 1 else diffusion.square().sum()
    for parameter, expected in zip(
        [*network, sde.ends], torch.autograd.grad(bound, [*network, sde.ends], retain_graph=True), strict=True
    ):
        close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
    close(sde.shape.grad, torch.autograd.grad(spread, sde.shape)[0], rtol=1e-9, atol=1e-12)


def test_parts_of_a_batch_and_a_scale_add_up():
    """Accumulated gradients are those of the parts' own variances, averaged; a scaled loss scales them."""
    model, x, t, noise = small(batch=8)
    loss, gradients = losses.VariationalBound(), []
    for rows in (slice(0, 4), slice(4, 8)):
        model.zero_grad()
        loss(model, x[rows], t=t[rows], noise=noise[rows]).value.mean().backward()
        gradients.append(model.sde.shape.grad.clone())
    model.zero_grad()
    for rows in (slice(0, 4), slice(4, 8)):
        (128 * loss(model, x[rows], t=t[rows], noise=noise[rows]).value.sum() / 8).backward()
    close(model.sde.shape.grad, 128 * (gradients[0] + gradients[1]) / 2, rtol=1e-10)


def test_losses_of_several_batches_before_a_backward_pass_keep_their_own_factors():
    model, x, t, noise = small(batch=8)
    loss, parts, gradients = losses.VariationalBound(), (slice(0, 3), slice(3, 8)), []
    for rows in parts:
        value = loss(model, x[rows], t=t[rows], noise=noise[rows]).value.mean()
        gradients.append(torch.autograd.grad(value, model.sde.shape)[0])
    values = [loss(model, x[rows], t=t[rows], noise=noise[rows]).value.mean() for rows in parts]
    model.zero_grad()
    (values[1] + values[0]).backward()
    close(model.sde.shape.grad, gradients[0] + gradients[1], rtol=1e-10)
    # and the path itself is left as it was
    (plain,) = torch.autograd.grad(model.sde.log_snr(t[:3]).sum(), model.sde.shape)
    (fresh,) = torch.autograd.grad(copy.deepcopy(model).sde.log_snr(t[:3]).sum(), model.sde.shape, allow_unused=True)
    assert fresh is None
    assert float(plain.abs().max()) > 0


def test_float32_states_and_parameters_have_the_same_gradients():
    model, x, t, noise = small(batch=64)
    loss, gradients = losses.VariationalBound(), []
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        model.zero_grad()
        terms = loss(model, x.to(dtype), t=t, noise=noise.to(dtype))
        assert terms.value.dtype == dtype
        assert terms.t.dtype == terms.weight.dtype == torch.float64
        terms.value.mean().backward()
        gradients.append(model.sde.shape.grad.clone().double())
    close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def test_without_gradients_nothing_is_kept():
    model, x, t, noise = small()
    expected = losses.VariationalBound()(model, x, t=t, noise=noise).value.detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            close(losses.VariationalBound()(model, x, t=t, noise=noise).value, expected)
            losses.VariationalBound(losses.UniformLogSNR())(model, x)


def test_a_given_path_trains_its_network_alone():
    model, x, t, noise = small()
    still = ss.ScoreModel(model.network, copy.deepcopy(model.sde).requires_grad_(False), model.prediction)
    found = [losses.VariationalBound()(each, x, t=t, noise=noise).value.mean() for each in (model, still)]
    head = model.network.mean.weight
    close(*(torch.autograd.grad(value, head)[0] for value in found))


# --- training


def variance(model, x, seed=9):
    with torch.no_grad():
        return losses.VariationalBound(stratified=False)(model, x, generator=seeded(seed)).diffusion.var()


def test_a_trained_shape_has_the_least_variance_that_there_is():
    """Of a Gaussian: at its best a path spends its time in proportion to v, and var L = (int v dgamma)^2 / (2 d).

    For |eps_hat - eps|^2 is v times a chi-square, and E L^2 >= (int E[ell^2]^(1/2) dgamma)^2 by Cauchy and Schwarz.
    """
    std, size, x = 0.5, 4, 0.5 * normal(40_000, 4)
    sde = ss.LearnedVP(gamma_min=-5.0, gamma_max=9.0, learn_ends=False)
    model = ss.ScoreModel(Zero(), sde, ss.predictions.KarrasPreconditioning(std))
    gamma = torch.linspace(-5, 9, 4001, dtype=torch.float64)
    clean = torch.sigmoid(-gamma) * std**2
    least = trapezoid(clean / (clean + torch.sigmoid(gamma)), gamma) ** 2 / (2 * size)
    before = float(variance(model, x))
    optimizer, loss, generator = torch.optim.Adam([sde.shape], 0.05), losses.VariationalBound(), seeded(1)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 200)
    for _ in range(200):
        optimizer.zero_grad()
        batch = x[torch.randint(len(x), (512,), generator=generator)]
        loss(model, batch, generator=generator).value.mean().backward()
        optimizer.step()
        rate.step()
    after = float(variance(model, x))
    assert before > 5 * least
    assert 0.95 * least < after < 1.25 * least


def test_the_ends_go_where_the_bound_is_lower():
    """Of a model that knows nothing, at every noise level: both ends move inward."""
    sde = ss.LearnedVP(gamma_min=-8.0, gamma_max=6.0)
    model, x = ss.ScoreModel(Constant(), sde, "noise"), 0.5 * normal(512, 4)
    optimizer, loss, generator = torch.optim.Adam([sde.ends], 0.05), losses.VariationalBound(), seeded(1)
    before = sde.gammas().tolist()
    with torch.no_grad():
        first = loss(model, x, generator=seeded(2)).value.mean()
    for _ in range(60):
        optimizer.zero_grad()
        loss(model, x, generator=generator).value.mean().backward()
        optimizer.step()
    after = sde.gammas().tolist()
    with torch.no_grad():
        assert float(loss(model, x, generator=seeded(2)).value.mean()) < float(first) - 0.5
    assert after[0] > before[0] + 1
    assert after[1] < before[1] - 1


class Constant(torch.nn.Module):
    """Noise of 1/2, wherever: |eps_hat - eps|^2 is 5/4 of what it is without any model."""

    def forward(self, x, c_noise, cond=None):
        return torch.full_like(x, 0.5)


@pytest.mark.slow
def test_a_path_trained_with_its_network_halves_the_variance():
    """Two moons: against the same network and ends with the shape that the training started from."""
    data = Toy2D("moons", 8000)
    x = torch.stack([data[i] for i in range(len(data))]).float()
    torch.manual_seed(0)
    sde = ss.LearnedVP()
    model = ss.ScoreModel(
        ss.networks.MLP(2, 64, depth=2, time_scale=100.0), sde, ss.predictions.KarrasPreconditioning(1.0)
    )
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), seeded(1)
    loss = losses.VariationalBound()
    for _ in range(250):
        batch = x[torch.randint(len(x), (256,), generator=generator)]
        optimizer.zero_grad()
        loss(model, batch, generator=generator).value.mean().backward()
        optimizer.step()
    after = variance(model, x)
    linear = copy.deepcopy(model)
    with torch.no_grad():
        linear.sde.shape.zero_()
    assert float(after) < 0.65 * float(variance(linear, x))


# --- what it shares with other bounds


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
@pytest.mark.parametrize("sde", [ss.VP(), ss.VE(), ss.Rectified(), learned()], ids=["vp", "ve", "rectified", "learned"])
def test_squared_errors_are_those_of_the_noise_and_of_the_data(sde, shape):
    """|eps_hat - eps|^2 and |eps|^2; the decoder at t_min is off by -(sigma/alpha)(eps_hat - eps)."""
    model, x0, eps = oracle(shape).score_model(sde), normal(5, *shape), normal(5, *shape, seed=1)
    for t in (f64(sde.t_min), f64(0.3), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)):
        squares, norms = losses.squared_errors(model, x0, t, eps)
        x = sde.perturb(x0, t, eps)
        expected = (model.noise(x, t) - eps).square().flatten(1).sum(dim=1)
        close(squares, expected, rtol=1e-7)
        close(norms, eps.square().flatten(1).sum(dim=1))
        missing = (model.denoise(x, t) - x0).square().flatten(1).sum(dim=1)
        close(missing, (sde.sigma(t) / sde.alpha(t)).square() * squares, rtol=1e-5)
    single = losses.squared_errors(model, x0.float(), f64(sde.t_min), eps.float())
    assert [part.dtype for part in single] == [torch.float64] * 2


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE(), ss.Rectified(), learned()], ids=["vp", "ve", "rectified", "learned"])
def test_the_scale_of_the_decoder_is_that_of_its_density(sde):
    """The density of N(0, (sigma/alpha)^2) at 0 is one over it."""
    first = f64(sde.t_min)
    close(losses.decoder_log_scale(sde), -Normal(f64(0.0), sde.sigma(first) / sde.alpha(first)).log_prob(f64(0.0)))
    with pytest.raises(ValueError, match="VP has a log-SNR of inf at t_min=0: raise t_min"):
        losses.decoder_log_scale(ss.VP(t_min=0.0))


# --- what is refused


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="nodes of a chain"):
        losses.VariationalBound(losses.Nodes(10))
    model, x, _, _ = small()
    with pytest.raises(ValueError, match=r"uniform times .* got UniformLogSNR.*requires_grad_\(False\)"):
        losses.VariationalBound(losses.UniformLogSNR())(model, x)
    with pytest.raises(ValueError, match="VP has a log-SNR of inf at t_min=0: raise t_min"):
        losses.VariationalBound()(ss.ScoreModel(Zero(), ss.VP(t_min=0.0), "v"), x)
