"""Scores against hand computations and drawn labels: they are proper, calibrated, and a temperature is recovered."""

import math

import pytest
import torch

from scoresde.metrics import accuracy, brier_score, calibration, confusion, fit_temperature, log_score
from tests.conftest import close, f64, normal, seeded

THREE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.25, 0.25, 0.5], [0.6, 0.3, 0.1]], dtype=torch.float64).log()
LABELS = torch.tensor([0, 2, 2, 0])


def drawn(n=2000, classes=4, sharpness=1.0):
    """Log-posteriors and labels drawn from them."""
    truth = (sharpness * normal(n, classes)).log_softmax(dim=1)
    return truth, torch.multinomial(truth.exp(), 1, generator=seeded(1))[:, 0]


def test_scores_by_hand():
    assert accuracy(THREE, LABELS).value == 0.75
    assert accuracy(THREE, LABELS).low == pytest.approx(0.3006, abs=1e-3)  # Wilson, 95%
    values = [-math.log(p) for p in (0.7, 0.4, 0.5, 0.6)]
    mean, stderr = log_score(THREE, LABELS)
    assert mean == pytest.approx(sum(values) / 4)
    assert stderr == pytest.approx(float(f64(*values).std()) / 2)
    squares = [0.3**2 + 0.2**2 + 0.1**2, 0.1**2 + 0.5**2 + 0.6**2, 0.25**2 + 0.25**2 + 0.5**2, 0.4**2 + 0.3**2 + 0.1**2]
    assert brier_score(THREE, LABELS)[0] == pytest.approx(sum(squares) / 4)
    assert confusion(THREE, LABELS).tolist() == [[2, 0, 0], [0, 0, 0], [0, 1, 1]]


def test_the_reliability_table_by_hand():
    """Confidences 0.7, 0.5, 0.5, 0.6; the second decision is wrong."""
    result = calibration(THREE, LABELS, bins=5)
    assert [(b.low, b.high, b.count) for b in result.bins] == [(0.4, 0.6, 3), (0.6, 0.8, 1)]
    assert [b.accuracy.value for b in result.bins] == pytest.approx([2 / 3, 1])
    assert [b.confidence for b in result.bins] == pytest.approx([1.6 / 3, 0.7])
    assert result.ece == pytest.approx((abs(2 - 1.6) + abs(1 - 0.7)) / 4)
    assert result.interval is None


def test_true_probabilities_are_within_the_noise_floor_and_others_are_not():
    truth, labels = drawn()
    result = calibration(truth, labels)
    assert result.floor / 3 < result.ece < result.floor_high
    assert result.interval.low < result.ece < result.interval.high
    sharp = calibration((2.5 * truth).log_softmax(dim=1), labels)
    assert sharp.ece > 3 * sharp.floor_high
    assert sharp.interval.low > sharp.floor_high


def test_the_noise_floor_is_the_mean_over_labels_drawn_from_the_probabilities():
    truth, _ = drawn(100)
    generator = seeded(5)
    sampled = [torch.multinomial(truth.exp(), 1, generator=generator)[:, 0] for _ in range(60)]
    values = f64(*[calibration(truth, labels).ece for labels in sampled])
    floor = calibration(truth, sampled[0]).floor
    assert abs(float(values.mean()) - floor) < 4 * float(values.std()) * (1 / 60 + 1 / 200) ** 0.5


def test_proper_scores_are_least_for_the_true_probabilities():
    truth, labels = drawn()
    for score in (log_score, brier_score):
        best, stderr = score(truth, labels)
        for temperature in (0.3, 3.0):
            assert score((truth / temperature).log_softmax(dim=1), labels)[0] > best + 3 * stderr


@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
def test_the_temperature_is_recovered(temperature):
    truth, labels = drawn()
    fitted = fit_temperature((truth * temperature).log_softmax(dim=1), labels)
    assert fitted == pytest.approx(temperature, rel=0.15)
    scores = [
        log_score((truth * temperature / t).log_softmax(dim=1), labels)[0]
        for t in (0.98, 1, 1.02)
        for t in [t * fitted]
    ]
    assert scores[1] <= min(scores)


def test_a_perfect_classification_has_no_error_and_the_least_temperature():
    certain = torch.full((10, 3), -80.0, dtype=torch.float64)
    certain[torch.arange(10), torch.arange(10) % 3] = 0.0
    labels = torch.arange(10) % 3
    assert fit_temperature(certain, labels) < 10
    result = calibration(certain.log_softmax(dim=1), labels)
    assert (result.ece, result.floor, result.interval) == (0.0, 0.0, None)
    assert fit_temperature((certain / 80).log_softmax(dim=1), labels) == pytest.approx(1e-3, abs=1e-3)


def test_one_sample_has_no_error():
    assert log_score(THREE[:1], LABELS[:1]) == (pytest.approx(-math.log(0.7)), None)
    close(confusion(THREE[:1], LABELS[:1]).sum(), torch.tensor(1))


WRONG = {
    "shape": (ValueError, (THREE[0], LABELS), r"log_posterior must be \(N, K\)"),
    "labels": (ValueError, (THREE, LABELS[:2]), r"got \(4, 3\) and \(2,\)"),
    "none": (ValueError, (THREE[:0], LABELS[:0]), "N >= 1"),
    "floating": (TypeError, (THREE, LABELS.float()), "labels must be integers; got torch.float32"),
    "range": (ValueError, (THREE, LABELS + 1), "labels must lie in 0 .. 2; got 1 to 3"),
    "null": (ValueError, (THREE, LABELS - 1), "labels must lie in 0 .. 2; got -1 to 1"),
    "nan": (ValueError, (THREE * math.nan, LABELS), "log_posterior must not be NaN; got 4 of 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused(name):
    error, arguments, message = WRONG[name]
    for function in (accuracy, log_score, brier_score, confusion, calibration, fit_temperature):
        with pytest.raises(error, match=message):
            function(*arguments)


def test_infinite_log_posteriors_have_an_infinite_score_and_no_temperature():
    sure = f64(0.0, -math.inf)[None].expand(2, 2)
    assert log_score(sure, torch.tensor([0, 1]))[0] == math.inf
    with pytest.raises(ValueError, match="log_posterior must be finite to fit a temperature"):
        fit_temperature(sure, torch.tensor([0, 1]))
