"""The training for inpainting: its condition image, and the exact conditional score as its minimiser."""

import pytest
import torch

import scoresde as ss
from scoresde.inverse import Inpainting, TrainedInpainting
from scoresde.losses import DenoisingScoreMatching, InpaintingObjective, RandomMasks
from scoresde.losses.inpainting import measured_image
from scoresde.random_stream import RandomStream
from scoresde.training.batches import StepNoise
from tests.conftest import close, f64, normal, seeded, within

NOISE = 0.3
MEANS, STDS, WEIGHTS = f64([[-1.0, -0.5], [0.8, 1.0], [0.6, -1.2]]), f64([[0.3, 0.6], [0.5, 0.2], [0.4, 0.4]]), None
MASKS = RandomMasks(box=0, strokes=0, half=2, hidden=1)
LOSS = InpaintingObjective(DenoisingScoreMatching(stratified=False), MASKS, NOISE)


def log_normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2 / variance + variance.log())


class ConditionalOracle(torch.nn.Module):
    """E[eps | x_t, y] of a mixture with axes along the entries, plus theta times functions of the input.

    The components are conditioned on y, then on x_t, as a Kalman filter does. theta is (3,), or (B, 3).
    """

    conditions = ("image",)

    def __init__(self, sde, theta=0.0, ignores_image=False):
        super().__init__()
        self.path, self.theta, self.ignores_image = (sde,), theta, ignores_image

    def forward(self, x, label, cond=None):
        sde, t = self.path[0], label.double()
        image = cond["image"] if cond else torch.zeros(len(x), 4, dtype=x.dtype)
        wrong = torch.stack([torch.tanh(x.double()), *image.double().chunk(2, dim=1)], dim=1)
        image = 0 * image if self.ignores_image else image
        y, mask = (part[:, None].double() for part in image.chunk(2, dim=1))
        alpha, sigma = (coefficient[:, None, None] for coefficient in (sde.alpha(t), sde.sigma(t)))
        state, variance = x[:, None].double(), STDS.square()
        logits = (mask * log_normal(y, MEANS, variance + NOISE**2)).sum(dim=2)
        gain = mask * variance / (variance + NOISE**2)
        mean, variance = MEANS + gain * (y - MEANS), variance * (1 - gain)
        total = alpha**2 * variance + sigma**2
        logits = logits + log_normal(state, alpha * mean, total).sum(dim=2)
        mean = mean + alpha * variance / total * (state - alpha * mean)
        x0 = (logits.softmax(dim=1)[..., None] * mean).sum(dim=1)
        noise = (x - alpha[:, 0] * x0) / sigma[:, 0]
        return noise + (torch.as_tensor(self.theta).double().reshape(-1, 3, 1) * wrong).sum(dim=1)


def test_the_image_is_the_measurement_and_the_mask():
    x0, loss = normal(2000, 3, 4, 4), InpaintingObjective(DenoisingScoreMatching(), noise_std=0.2)
    image = loss.condition_image(x0, RandomStream(seeds=range(2000)))
    y, mask = image[:, :3], image[:, 3:]
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    measured = mask.bool().expand_as(y)
    assert not y[~measured].any()
    within(((y - x0)[measured] / 0.2)[:, None], f64(0.0))
    within(((y - x0)[measured] / 0.2)[:, None].square(), f64(1.0))
    exact = InpaintingObjective(DenoisingScoreMatching(), loss.masks)
    again = exact.condition_image(x0, RandomStream(seeds=range(2000)))
    assert torch.equal(again[:, 3:], mask)
    assert torch.equal(again[:, :3], x0 * mask)


@pytest.mark.parametrize(("shape", "expected"), [((3, 4, 6), (4, 4, 6)), ((2, 8), (3, 8)), ((5,), (10,))])
def test_the_image_has_the_shape_that_the_network_is_told(shape, expected):
    image = LOSS.condition_image(torch.zeros(2, *shape), RandomStream(seeded()))
    assert tuple(image.shape[1:]) == expected == LOSS.conditions(shape)["image"]


