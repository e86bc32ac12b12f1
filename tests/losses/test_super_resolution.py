"""The training for super-resolution: its condition image, and the exact conditional score as its minimiser."""

import pytest
import torch

import scoresde as ss
from scoresde.data import AveragePooling, Haar
from scoresde.losses import DenoisingScoreMatching, SuperResolution
from scoresde.losses.super_resolution import low_resolution_image
from scoresde.random_stream import RandomStream
from scoresde.training.batches import StepNoise
from tests.conftest import close, f64, normal, seeded, within
from tests.pipelines.pyramids import law_of, parts_law

SPLITS = [AveragePooling(), Haar()]
LOSS = DenoisingScoreMatching(stratified=False)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("shape", [(2, 4), (3, 4, 6)])
def test_states_and_images_have_the_shapes_that_the_network_is_told(split, shape):
    loss = SuperResolution(LOSS, split)
    states, image = loss.derive(normal(2, *shape), RandomStream(seeds=[0, 1]))
    assert tuple(states.shape[1:]) == split.fine_shape(shape)
    assert tuple(image.shape[1:]) == loss.conditions(shape)["image"]
    assert loss.required == ("image",)


def test_the_image_is_the_noised_mean_and_its_level():
    """Levels are uniform up to the largest; the noise has the level's variance, and the mean the rest."""
    x0, split = torch.full((4000, 1, 4, 4), 2.0, dtype=torch.float64), Haar()
    _, image = SuperResolution(LOSS, split, augmentation=0.8).derive(x0, RandomStream(seeds=range(4000)))
    z, level = image[:, 0], image[:, 1, :1, :1]
    assert bool((image[:, 1] == level).all())
    assert 0 <= float(level.min()) < 0.01
    assert 0.79 < float(level.max()) <= 0.8
    within(level[:, 0], f64(0.4))
    noise = (z - 2 * (1 - level.square()).sqrt()) / level
    within(noise, f64(0.0))
    within(noise.square(), f64(1.0))
    within(noise[:, :, :1] * level, f64(0.0))


def test_at_level_zero_the_image_is_the_upsampled_mean():
    x, split = normal(3, 2, 4, 4), AveragePooling()
    mean, stream = split.mean(x), RandomStream(seeds=range(3))
    image = low_resolution_image(split, mean, 0.0, stream)
    close(image, torch.cat([split.upsampled(mean), torch.zeros(3, 1, 4, 4, dtype=x.dtype)], dim=1))
    plain = SuperResolution(LOSS, split, augmentation=0.0)
    close(plain.derive(x, stream)[1], split.upsampled(mean))
    assert plain.conditions((2, 4, 4)) == {"image": (2, 4, 4)}


class Oracle(torch.nn.Module):
    """E[eps | fine part_t, image] of a normal law of (mean, fine part), plus theta (B, 2) times wrong functions."""

    conditions = ("image",)

    def __init__(self, sde, law, theta, ignores_level=False):
        super().__init__()
        self.path, self.law, self.theta, self.ignores_level = (sde,), law, theta, ignores_level

    def forward(self, x, label, cond=None):
        sde, t = self.path[0], label.double()
        z, s = cond["image"].double().flatten(1).unbind(1)
        s = torch.zeros_like(s) if self.ignores_level else s
        keep, cov = (1 - s.square()).sqrt(), self.law.covariance_matrix
        gain = keep * cov[0, 1] / (keep.square() * cov[0, 0] + s.square())
        mean = self.law.mean[1] + gain * (z - keep * self.law.mean[0])
        variance = cov[1, 1] - gain * keep * cov[0, 1]
        alpha, sigma, state = sde.alpha(t), sde.sigma(t), x.double().flatten(1)[:, 0]
        noise = sigma * (state - alpha * mean) / (alpha.square() * variance + sigma.square())
        wrong = torch.stack([torch.tanh(state), z * torch.cos(state)], dim=1)
        return (noise + (self.theta * wrong).sum(dim=1)).reshape(x.shape)


@pytest.mark.parametrize("ignores_level", [False, True])
def test_the_exact_conditional_score_is_the_minimiser(ignores_level):
    """The gradient of each sample's loss has the mean 0 at the exact score given z and s, not at one that ignores s."""
    count, sde, law, shape = 20_000, ss.VP(t_min=0.02), law_of(2, 4), (1, 2)
    theta = torch.zeros(count, 2, dtype=torch.float64, requires_grad=True)
    model = ss.ScoreModel(Oracle(sde, parts_law(law, Haar(), shape), theta, ignores_level), sde, "noise")
    x0 = law.mean + normal(count, 2) @ torch.linalg.cholesky(law.covariance_matrix).T
    terms = SuperResolution(LOSS, Haar(), 0.9)(model, x0.reshape(-1, *shape), generator=seeded(2))
    (gradient,) = torch.autograd.grad(terms.value.sum(), theta)
    if not ignores_level:
        within(gradient, torch.zeros(2, dtype=torch.float64))
    else:
        assert float((gradient.mean(dim=0) / gradient.std(dim=0)).abs().max()) > 8 / count**0.5


def test_the_loss_of_a_sample_does_not_depend_on_its_batch_and_labels_stay():
    seen = []

    def network(x, label, cond):
        seen.append(cond)
        return x

    model, loss = ss.ScoreModel(network, ss.VP(), "noise"), SuperResolution(LOSS, Haar())
    x0, t, label = normal(6, 1, 4, 4), torch.linspace(0.1, 0.9, 6, dtype=torch.float64), torch.arange(6)
    whole = loss(model, x0, label, t=t, stream=StepNoise(range(6), 3, 5)).value
    part = loss(model, x0[4:], label[4:], t=t[4:], stream=StepNoise(range(4, 6), 3, 5)).value
    close(part, whole[4:])
    assert torch.equal(seen[1]["label"], label[4:])
    assert seen[1]["image"].shape == (2, 2, 2, 2)
    with pytest.raises(ValueError, match="cond must have no image"):
        loss(model, x0, {"image": x0})
