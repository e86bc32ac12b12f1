"""Metrics of features against closed forms, torchmetrics, and definitions evaluated by brute force."""

import math

import pytest
import torch
from torch import nn

from scoresde.metrics import moments
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Features, Pixels
from scoresde.metrics.image_quality import (
    METRICS,
    class_accuracy,
    frechet,
    inception_score,
    kernel_distance,
    measure,
    measure_images,
    missing,
    precision_recall,
)
from scoresde.metrics.intervals import wilson
from tests.conftest import normal, seeded


@pytest.mark.parametrize("size", [1, 20])
def test_the_frechet_distance_equals_torchmetrics(size):
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes a second

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
    interval = wilson(round(precision.value * len(x)), len(x))
    assert precision.error == max(interval.high - precision.value, precision.value - interval.low)
    assert precision.error > math.sqrt(precision.value * (1 - precision.value) / len(x))


@pytest.mark.parametrize("span", [(0, 255), (0, 16), (0, 3)])
def test_levels_on_the_boundary_of_a_ball_are_inside_after_scaling(span):
    """Distances of levels are often equal; those of scaled levels are equal up to rounding."""
    levels = [torch.randint(0, 4, (60, 1, 1, 3), generator=seeded(seed)) for seed in (0, 1)]
    shares = [share_within(*(x.flatten(1).tolist() for x in pair), 3) for pair in (levels, levels[::-1])]
    images = (x.float() * (span[1] // 3) for x in levels)
    values = measure_images(*images, Pixels(), span, ("precision", "recall"))
    assert [value.value for value in values.values()] == shares


def test_none_or_all_inside_has_an_error():
    """1/(n + 1) at one standard error, where the standard error of a fraction is 0."""
    x, y = normal(30, 2), normal(40, 2, seed=1)
    for near, far in ((0.0, 1e6), (1.0, 0.0)):
        precision, recall = precision_recall(x + far if near == 0 else y[:30], y)
        assert precision.value == near
        assert precision.error == pytest.approx(1 / 31)
        assert recall.error >= 1 / 41


def test_an_error_without_variation_is_none():
    """Of a single subset, of subsets that hold every sample, and of equal moments, where influences are zero."""
    x, y = normal(30, 4), normal(30, 4, seed=1)
    for options in ({"subsets": 1, "subset_size": 8}, {"subsets": 9, "subset_size": 30}):
        assert kernel_distance(x, y, **options).error is None
    assert kernel_distance(x, torch.cat([y, x]), 9, 30).error > 0
    assert (frechet(x, x).value, frechet(x, x).error) == (0, None)
    assert frechet(x, FeatureStatistics(*moments(x))).error is None


def test_an_error_of_constant_features_is_none():
    """KID of points a and b: (a a/D + 1)^3 + (b b/D + 1)^3 - 2 (a b/D + 1)^3; Frechet distance: |a - b|^2."""
    ones = torch.ones(50, 4)
    for scale, value in ((1, 0), (2, 8 + 125 - 2 * 27)):
        kid, distance = kernel_distance(ones, scale * ones), frechet(ones, scale * ones)
        assert (kid.value, kid.error) == (value, None)
        assert (distance.value, distance.error) == (4 * (scale - 1) ** 2, None)
    score = inception_score(torch.zeros(40, 7))
    assert (score.value, score.error) == (pytest.approx(1), None)


@pytest.mark.parametrize(
    ("offset", "scale", "message"),
    [
        (0, 1e-10, r"KID must be larger than its rounding error, 2e-15; got .*: the kernel cannot tell the features"),
        (1, 1e-9, "KID must be larger than its rounding error, 1e-14"),
        (1e6, 1, r"must be of about unit scale, .*; got a root mean square of 1e\+06: subtract an offset, divide them"),
        (0, 1e10, r"must be of about unit scale, .*; got a root mean square of 9.95e\+09"),
        (127, 75, "must be of about unit scale"),  # grey levels
    ],
)
def test_features_whose_kernel_distance_means_nothing_are_refused(offset, scale, message):
    """The mean of KID was 0 +- 0, or the order of the sixth power of the features."""
    x, y = (offset + scale * normal(50, 4, seed=seed) for seed in (0, 1))
    with pytest.raises(ValueError, match=message):
        kernel_distance(x, y)


def test_the_kernel_distance_of_small_features_is_that_of_a_linear_kernel():
    """(f g/D + 1)^3 = 1 + 3 f g/D + ...: quadratic in the scale."""
    x, y = normal(50, 4), normal(50, 4, seed=1) + 1
    large, small = (kernel_distance(scale * x, scale * y) for scale in (1e-3, 1e-4))
    assert small.value == pytest.approx(large.value / 100, rel=1e-4)
    assert small.error == pytest.approx(large.error / 100, rel=1e-4)


@pytest.mark.parametrize("size", [10.0, 800.0, 1e30])
def test_the_inception_score_of_certain_classes_is_their_number(size):
    """Of splits without some classes too, where a log-probability of -infinity gave NaN."""
    logits = size * torch.eye(4, 6, dtype=torch.float64).repeat_interleave(10, dim=0)
    tolerance = 6 * 2 * math.exp(-10) * 11 if size == 10 else 1e-12
    assert inception_score(logits, splits=1).value == pytest.approx(4, rel=tolerance)
    score = inception_score(logits, splits=10)  # 4 samples each
    assert 2 < score.value < 4
    assert score.error > 0


def test_every_split_of_an_inception_score_has_at_least_two_samples():
    """22 samples in 10 splits of 2 or 3: a single sample has the score 1 whatever its class."""
    logits = 800 * torch.eye(22)
    score = inception_score(logits, splits=10)
    assert score.value == pytest.approx((8 * 2 + 2 * 3) / 10)
    assert score.error == pytest.approx(math.sqrt((8 * 0.2**2 + 2 * 0.8**2) / 9))


def test_the_kernel_distance_of_pixels_is_of_order_one():
    """For grey levels 0 .. 255 it was of the order of 10^10: the kernel assumes features of unit scale."""
    x, y = (torch.randint(0, 256, (40, 3, 8, 8), generator=seeded(seed)).float() for seed in (0, 1))
    same = measure_images(x, y, Pixels(), (0, 255), ["kid"])["kid"]
    assert abs(same.value) < 0.05
    darker = measure_images(x, y / 2, Pixels(), (0, 255), ["kid"])["kid"]
    assert darker.value == pytest.approx(unbiased(2 * x.flatten(1) / 255 - 1, y.flatten(1) / 255 - 1), abs=0.1)
    assert darker.value > 0.3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", METRICS)
def test_features_that_are_not_finite_are_refused_with_their_number_and_set(metric, bad):
    good = Features(normal(40, 3), normal(40, 5, seed=1))
    values, logits = good.values.clone(), good.logits.clone()
    values[[3, 7], 1] = bad
    logits[5, 0] = bad
    message = r"the features of {} must be finite; got NaN or infinity in 2 of 40 samples \(first \[3, 7\]\)"
    for name, pair in (("the samples", (Features(values), good)), ("the data", (good, Features(values)))):
        with pytest.raises(ValueError, match=message.format(name)):
            measure(*pair, [metric])
    with pytest.raises(ValueError, match="the logits of the samples must be finite; got NaN or infinity in 1 of 40"):
        measure(Features(good.values, logits), good, [metric])
    with pytest.raises(ValueError, match="must be finite; got NaN or infinity in 2 of 40"):
        FeatureStatistics.of(Features(values))


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
    x, y = 0.5 + 0.2 * normal(20, 1, 2, 3), 0.5 + 0.2 * normal(24, 1, 2, 3, seed=1)
    expected = measure(*(Features((2 * part.float() - 1).flatten(1)) for part in (x, y)))
    assert measure_images(x, y, Pixels(), (0, 1), batch_size=7) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet(normal(4, 2), normal(4, 3)), "states of the same shape"),
        (lambda: kernel_distance(normal(3, 2), normal(9, 2)), "at least 4 samples each, .* got 3 and 9: add samples"),
        (lambda: kernel_distance(normal(9, 2), normal(9, 2), 10, 1), "of 2 to 9 samples for KID; got 10 subsets of 1"),
        (lambda: kernel_distance(normal(9, 2), normal(5, 2), 10, 6), "of 2 to 5 samples for KID; got 10 subsets of 6"),
        (lambda: frechet(normal(4, 2), normal(4, 2) * math.nan), "y must be finite; got NaN or infinity in 4 of 4"),
        (lambda: kernel_distance(normal(9, 2) / 0, normal(9, 2)), "x must be finite; got NaN or infinity in 9 of 9"),
        (lambda: inception_score(normal(20, 2) * math.nan), "logits must be finite; got NaN or infinity in 20 of 20"),
        (lambda: inception_score(normal(9, 2)), "N >= 2 for each of 10 splits"),
        (lambda: precision_recall(normal(3, 2), normal(9, 2)), "number of samples; got neighbours=3 for 3 and 9"),
        (lambda: measure(Features(normal(4, 2)), Features(normal(4, 2)), ["fid"]), "got 'fid'"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_class_accuracy_is_the_share_of_largest_logits_with_its_interval():
    logits = torch.eye(4)[[0, 1, 2, 3, 0]] + 0.1
    accuracy = class_accuracy(logits, torch.tensor([0, 1, 2, 0, -1]))
    assert (accuracy.metric, accuracy.value) == ("class_accuracy", 0.75)
    interval = wilson(3, 4)
    assert accuracy.error == pytest.approx(max(interval.high - 0.75, 0.75 - interval.low))
    assert class_accuracy(logits, torch.tensor([0, 1, 2, 3, 0])).error == pytest.approx(1 - wilson(5, 5).low)
    for labels in (torch.tensor([0, 1, 2, 4, 0]), torch.full((5,), -1), torch.tensor([0, -2, 1, 1, 1])):
        with pytest.raises(ValueError, match=r"labels must lie in 0 \.\. 3, or be -1 \(no class\) for some"):
            class_accuracy(logits, labels)
    for labels in (torch.tensor([0, 1]), torch.zeros(5)):
        with pytest.raises(ValueError, match=r"expected logits \(N, K\) and N integer labels"):
            class_accuracy(logits, labels)
    with pytest.raises(ValueError, match="logits must be finite"):
        class_accuracy(logits * math.nan, torch.zeros(5, dtype=torch.int64))
