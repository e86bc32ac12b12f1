"""Held-out numbers of a model in training."""

import math

import pytest
import torch

import scoresde as ss
from scoresde import bounds
from scoresde.data import Affine, Levels, Toy2D
from scoresde.dequantization import DataMap, TruncatedNormal, Uniform
from scoresde.losses import DenoisingScoreMatching
from scoresde.networks import MLP
from scoresde.training.validation import HeldOut
from tests.conftest import seeded

LOSS = DenoisingScoreMatching("likelihood")


def new_model():
    torch.manual_seed(0)
    return ss.ScoreModel(MLP(2, width=8, depth=1), ss.VP(), "karras").eval()


def test_the_same_model_has_the_same_numbers_and_another_has_others():
    data_map = DataMap(Affine())
    numbers = HeldOut(LOSS, Toy2D("moons", 64), data_map, data_map, samples=32)
    model = new_model()
    before = numbers(model, 1)
    assert numbers(model, 2) == before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert numbers(model, 3)["validation_loss"] != before["validation_loss"]


@pytest.mark.parametrize("batch_size", [5, 16, 64])
def test_no_number_depends_on_the_batches(batch_size):
    data_map = DataMap(Affine())
    expected = HeldOut(LOSS, Toy2D("moons", 40), data_map, data_map)(new_model(), 0)
    found = HeldOut(LOSS, Toy2D("moons", 40), data_map, data_map, batch_size=batch_size)(new_model(), 0)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_exact_score_has_the_bound_of_its_density():
    """On data of the oracle the bound is the entropy, up to the noise of both; continuous data counts in nats."""
    oracle = ss.GaussianMixture([[0.5, 0.0], [-0.5, 0.2]], [0.3, 0.5])
    model = oracle.score_model(ss.VP(t_min=1e-4)).float()
    data = oracle.sample(400, generator=seeded()).float()
    model.anchor = torch.nn.Parameter(torch.zeros(1))  # where the model is
    data_map = DataMap(Affine(2.0, 1.0))
    points = [(x - 1.0) / 2.0 for x in data]
    found = HeldOut(LOSS, points, data_map, data_map, samples=400, draws=64)(model, 0)
    exact = float((-oracle.log_prob(data.double()) / 2 - math.log(2.0)).mean())
    assert found["validation_nats_per_dim_bound"] == pytest.approx(exact, abs=0.03)


def test_bits_of_levels_are_those_of_the_bound():
    images = torch.randint(0, 17, (24, 2), generator=seeded()).float()
    data_map, model = DataMap(Levels(17), Uniform()), new_model()
    found = HeldOut(LOSS, list(images), data_map, data_map, draws=4)(model, 0)
    expected = bounds.continuous(model, images, Levels(17), dequantization=Uniform(), draws=4)
    assert found["validation_bits_per_dim_bound"] == pytest.approx(expected.mean)
    assert found["validation_bits_per_dim_bound_stderr"] == pytest.approx(expected.stderr)


def test_points_that_are_no_clean_data_have_no_bound():
    data_map = DataMap(Levels(17), TruncatedNormal())
    images = list(torch.randint(0, 17, (8, 2), generator=seeded()).float())
    measured = HeldOut(LOSS, images, data_map, data_map)(new_model(), 0)
    assert set(measured) == {
        "validation_loss",
        "validation_loss_stderr",
    }


def test_no_samples_are_refused():
    data_map = DataMap(Affine())
    with pytest.raises(ValueError, match="one held-out sample or more expected; got 0 of 8"):
        HeldOut(LOSS, Toy2D("moons", 8), data_map, data_map, samples=0)
