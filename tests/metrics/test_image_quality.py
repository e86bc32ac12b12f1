"""Metrics of features against closed forms, torchmetrics, and definitions evaluated by brute force."""

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
from tests.conftest import normal, seeded


@pytest.mark.parametrize("size", [1, 20])
def test_the_frechet_distance_equals_torchmetrics(size):
    x, y = 1.2 * normal(60, size), normal(80, size, seed=1) + 0.3
    network = nn.Identity()
    network.num_features = size
    metric = FrechetInceptionDistance(network)
    metric.update(x, real=False)
    metric.update(y, real=True)
    figure = frechet(x, y)
    assert figure.value == pytest.approx(float(metric.compute()), rel=1e-9)
    assert figure.kind == "standard error"
    fixed = frechet(x, FeatureStatistics(*moments(y)))
    assert fixed.value == pytest.approx(figure.value)
    assert 0 < fixed.error < figure.error  # the statistics count as exact


def cubic(x, y):
    return (x @ y.mT / x.shape[1] + 1) ** 3


def unbiased(x, y):
    xx, yy, n, m = cubic(x, x), cubic(y, y), len(x), len(y)
    within_sets = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1)) + (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return float(within_sets - 2 * cubic(x, y).mean())


def test_kid_is_the_unbiased_discrepancy_of_a_cubic_kernel():
    x, y = normal(30, 4), normal(30, 4, seed=1) + 0.5
    whole = kernel_distance(x, y, subsets=1, subset_size=30)
    assert whole.value == pytest.approx(unbiased(x, y))
    assert whole.kind == "standard deviation over 1 subsets of 30"
    many = kernel_distance(x, y, subsets=800)  # the mean over subsets is unbiased
    assert many.kind.endswith("800 subsets of 15")
    assert abs(many.value - unbiased(x, y)) < 5 * many.error / math.sqrt(800)


def test_draws_depend_on_the_seed_and_do_not_change_the_global_generator():
    x, y = normal(40, 3), normal(40, 3, seed=1)
    state = torch.get_rng_state()
    first, again, other = (kernel_distance(x, y, 5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_the_inception_score_is_largest_for_certain_and_balanced_classes():
    certain = 100 * torch.eye(10)[torch.arange(200) % 10]
    single = inception_score(certain, splits=1)
    assert (single.value, single.error) == (pytest.approx(10, rel=1e-6), None)
    assert inception_score(torch.zeros(40, 7)).value == pytest.approx(1)
    logits = normal(50, 4)
    p = logits.softmax(dim=1)
    expected = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp()
    assert inception_score(logits + 3, splits=1).value == pytest.approx(float(expected))


def share_within(x, y, k):
    """The fraction of x inside a ball of y, from the definition."""
    radii = [sorted(math.dist(a, b) for j, b in enumerate(y) if j != i)[k - 1] for i, a in enumerate(y)]
    return sum(any(math.dist(a, b) <= r for b, r in zip(y, radii, strict=True)) for a in x) / len(x)


@pytest.mark.parametrize(("k", "chunk"), [(1, 7), (3, 1024)])
@pytest.mark.parametrize("integers", [False, True])
def test_precision_and_recall_equal_their_definition(k, chunk, integers):
    """Distances of integers are exact: points on the boundary of a ball belong to it, and points are repeated."""
    x, y = 0.7 * normal(45, 2), normal(38, 2, seed=1) + 1.5
    if integers:
        x, y = (torch.randint(0, 4, (60, 3), generator=seeded(seed)).double() + 1e4 for seed in (0, 1))
    precision, recall = precision_recall(x, y, k, chunk)
    assert precision.value == share_within(x.tolist(), y.tolist(), k)
    assert recall.value == share_within(y.tolist(), x.tolist(), k)
    assert 0 < recall.value < 1
    assert precision.error == pytest.approx(math.sqrt(precision.value * (1 - precision.value) / len(x)))


def test_measure_computes_what_the_features_allow_and_reports_what_is_missing():
    x, y = Features(normal(40, 3), normal(40, 5, seed=2)), Features(normal(30, 3, seed=1), normal(30, 5, seed=3))
    figures = measure(x, y)
    assert list(figures) == list(METRICS)
    assert figures["kid"] == kernel_distance(x.values, y.values)
    assert (figures["precision"], figures["recall"]) == precision_recall(x.values, y.values)
    assert measure(x, FeatureStatistics.of(y)) == figures
    assert list(measure(x, y, ["recall"])) == ["recall"]
    for samples, data, names in (
        (x, y, []),
        (Features(x.values), y, ["inception_score"]),
        (x, FeatureStatistics.of(y, keep=False), ["kid", "precision", "recall"]),
    ):
        assert list(missing(samples, data)) == names
        assert list(measure(samples, data)) == [name for name in METRICS if name not in names]


def test_images_are_measured_in_their_feature_space():
    x, y = normal(20, 1, 2, 3), normal(24, 1, 2, 3, seed=1)
    expected = measure(Features(x.flatten(1)), Features(y.flatten(1)))
    assert measure_images(x, y, Pixels(), (0, 1), batch_size=7) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet(normal(4, 2), normal(4, 3)), "states of the same shape"),
        (lambda: kernel_distance(normal(3, 2), normal(3, 2)), "of 2 to 3 samples for KID; got 100 subsets of 1"),
        (lambda: kernel_distance(normal(9, 2), normal(5, 2), 10, 6), "of 2 to 5 samples for KID; got 10 subsets of 6"),
        (lambda: inception_score(normal(9, 2)), "N >= 2 for each of 10 splits"),
        (lambda: precision_recall(normal(3, 2), normal(9, 2)), "neighbours < number of samples; got 3 with 3 and 9"),
        (lambda: measure(Features(normal(4, 2)), Features(normal(4, 2)), ["fid"]), "got 'fid'"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
