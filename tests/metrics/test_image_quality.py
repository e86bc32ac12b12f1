"""Figures of features against closed forms, torchmetrics on the same features, and brute force."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from scoresde.metrics import moments
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Features, Pixels
from scoresde.metrics.image_quality import (
    METRICS,
    frechet,
    inception_score,
    kernel_distance,
    measure,
    measure_images,
    missing,
    precision_recall,
)
from tests.conftest import f64, normal, seeded


def torchmetrics_frechet(x, y):
    network = nn.Identity()
    network.num_features = x.shape[1]
    metric = FrechetInceptionDistance(network)
    metric.update(x, real=False)
    metric.update(y, real=True)
    return float(metric.compute())


@pytest.mark.parametrize("size", [1, 5, 20])
def test_the_frechet_distance_is_torchmetrics(size):
    x, y = 1.2 * normal(60, size), normal(80, size, seed=1) + 0.3
    found = frechet(x, y)
    assert found.value == pytest.approx(torchmetrics_frechet(x, y), rel=1e-9)
    assert found.kind == "standard error"
    given = frechet(x, FeatureStatistics(*moments(y)))
    assert given.value == pytest.approx(found.value)
    assert 0 < given.error < found.error  # the statistics count as exact


def test_the_frechet_distance_of_a_shift_is_its_square_and_of_itself_nothing():
    x, shift = normal(500, 6), normal(6, seed=1)
    assert frechet(x, x + shift).value == pytest.approx(float(shift.square().sum()))
    assert frechet(x, x).value == 0
    many = frechet(normal(40_000, 3), normal(40_000, 3, seed=1) + f64(1.0, 2.0, 0.0))
    assert abs(many.value - 5) < 4 * many.error < 0.5


def cubic(x, y):
    return (x @ y.mT / x.shape[1] + 1) ** 3


def unbiased(x, y):
    xx, yy, n, m = cubic(x, x), cubic(y, y), len(x), len(y)
    within = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1)) + (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return float(within - 2 * cubic(x, y).mean())


def test_kid_is_the_unbiased_discrepancy_of_a_cubic_kernel():
    x, y = normal(30, 4), normal(30, 4, seed=1) + 0.5
    whole = kernel_distance(x, y, subsets=1, subset_size=30)
    assert whole.value == pytest.approx(unbiased(x, y))
    assert whole.kind == "standard deviation over 1 subsets of 30"
    # Over many subsets the mean is that of all pairs: the statistic is unbiased.
    many = kernel_distance(x, y, subsets=800)
    assert many.kind.endswith("800 subsets of 15")
    assert abs(many.value - unbiased(x, y)) < 5 * many.error / math.sqrt(800)


def test_kid_of_one_distribution_is_zero_on_average():
    values = f64(
        *(kernel_distance(normal(20, 3, seed=s), normal(20, 3, seed=500 + s), 1, 20).value for s in range(150))
    )
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(150)
    assert float(values.min()) < 0 < float(values.max())


def test_draws_depend_on_the_seed_and_leave_the_global_generator_alone():
    x, y = normal(40, 3), normal(40, 3, seed=1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (kernel_distance(x, y, 5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.rand(1), expected)


def test_the_inception_score_counts_classes_that_are_sure_and_evenly_met():
    sure = 100 * torch.eye(10)[torch.arange(200) % 10]
    one = inception_score(sure, splits=1)
    assert one.value == pytest.approx(10, rel=1e-6)
    assert one.error is None
    assert inception_score(torch.zeros(40, 7)).value == pytest.approx(1)
    assert inception_score(100 * torch.eye(10)[torch.zeros(40, dtype=torch.long)]).value == pytest.approx(1)
    # exp(E KL) by its definition, of some probabilities; a constant added to the logits is nothing.
    logits = normal(50, 4)
    p = logits.softmax(dim=1)
    expected = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp()
    assert inception_score(logits + 3, splits=1).value == pytest.approx(float(expected))


def by_hand(x, y, k):
    """The share of x within a ball of y, by its definition."""
    radii = [sorted(math.dist(a, b) for j, b in enumerate(y) if j != i)[k - 1] for i, a in enumerate(y)]
    return sum(any(math.dist(a, b) <= r for b, r in zip(y, radii, strict=True)) for a in x) / len(x)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_precision_and_recall_are_those_by_hand(k, chunk):
    x, y = 0.7 * normal(45, 2), normal(38, 2, seed=1) + 1.5
    precision, recall = precision_recall(x, y, k, chunk)
    assert precision.value == by_hand(x.tolist(), y.tolist(), k)
    assert recall.value == by_hand(y.tolist(), x.tolist(), k)
    assert 0 < recall.value < 1
    assert 0 < precision.value < 1
    assert precision.error == pytest.approx(math.sqrt(precision.value * (1 - precision.value) / 45))


def test_the_rim_of_a_ball_belongs_to_it_and_copies_are_no_obstacle():
    """Whole numbers, whose distances are exact: points at just the distance of the neighbour, and repeated ones."""
    generator = seeded()
    x, y = (torch.randint(0, 4, (60, 3), generator=generator).double() for _ in range(2))
    x, y = x + 1e4, y + 1e4
    precision, recall = precision_recall(x, y, 2)
    assert (precision.value, recall.value) == (by_hand(x.tolist(), y.tolist(), 2), by_hand(y.tolist(), x.tolist(), 2))
    same = precision_recall(x, x)
    assert [figure.value for figure in same] == [1.0, 1.0]


def test_a_missing_mode_costs_recall_and_samples_beside_the_data_cost_precision():
    data = torch.cat([normal(100, 2), normal(100, 2, seed=1) + 30])
    one_mode = normal(200, 2, seed=2)
    precision, recall = precision_recall(one_mode, data)
    assert precision.value > 0.85
    assert 0.4 < recall.value <= 0.5
    assert precision_recall(data + 100, data)[0].value == 0


def test_measure_gives_what_there_is_and_says_what_is_missing():
    x, y = Features(normal(40, 3), normal(40, 5, seed=2)), Features(normal(30, 3, seed=1), normal(30, 5, seed=3))
    found = measure(x, y)
    assert list(found) == list(METRICS)
    assert found["kid"] == kernel_distance(x.values, y.values)
    assert (found["precision"], found["recall"]) == precision_recall(x.values, y.values)
    assert missing(x, y) == {}
    assert list(measure(x, y, ["recall"])) == ["recall"]
    plain = Features(x.values)
    assert list(measure(plain, y)) == ["frechet_distance", "kid", "precision", "recall"]
    assert list(missing(plain, y)) == ["inception_score"]
    alone = FeatureStatistics.of(y, keep=False)
    assert list(measure(x, alone)) == ["frechet_distance", "inception_score"]
    assert list(missing(x, alone)) == ["kid", "precision", "recall"]
    assert measure(x, FeatureStatistics.of(y)) == found


def test_images_are_measured_through_their_space():
    x, y = normal(20, 1, 2, 3), normal(24, 1, 2, 3, seed=1)
    assert measure_images(x, y, Pixels(), (0, 1), batch_size=7) == measure(
        Features(x.flatten(1)), Features(y.flatten(1))
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet(normal(4, 2), normal(4, 3)), "one shape expected"),
        (lambda: kernel_distance(normal(3, 2), normal(3, 2)), "four or more needed"),
        (lambda: kernel_distance(normal(9, 2), normal(5, 2), 10, 6), "of 2 to 5 features, expected; got 10 of 6"),
        (lambda: inception_score(normal(9, 2)), "two samples or more for each of 10 splits"),
        (lambda: precision_recall(normal(3, 2), normal(9, 2)), "more features than that, expected; got k=3 of 3 and 9"),
        (lambda: measure(Features(normal(4, 2)), Features(normal(4, 2)), ["fid"]), "expected; got 'fid'"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
