"""The variational bound: closed forms, its invariance under the path, and its two gradients against autograd."""

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

SHAPES = [(3,), (1, 2, 2)]
PATHS = {"vp": ss.VP(), "ve": ss.VE(), "rectified": ss.Rectified(), "learned": learned()}


class Constant(torch.nn.Module):
    """F = a number. 0 with KarrasPreconditioning(sigma_data=s) is the exact score of N(0, s^2)."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = value

    def forward(self, x, c_noise, cond=None):
        return torch.full_like(x, self.value)


# --- the bound


@pytest.mark.parametrize("times", [None, losses.UniformLogSNR(), losses.LogNormal(0.0, 3.0)], ids=type)
@pytest.mark.parametrize(("sde", "shape"), [(ss.VP(t_min=0.05), (3,)), (ss.VE(), (1, 2, 2)), (learned(), (3,))])
def test_the_terms_of_a_gaussian_are_the_closed_integrals(sde, times, shape):
    std, n = 0.6, 6000
    mixture = ss.GaussianMixture(torch.zeros(1, *shape), f64(std)[None])
    x, size = mixture.sample(n, generator=seeded(1)), torch.Size(shape).numel()
    terms = losses.VariationalBound(times, stratified=False)(mixture.score_model(sde), x, generator=seeded())
    t = sde.time(torch.linspace(*sde.log_snr(f64(sde.t_min, sde.t_max)).tolist(), 2001, dtype=torch.float64))
    signal = (sde.alpha(t) * std).square()
    unexplained = signal / (signal + sde.sigma(t).square())  # variance of eps given x_t
    within(terms.diffusion, 0.5 * trapezoid(unexplained, -sde.log_snr(t)))
    first, last = f64(sde.t_min), f64(sde.t_max)
    at_end = Normal(sde.alpha(last) * x, sde.sigma(last))
    prior = kl_divergence(at_end, Normal(f64(0.0), f64(sde.prior_std))).flatten(1).sum(dim=1) / size
    close(terms.prior, prior, rtol=1e-9, atol=1e-12)
    entropy = Normal(f64(0.0), sde.sigma(first) / sde.alpha(first)).entropy()
    close(terms.reconstruction, entropy.expand(n), rtol=1e-12)
    close(terms.value, terms.prior + terms.diffusion + terms.reconstruction)


def test_the_bound_of_learned_dequantisations_is_this_bound_in_the_units_of_the_data():
    """That of `training.learned_dequantization` bounds x(t_min), which is alpha(t_min) times smaller."""
    transform, sde, images = Levels(8), learned(gamma_min=-4.0), torch.randint(0, 8, (6, 1, 2, 2), generator=seeded(1))
    model = oracle((1, 2, 2)).score_model(sde)

    class Centres:
        def sample(self, images, stream):
            return images + 0.5, torch.zeros(len(images), dtype=torch.float64)

        def start(self, sde, transform):
            return None

    y = transform(images.double() + 0.5)
    other = negative_evidence(model, images, transform, Centres(), generator=seeded()) + transform.log_det(images)
    terms = losses.VariationalBound(losses.UniformLogSNR())(model, y, generator=seeded())
    close(4 * terms.value, other - 4 * sde.alpha(f64(sde.t_min)).log(), rtol=1e-9, atol=1e-9)


def test_the_bound_does_not_depend_on_the_path_between_its_ends():
    """2107.00630, section 5.1, also for a wrong score; the variance does depend on it."""
    mixture, n, diffusions = oracle((3,)), 20_000, []
    x = mixture.sample(n, generator=seeded(1))
    for seed, spread in ((0, 0.0), (1, 2.0), (2, 4.0)):
        sde = learned(seed, spread, gamma_min=-6.0, gamma_max=8.0)
        model = exact_model(mixture, sde, "noise", 0.3, lambda x, t: torch.tanh(x))
        diffusions.append(losses.VariationalBound(stratified=False)(model, x, generator=seeded(seed)).diffusion)
    for values in diffusions[1:]:
        error = (values.var() / n + diffusions[0].var() / n).sqrt()
        assert abs(float(values.mean() - diffusions[0].mean())) < 4 * float(error)
        assert float(error) < 0.05 * float(values.mean())
    spreads = [float(values.std()) for values in diffusions]
    assert max(spreads) > 1.2 * min(spreads)


# --- the two gradients


def small(batch=7):
    """A float64 model of two dimensions on a learned path, with data, times and noise."""
    sde = ss.LearnedVP(gamma_min=-3.0, gamma_max=4.0, units=5).double()
    with torch.no_grad():
        sde.ends += f64(0.2, -0.1)
        sde.shape += normal(3, 5, seed=4)
    model = ss.ScoreModel(Trained((2,)).double(), sde, ss.predictions.KarrasPreconditioning(0.8))
    t = torch.rand(batch, generator=seeded(5), dtype=torch.float64)
    return model, normal(batch, 2), t, normal(batch, 2, seed=1)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_one_backward_pass_gives_the_gradients_of_the_bound_and_of_the_variance(batch):
    model, x, t, noise = small(batch)
    terms = losses.VariationalBound()(model, x, t=t, noise=noise)
    terms.value.mean().backward()
    sde, network = model.sde, list(model.network.parameters())[:-2]  # without the output that this model does not use
    # The same terms from the path's own functions, with their plain gradients.
    plain = losses.DenoisingScoreMatching("likelihood", losses.UniformTime(), reduction="half_sum")
    diffusion = plain(model, x, t=t, noise=noise).value / 2
    bound = (diffusion + sde.prior_divergence(x) / 2).mean() - 0.5 * sde.log_snr(f64(0.0))
    close(terms.value.mean(), bound + 0.5 * math.log(2 * math.pi * math.e))
    spread = diffusion.var() if batch > 1 else diffusion.square().sum()
    parameters = [*network, sde.ends]
    for parameter, expected in zip(parameters, torch.autograd.grad(bound, parameters, retain_graph=True), strict=True):
        close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
    close(sde.shape.grad, torch.autograd.grad(spread, sde.shape)[0], rtol=1e-9, atol=1e-12)


def test_each_of_several_losses_uses_the_variance_of_its_own_batch():
    """Also if their gradients are accumulated by one backward pass, and scaled."""
    model, x, t, noise = small(batch=8)

    def value(rows):
        return losses.VariationalBound()(model, x[rows], t=t[rows], noise=noise[rows]).value.mean()

    parts = (slice(0, 3), slice(3, 8))
    gradients = [torch.autograd.grad(value(rows), model.sde.shape)[0] for rows in parts]
    values = [value(rows) for rows in parts]
    model.zero_grad()
    (128 * values[1] + values[0]).backward()
    close(model.sde.shape.grad, gradients[0] + 128 * gradients[1], rtol=1e-10)
    # The path itself is unchanged: its plain gradient can be computed again.
    (plain,) = torch.autograd.grad(model.sde.log_snr(t[:3]).sum(), model.sde.shape)
    assert float(plain.abs().max()) > 0


def test_float32_has_the_same_gradients():
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


def test_the_value_is_the_same_without_gradients_or_with_a_fixed_path():
    model, x, t, noise = small()
    value = losses.VariationalBound()(model, x, t=t, noise=noise).value
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            close(losses.VariationalBound()(model, x, t=t, noise=noise).value, value.detach())
            losses.VariationalBound(losses.UniformLogSNR())(model, x)
    fixed = ss.ScoreModel(model.network, copy.deepcopy(model.sde).requires_grad_(False), model.prediction)
    other = losses.VariationalBound()(fixed, x, t=t, noise=noise).value
    head = model.network.mean.weight
    close(*(torch.autograd.grad(values.mean(), head)[0] for values in (value, other)))


# --- training


def variance(model, x, seed=9):
    with torch.no_grad():
        return float(losses.VariationalBound(stratified=False)(model, x, generator=seeded(seed)).diffusion.var())


def train(model, parameters, x, steps, rate, batch):
    """Minimise the bound by Adam, with a rate that falls to a hundredth."""
    optimizer, generator = torch.optim.Adam(parameters, rate), seeded(1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        rows = x[torch.randint(len(x), (batch,), generator=generator)]
        losses.VariationalBound()(model, rows, generator=generator).value.mean().backward()
        optimizer.step()
        schedule.step()


def test_a_trained_shape_has_the_least_possible_variance():
    """For a Gaussian the best path spends its time in proportion to v, with var L = (int v dgamma)^2 / (2 d).

    |eps_hat - eps|^2 is v times a chi-square, and E L^2 >= (int E[ell^2]^(1/2) dgamma)^2 by Cauchy and Schwarz.
    """
    std, size, x = 0.5, 4, 0.5 * normal(20_000, 4)
    sde = ss.LearnedVP(gamma_min=-5.0, gamma_max=9.0, learn_ends=False)
    model = ss.ScoreModel(Constant(), sde, ss.predictions.KarrasPreconditioning(std))
    gamma = torch.linspace(-5, 9, 4001, dtype=torch.float64)
    clean = torch.sigmoid(-gamma) * std**2
    least = trapezoid(clean / (clean + torch.sigmoid(gamma)), gamma) ** 2 / (2 * size)
    before = variance(model, x)
    train(model, [sde.shape], x, steps=120, rate=0.08, batch=256)
    assert before > 5 * least
    assert 0.95 * least < variance(model, x) < 1.25 * least


def test_the_ends_move_to_a_lower_bound():
    """For a model that predicts constant noise of 1/2 at every noise level both ends move inward."""
    sde = ss.LearnedVP(gamma_min=-8.0, gamma_max=6.0)
    model, x = ss.ScoreModel(Constant(0.5), sde, "noise"), 0.5 * normal(512, 4)

    def bound():
        with torch.no_grad():
            return float(losses.VariationalBound()(model, x, generator=seeded(2)).value.mean())

    (low, high), before = sde.gammas().tolist(), bound()
    train(model, [sde.ends], x, steps=40, rate=0.1, batch=128)
    assert bound() < before - 0.5
    assert sde.gammas()[0] > low + 1
    assert sde.gammas()[1] < high - 1


@pytest.mark.slow
def test_a_path_trained_with_its_network_halves_the_variance():
    """Two moons: compared with the same network and ends, and the shape that the training started from."""
    x = torch.stack(list(Toy2D("moons", 4000))).float()
    torch.manual_seed(0)
    network = ss.networks.MLP(2, 64, depth=2, time_scale=100.0)
    model = ss.ScoreModel(network, ss.LearnedVP(), ss.predictions.KarrasPreconditioning(1.0))
    train(model, model.parameters(), x, steps=120, rate=1e-2, batch=128)
    linear = copy.deepcopy(model)
    with torch.no_grad():
        linear.sde.shape.zero_()
    assert variance(model, x) < 0.65 * variance(linear, x)


# --- shared with other bounds


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sde", PATHS.values(), ids=PATHS)
def test_squared_errors_are_those_of_the_noise_and_of_the_data(sde, shape):
    """|eps_hat - eps|^2 and |eps|^2; the decoder at t_min is off by -(sigma/alpha)(eps_hat - eps)."""
    model, x0, eps = oracle(shape).score_model(sde), normal(5, *shape), normal(5, *shape, seed=1)
    for t in (f64(sde.t_min), f64(0.3), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)):
        squares, norms = losses.squared_errors(model, x0, t, eps)
        x = sde.perturb(x0, t, eps)
        close(squares, (model.noise(x, t) - eps).square().flatten(1).sum(dim=1), rtol=1e-7)
        close(norms, eps.square().flatten(1).sum(dim=1))
        residual = (model.denoise(x, t) - x0).square().flatten(1).sum(dim=1)
        close(residual, (sde.sigma(t) / sde.alpha(t)).square() * squares, rtol=1e-5)
    single = losses.squared_errors(model, x0.float(), f64(sde.t_min), eps.float())
    assert [part.dtype for part in single] == [torch.float64] * 2


@pytest.mark.parametrize("sde", PATHS.values(), ids=PATHS)
def test_the_scale_of_the_decoder_is_one_over_its_largest_density(sde):
    first = f64(sde.t_min)
    close(losses.decoder_log_scale(sde), -Normal(f64(0.0), sde.sigma(first) / sde.alpha(first)).log_prob(f64(0.0)))


def test_nodes_dependent_times_and_a_path_without_noise_are_refused():
    with pytest.raises(TypeError, match="nodes of a chain"):
        losses.VariationalBound(losses.Nodes(10))
    model, x, _, _ = small()
    with pytest.raises(ValueError, match=r"uniform times, because UniformLogSNR.*requires_grad_\(False\)"):
        losses.VariationalBound(losses.UniformLogSNR())(model, x)
    with pytest.raises(ValueError, match=r"VP has no noise at t_min=0, .*: raise t_min"):
        losses.VariationalBound()(ss.ScoreModel(Constant(), ss.VP(t_min=0.0), "v"), x)
