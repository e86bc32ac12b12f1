"""The denoiser of quantised data against Bayes' rule, by quadrature over the boxes and in closed form."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.networks import LevelHead
from tests.conftest import f64, normal, seeded

LEVELS, SIGMA_DATA = 5, 0.8


class Logits(torch.nn.Module):
    """The same logits (C, K) at every position and for every state."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x, label, cond=None):
        self.received = x, label
        flat = self.logits.flatten().reshape(1, -1, *(1,) * (x.ndim - 2))
        return flat.expand(x.shape[0], -1, *x.shape[2:])


def head(logits, **arguments):
    return LevelHead(Logits(logits), **{"levels": LEVELS, "sigma_data": SIGMA_DATA, **arguments})


def quadrature(y, s, prior):
    """E[x_0 | y] under the density prior_k on box k of [-1, 1], by the midpoint rule."""
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    grid = (grid[1:] + grid[:-1]) / 2
    density = prior[((grid + 1) / 2 * LEVELS).long().clamp(max=LEVELS - 1)]
    weights = density * torch.exp(-0.5 * ((grid - y[:, None]) / s).square())
    return (weights * grid).sum(dim=1) / weights.sum(dim=1)


@pytest.mark.parametrize("s", [1e-3, 0.03, 0.3, 3.0, 150.0])
@pytest.mark.parametrize("space", [(2,), (2, 2)])
def test_posterior_mean(s, space):
    logits = normal(2, LEVELS)
    y = 1.5 * normal(4, 2, *space, seed=1) * math.sqrt(0.5 + s**2)
    y = y.clamp(-1 - 4 * s, 1 + 4 * s)  # the quadrature itself underflows farther out
    out = head(logits)(y, torch.full((4,), s, dtype=torch.float64))
    for channel in range(2):
        expected = quadrature(y[:, channel].flatten(), s, logits[channel].softmax(dim=0))
        torch.testing.assert_close(out[:, channel].flatten(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("sde", [ss.VP(), ss.SubVP(), ss.VE(), ss.Rectified()], ids=lambda sde: type(sde).__name__)
def test_points_are_a_mixture_of_narrow_gaussians(sde):
    """Compared with the exact score of Gaussians on the centres, of standard deviation 1e-6."""
    logits = normal(1, LEVELS)
    centres = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) * 2 / LEVELS - 1
    mixture = ss.GaussianMixture(centres[:, None], torch.full((LEVELS,), 1e-6), logits[0].softmax(dim=0))
    model = ss.ScoreModel(head(logits, data="points"), sde, ss.predictions.Denoiser())
    for ratio in (0.08, 0.5, 5.0):
        t = sde.time(f64(-2 * math.log(ratio)))
        x = mixture.sample(50, sde, t, generator=seeded())
        exact = mixture.score(x, sde, t)
        torch.testing.assert_close(model.score(x[:, :, None], t)[:, :, 0], exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sde", [ss.VP(), ss.SubVP(), ss.VE(), ss.Rectified()], ids=lambda sde: type(sde).__name__)
def test_uniform_levels_are_a_uniform_density(sde):
    """With equal logits the data is uniform on [-1, 1], so that the number of levels does not matter."""
    model = ss.ScoreModel(head(torch.zeros(1, LEVELS)), sde, ss.predictions.Denoiser())
    one = ss.ScoreModel(head(torch.zeros(1, 2), levels=2), sde, ss.predictions.Denoiser())
    x = sde.perturb(2 * torch.rand(3, 1, 4, dtype=torch.float64, generator=seeded()) - 1, f64(0.4), normal(3, 1, 4))
    torch.testing.assert_close(model.score(x, 0.4), one.score(x, 0.4), atol=1e-9, rtol=1e-9)


def closed_form(y, s, prior, data):
    """E[x_0 | y] = sum_k pi_k L_k m_k / sum_k pi_k L_k, by the formulas of the module; y, s (n, 1), prior (K,)."""
    edges = torch.linspace(-1, 1, LEVELS + 1, dtype=torch.float64)
    if data == "points":
        centres = (edges[1:] + edges[:-1]) / 2
        joint = prior * torch.exp(-0.5 * ((y - centres) / s).square())
        return (joint * centres).sum(dim=1) / joint.sum(dim=1)
    z = (edges - y) / s
    a, b = z[:, :-1], z[:, 1:]
    likelihood = torch.special.ndtr(-(a + b).sign() * a) - torch.special.ndtr(-(a + b).sign() * b)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    moved = (prior * (density[:, :-1] - density[:, 1:])).sum(dim=1) / (prior * likelihood.abs()).sum(dim=1)
    return y[:, 0] + s[:, 0] * moved


@pytest.mark.parametrize("data", ["boxes", "points"])
@pytest.mark.parametrize("sigma_data", [0.05, SIGMA_DATA, 20.0])
@pytest.mark.parametrize("sde", [ss.VP(), ss.SubVP(), ss.VE(), ss.Rectified()], ids=lambda sde: type(sde).__name__)
def test_the_denoised_view_is_the_posterior_mean_at_any_sigma_data(sde, sigma_data, data):
    """sigma_data scales only the input of the inner network: if that outputs log pi_k, the mean is exact."""
    prior = normal(LEVELS).softmax(dim=0)
    model = ss.ScoreModel(head(prior.log(), data=data, sigma_data=sigma_data), sde, ss.predictions.Denoiser())
    box = torch.multinomial(prior, 40, replacement=True, generator=seeded())
    x0 = (box + 0.5 + (0.9 * torch.rand(40, generator=seeded()) - 0.45) * (data == "boxes")) * 2 / LEVELS - 1
    for t in sde.t_min + (sde.t_max - sde.t_min) * f64(0.0, 0.01, 0.1, 0.3, 0.6, 1.0):
        x = sde.perturb(x0[:, None].double(), t, normal(40, 1, seed=1))
        s = torch.full((40, 1), float(sde.sigma(t) / sde.alpha(t)), dtype=torch.float64)
        exact = closed_form(x / sde.alpha(t), s, prior, data)
        # For boxes the formula divides differences of size 1/s, and multiplies by s.
        atol = 1e-14 if data == "points" else 1e-12 * max(1.0, float(s[0])) ** 2
        torch.testing.assert_close(model.denoise(x[:, :, None], t).flatten(), exact, atol=atol, rtol=0)


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE()], ids=lambda sde: type(sde).__name__)
def test_the_inner_network_has_the_input_and_label_of_edm(sde):
    wrapper, karras = head(torch.zeros(1, LEVELS)), ss.predictions.KarrasPreconditioning(SIGMA_DATA)
    x, t = normal(4, 1, 3), sde.t_min + (sde.t_max - sde.t_min) * f64(0.0, 0.1, 0.5, 1.0)
    ss.ScoreModel(wrapper, sde, ss.predictions.Denoiser()).denoise(x, t)
    scaled, label = wrapper.network.received
    torch.testing.assert_close(scaled, karras.c_in(sde, t)[:, None, None] * x, atol=0, rtol=1e-12)
    torch.testing.assert_close(label, karras.c_noise(sde, t), atol=1e-13, rtol=0)


