"""A network trained for inpainting as a posterior model; tests/losses/test_inpainting.py has its exact score."""

import warnings

import pytest
import torch

import scoresde as ss
from scoresde.inverse import Grey, Inpainting, TrainedInpainting, sample_posterior
from scoresde.networks import MLP
from tests.conftest import close, normal
from tests.networks.test_layers import randomised

MASK = torch.tensor([[True, False, True], [False, True, True]])
SHAPE = (2, 2, 3)
SAMPLER = ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=3)


def model(shape=SHAPE, channels=3, **options):
    network = randomised(MLP(shape, width=8, depth=1, cond_channels=channels, **options))
    return ss.ScoreModel(network, ss.VP(), "karras")


def image_of(y, mask=MASK):
    """[m y, m] of measurements (B, C, m) of images."""
    image = torch.zeros(len(y), 3, 2, 3, dtype=y.dtype)
    image[:, :2, mask], image[:, 2] = y, mask.double()
    return image


@pytest.mark.parametrize("count", [1, 5])
def test_the_measurement_is_the_condition(count):
    """One measurement for all samples, or one for each."""
    network, y, x, t = model(), normal(count, 2, 4), normal(5, *SHAPE, seed=1), torch.linspace(0.1, 0.9, 5).double()
    built = TrainedInpainting(network, Inpainting(MASK, 0.1), y if count > 1 else y[0])
    expected = network.given({"image": image_of(y)})
    close(built.score(x, t), expected.score(x, t))
    whole = TrainedInpainting(network, Inpainting(MASK.expand(2, -1, -1), 0.1), y.flatten(1))
    close(whole.score(x, t), expected.score(x, t))
    rows = torch.tensor([4, 1])
    close(built.rows(rows, 5).score(x[rows], t[rows]), expected.score(x, t)[rows])


def test_the_scale_is_that_of_classifier_free_guidance():
    network, y, x = model(), normal(2, 4), normal(3, *SHAPE, seed=1)
    conditional = network.given({"image": image_of(y[None])})
    for scale, weights in ((0.0, (0, 1)), (2.5, (2.5, -1.5))):
        expected = weights[0] * conditional.score(x, 0.3) + weights[1] * network.score(x, 0.3)
        built = TrainedInpainting(network, Inpainting(MASK, 0.1), y, scale)
        close(built.score(x, 0.3), expected, rtol=1e-9)
    guided = ss.guidance.ClassifierFree(network, {"image": image_of(y[None])}, scale=1.5)
    close(guided.score(x, 0.3), built.score(x, 0.3), rtol=1e-9)


def test_a_label_of_the_model_stays():
    network, y, x, label = model(classes=4), normal(2, 4), normal(3, *SHAPE, seed=1), torch.tensor([0, 3, -1])
    built = TrainedInpainting(network.given(label), Inpainting(MASK, 0.1), y)
    expected = network.given({"label": label, "image": image_of(y[None])})
    close(built.score(x, 0.3), expected.score(x, 0.3))
    close(built.rows(slice(1, 3), 3).score(x[1:], 0.3), expected.score(x, 0.3)[1:])


def test_samples_by_name_depend_on_their_seed_alone():
    network, operator, y = model(), Inpainting(MASK, 0.1), normal(2, 4)
    settings = {"method": "trained", "sampler": SAMPLER, "dtype": torch.float64}
    result = sample_posterior(network, operator, y, 4, seeds=range(4), **settings)
    expected = SAMPLER(
        network, shape=(4, *SHAPE), seeds=range(4), cond={"image": image_of(y[None])}, dtype=torch.float64
    )
    close(result.x, expected.x)
    assert (result.nfe, result.backward) == (expected.nfe, 0)
    alone = sample_posterior(network, operator, y, 1, seeds=[2], **settings)
    close(alone.x, result.x[2:3], rtol=1e-10)
    each = sample_posterior(network, operator, y.expand(4, 2, 4), 4, seeds=range(4), **settings)
    close(each.x, result.x)


def test_errors():
    network, operator, y = model(), Inpainting(MASK, 0.1), normal(2, 4)
    with pytest.raises(TypeError, match=r"operator must be Inpainting for .* it; got Grey\(noise_std=0.1\)"):
        TrainedInpainting(network, Grey(noise_std=0.1), y)
    plain = ss.ScoreModel(MLP(SHAPE, width=8, classes=2), ss.VP(), "karras")
    with pytest.raises(ValueError, match="with the condition image; got one with label: train it with loss=inpainting"):
        TrainedInpainting(plain, operator, y)
    mask = torch.stack([MASK, ~MASK])
    with pytest.raises(ValueError, match="the same in every channel"):
        TrainedInpainting(network, Inpainting(mask, 0.1), normal(6)).score(normal(3, *SHAPE), 0.5)
    with pytest.raises(ValueError, match=r"condition images of shape \(3, 5, 2, 3\); got \(3, 3, 2, 3\)"):
        TrainedInpainting(model(channels=5), operator, y).score(normal(3, *SHAPE), 0.5)
    with pytest.raises(ValueError, match="y must be finite"):
        TrainedInpainting(network, operator, torch.full((2, 4), torch.nan))


def test_another_noise_than_that_of_the_training_is_reported():
    network, y = model(), normal(2, 4)
    with pytest.warns(UserWarning, match="trained for measurements with noise_std=0.05, and treats y as such"):
        TrainedInpainting(network, Inpainting(MASK, 0.1), y, trained_noise_std=0.05)
    with warnings.catch_warnings(action="error"):
        TrainedInpainting(network, Inpainting(MASK, 0.1), y, trained_noise_std=0.1)
