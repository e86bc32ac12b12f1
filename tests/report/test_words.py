"""Plain words: figures as they should be read, and what is said of each kind of data."""

import pytest

from scoresde.report.facts import Facts
from scoresde.report.words import DASH, data_name, duration, likelihood_meaning, number, path, pm, state
from tests.report.runs import configuration, likelihood_row


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, DASH),
        (float("nan"), DASH),
        (1234567, "1,234,567"),
        (15234.5, "15,234"),
        (-3, "\N{MINUS SIGN}3"),
        (0.012345, "0.01235"),
    ],
)
def test_numbers(value, expected):
    assert number(value) == expected


def test_figures_have_two_digits_of_their_error():
    assert pm(1.23456, 0.0123) == "1.235 ± 0.012"
    assert pm(-1.0, 0.25) == "\N{MINUS SIGN}1.00 ± 0.25"
    assert pm(1.5) == "1.5000"


def test_seconds_as_one_says_them():
    assert [duration(s) for s in (2.5, 600, 9000)] == ["2.5 s", "10 min", "2.5 h"]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 8, 8), "grey images of 8 × 8 pixels with 17 levels"),  # noqa: RUF001
        ((3, 4, 6), "colour images of 4 × 6 pixels"),  # noqa: RUF001
        ((2,), "points of the plane"),
        ((5,), "vectors of 5 numbers"),
        ((2, 16), "series of 16 values in 2 channels"),
        ((2, 3, 4, 5), "arrays of 2 × 3 × 4 × 5 numbers"),  # noqa: RUF001
    ],
)
def test_what_a_sample_is(tmp_path, shape, expected):
    assert state(Facts(tmp_path, configuration(shape))).replace("\N{NO-BREAK SPACE}", " ") == expected


def test_what_was_trained_on_what(tmp_path):
    facts = Facts(tmp_path, configuration((2,)))
    assert data_name(facts) == "Toy2D (moons)"
    assert "variance preserving" in path(facts)
    other = Facts(tmp_path, configuration((2,), sde={"_target_": "mine.Path"}))
    assert path(other) == "the noise follows Path"


def test_a_likelihood_of_training_data_is_called_one(tmp_path):
    facts = Facts(tmp_path, configuration((1, 8, 8)))
    assert "has not been trained on" in likelihood_meaning(facts, likelihood_row())
    assert "that the model has been trained on" in likelihood_meaning(facts, likelihood_row(split="train"))
    of_validation = likelihood_meaning(facts, likelihood_row(split="validation"))
    assert "one pixel value of images of the validation data, if" in of_validation
    assert "trained on" not in of_validation