@pytest.mark.parametrize("data", ["boxes", "points"])
@pytest.mark.parametrize("s", [1e-6, 1e-3, 150.0])
def test_finite_with_finite_gradients_far_out(s, data):
    """The tails of every box, at both ends of the noise."""
    y = (math.hypot(s, SIGMA_DATA) * torch.linspace(-8, 8, 33)).reshape(-1, 1, 1).requires_grad_()
    logits = torch.zeros(1, LEVELS, requires_grad=True)
    out = head(logits, data=data)(y, torch.full((33,), s))
    gradients = torch.autograd.grad(out.sum(), (y, logits))
    assert all(bool(torch.isfinite(value).all()) for value in (out, *gradients))
    assert (out.abs() <= 1 + 1e-5).all()


@pytest.mark.parametrize("data", ["boxes", "points"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_has_the_closed_form_in_full(dtype, data):
    """Against float32 with the same logits: the posterior mean at noise far below a level, s = 1e-3."""
    logits = normal(1, 256).to(dtype).float()
    sde, centre = ss.VP(), (2 * 100 + 1) / 256 - 1
    x0 = centre + torch.linspace(-1 / 256, 1 / 256, 9)[:, None, None]

    def denoised(kind):
        network = Logits(torch.nn.Parameter(logits.to(kind)))
        model = ss.ScoreModel(LevelHead(network, 256, data=data), sde, ss.predictions.Denoiser())
        value = model.denoise(x0, sde.t_min)
        assert network.received[0].dtype == kind
        assert network.received[1].dtype == torch.float32
        return value

    torch.testing.assert_close(denoised(dtype), denoised(torch.float32), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bits_of_independent_levels_are_their_entropy(dtype):
    """With logits log pi_k for every state the model is the law pi itself, whatever the dtype of its network.

    Both the likelihood of the flow, up to the smoothing of levels by the noise at t_min, and the evidence bound.
    """
    prior = f64(0.6, 0.3, 0.05, 0.03, 0.02)
    levels = 250 + torch.multinomial(prior, 32 * 4, replacement=True, generator=seeded()).reshape(32, 4, 1)
    logits = torch.full((4, 256), -30.0)
    logits[:, 250:255] = prior.log()
    network = Logits(torch.nn.Parameter(logits.to(dtype)))
    model = ss.ScoreModel(LevelHead(network, 256), ss.VP(t_min=1e-7), ss.predictions.Denoiser())
    entropy = -float(prior.log2()[levels - 250].mean())
    assert ss.bits_per_dim(model, levels, ss.data.Levels(256)).mean == pytest.approx(entropy, abs=0.015)
    bound = ss.bounds.continuous(model, levels, ss.data.Levels(256), draws=32)
    assert bound.mean == pytest.approx(entropy, abs=4 * bound.stderr)
    assert bound.stderr < 0.2


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="levels must be an integer >= 2"):
        head(torch.zeros(1, 1), levels=1)
    with pytest.raises(ValueError, match="data must be 'boxes' or 'points'; got 'lines'"):
        head(torch.zeros(1, LEVELS), data="lines")
    with pytest.raises(ValueError, match=r"logits must have shape \(3, 5, 4\)"):
        head(torch.zeros(1, 4))(torch.zeros(3, 1, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"sigma_data must be a finite number > 0; got 0\.0"):
        head(torch.zeros(1, LEVELS), sigma_data=0.0)
