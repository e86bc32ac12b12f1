"""Held-out loss and bound of a model in training."""

import math

import pytest
import torch

import scoresde as ss
from scoresde import bounds
from scoresde.data import Affine, Levels, Standardize, Toy2D
from scoresde.dequantization import DataMap, TruncatedNormal, Uniform
from scoresde.losses import DenoisingScoreMatching, InfoNCE
from scoresde.networks import MLP
from scoresde.training.validation import HeldOut
from tests.conftest import seeded

LEVELS = DataMap(Levels(17), Uniform())


def new_model():
    torch.manual_seed(0)
    return ss.ScoreModel(MLP(2, width=8, depth=1), ss.VP(), "karras").eval()


def held_out(dataset=None, data_map=None, **options):
    data_map = data_map or DataMap(Affine())
    return HeldOut(DenoisingScoreMatching("likelihood"), dataset or Toy2D("moons", 40), data_map, data_map, **options)


def test_the_numbers_depend_on_the_model_alone():
    numbers, model = held_out(samples=32), new_model()
    before = numbers(model, 1)
    assert numbers(model, 2) == before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert numbers(model, 3)["validation_loss"] != before["validation_loss"]


@pytest.mark.parametrize("batch_size", [5, 16])
def test_the_numbers_do_not_depend_on_the_batch_size(batch_size):
    assert held_out(batch_size=batch_size)(new_model(), 0) == pytest.approx(held_out()(new_model(), 0), rel=1e-5)


def test_a_contrastive_loss_has_batches_of_nearly_equal_sizes():
    """9 pairs in batches of 8: a rest of one pair would have no negatives."""

    class Similarity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sde, self.scale = ss.VP(), torch.nn.Parameter(torch.tensor(0.0))

        def embed_condition(self, cond):
            return cond

        def forward(self, x, t, cond):
            return self.scale * x @ cond.T

    data = [(x, x) for x in torch.randn(9, 2, generator=seeded())]
    evaluate = HeldOut(InfoNCE(), data, DataMap(Affine()), DataMap(Affine()), draws=0, batch_size=8)
    expected = (4 * math.log(4) + 5 * math.log(5)) / 9  # of equal similarities: log of the number of pairs
    assert evaluate(Similarity(), 0)["validation_loss"] == pytest.approx(expected, rel=1e-6)


def test_the_bound_of_continuous_data_is_in_nats_per_dimension_of_the_data():
    """The transform stretches two dimensions by 2: a density of x is 4 times that of its state."""
    x, model = torch.randn(24, 2, generator=seeded()), new_model()
    numbers = held_out(list(x), DataMap(Affine(2.0, 1.0)), draws=4, batch_size=10)(model, 0)
    expected = bounds.continuous_nats(model, 2 * x + 1, draws=4, seeds=range(24)).value.detach() / 2 - math.log(2)
    assert numbers["validation_nats_per_dim_bound"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert numbers["validation_nats_per_dim_bound_stderr"] == pytest.approx(float(expected.std()) / 24**0.5, rel=1e-6)


def test_the_numbers_of_data_far_from_zero_are_those_of_its_states():
    """1.7e9 + 50 z, standardised to z: the same loss, and log 50 nats more per dimension."""
    z, model = torch.randn(24, 2, generator=seeded(), dtype=torch.float64), new_model()
    near, far = (
        held_out(list(data), DataMap(transform), draws=4)(model, 0)
        for data, transform in ((z, Affine()), (1.7e9 + 50 * z, Standardize(1.7e9, 50.0)))
    )
    assert far["validation_loss"] == pytest.approx(near["validation_loss"], rel=1e-5)
    name = "validation_nats_per_dim_bound"
    assert far[name] == pytest.approx(near[name] + math.log(50), rel=1e-5)


def test_the_bound_of_levels_is_in_bits():
    images, model = torch.randint(0, 17, (24, 2), generator=seeded()).float(), new_model()
    numbers = held_out(list(images), LEVELS, draws=4)(model, 0)
    expected = bounds.continuous(model, images, Levels(17), dequantization=Uniform(), draws=4)
    assert numbers["validation_bits_per_dim_bound"] == pytest.approx(expected.mean)
    assert numbers["validation_bits_per_dim_bound_stderr"] == pytest.approx(expected.stderr)


@pytest.mark.parametrize("options", [{"data_map": DataMap(Levels(17), TruncatedNormal())}, {"draws": 0}])
def test_without_clean_data_or_draws_there_is_no_bound(options):
    images = list(torch.randint(0, 17, (8, 2), generator=seeded()).float())
    assert set(held_out(images, **options)(new_model(), 0)) == {"validation_loss", "validation_loss_stderr"}


def test_the_bound_where_no_signal_is_left_is_the_entropy_of_the_data():
    """The exact score of N(0, 1) has the bound log(2 pi e)/2, up to the decoder's noise of 1/SNR at t_min."""
    model = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(ss.ZeroTerminalSNR(ss.VP(t_min=1e-3)))
    model.register_parameter("unused", torch.nn.Parameter(torch.zeros(())))  # for the device
    data = list(torch.randn(512, 2, generator=seeded()))
    numbers = held_out(data, samples=512)(model, 0)
    exact = float(torch.stack(data).square().mean() / 2) + 0.5 * math.log(2 * math.pi)
    assert numbers["validation_nats_per_dim_bound"] == pytest.approx(exact, abs=0.1)
    assert math.isfinite(numbers["validation_loss"])


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="needs at least one sample; got samples=0 from a dataset of 40"):
        held_out(samples=0)