@pytest.mark.parametrize("ignores_image", [False, True])
def test_the_exact_conditional_score_is_the_minimiser(ignores_image):
    """The gradient of each sample's loss has the mean 0 at the exact score given the image, not at that without it."""
    count, sde, mixture = 20_000, ss.VP(t_min=0.02), ss.GaussianMixture(MEANS, STDS, WEIGHTS)
    theta = torch.zeros(count, 3, dtype=torch.float64, requires_grad=True)
    model = ss.ScoreModel(ConditionalOracle(sde, theta, ignores_image), sde, "noise")
    terms = LOSS(model, mixture.sample(count, generator=seeded(1)).double(), generator=seeded(2))
    (gradient,) = torch.autograd.grad(terms.value.sum(), theta)
    if not ignores_image:
        within(gradient, torch.zeros(3, dtype=torch.float64))
    else:
        assert float((gradient.mean(dim=0) / gradient.std(dim=0)).abs().max()) > 20 / count**0.5


@pytest.mark.parametrize("mask", [[True, False], [False, True]])
def test_it_is_the_score_of_the_posterior(mask):
    """The model of the network is that of the oracle's posterior, and without the image the oracle's own."""
    sde, mixture = ss.VP(), ss.GaussianMixture(MEANS, STDS, WEIGHTS)
    model, operator = ss.ScoreModel(ConditionalOracle(sde, [0.0] * 3), sde, "noise"), Inpainting(mask, NOISE)
    y, x, t = f64(0.7)[None], normal(5, 2), f64(0.05, 0.2, 0.4, 0.7, 1.0)
    exact = mixture.posterior(operator, y).score_model(sde)
    close(TrainedInpainting(model, operator, y).score(x, t), exact.score(x, t), rtol=1e-9)
    close(model.score(x, t), mixture.score_model(sde).score(x, t), rtol=1e-9)
    image = measured_image(f64([[0.7, 0.7]]), torch.tensor([mask]))
    close(model.given({"image": image}).score(x, t), exact.score(x, t), rtol=1e-9)


def test_the_loss_of_a_sample_does_not_depend_on_its_batch():
    """Masks, noise and loss of part of a step's batch are those of the whole batch."""
    sde = ss.VP()
    model = ss.ScoreModel(ConditionalOracle(sde, [0.1, 0.2, 0.3]), sde, "noise")
    x0, t = normal(8, 2), torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    whole = LOSS(model, x0, t=t, stream=StepNoise(range(8), 3, 5)).value
    parts = [LOSS(model, x0[i : i + 4], t=t[i : i + 4], stream=StepNoise(range(i, i + 4), 3, 5)).value for i in (0, 4)]
    close(torch.cat(parts), whole)
    other = LOSS(model, x0, t=t, stream=StepNoise(range(8), 3, 6)).value
    assert (other != whole).all()


def test_other_conditions_and_the_times_of_the_inner_loss_stay():
    seen = []

    def network(x, label, cond):
        seen.append(cond)
        return x

    model, label = ss.ScoreModel(network, ss.VP(), "noise"), torch.arange(4)
    terms = LOSS(model, normal(4, 2), label, generator=seeded(0))
    assert torch.equal(seen[0]["label"], label)
    assert seen[0]["image"].shape == (4, 4)
    assert torch.equal(LOSS.draw_times(ss.VP(), 5, seeded(1)), LOSS.loss.draw_times(ss.VP(), 5, seeded(1)))
    close(terms.weight, LOSS.loss(model, normal(4, 2), label, t=terms.t).weight)


def test_an_image_of_the_data_is_refused():
    with pytest.raises(ValueError, match="cond must have no image"):
        LOSS(ss.ScoreModel(ConditionalOracle(ss.VP()), ss.VP()), normal(2, 2), {"image": normal(2, 4)})
