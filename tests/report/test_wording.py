"""Numbers and nouns as the page writes them."""

import pytest

from scoresde.report.run_files import RunFiles
from scoresde.report.wording import DASH, duration, number, states, with_error
from tests.report.runs import configuration


def test_numbers_have_a_few_digits_and_separated_thousands():
    values = [None, float("nan"), 1234567, 15234.5, -3, 0.012345]
    texts = [DASH, DASH, "1,234,567", "15,234", "\N{MINUS SIGN}3", "0.01235"]
    assert [number(value) for value in values] == texts


def test_figures_have_two_digits_of_their_error():
    assert with_error(1.23456, 0.0123) == "1.235 ± 0.012"
    assert with_error(-1.0, 0.25, signed=True) == "\N{MINUS SIGN}1.00 ± 0.25"
    assert with_error(1.5, signed=True) == "+1.5000"


def test_times_are_in_seconds_minutes_or_hours():
    assert [duration(s) for s in (2.5, 600, 9000, None)] == ["2.5 s", "10 min", "2.5 h", DASH]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 8, 8), "grey images of 8 × 8 pixels with 17 levels"),  # noqa: RUF001
        ((3, 4, 6), "colour images of 4 × 6 pixels"),  # noqa: RUF001
        ((2,), "points in the plane"),
        ((5,), "vectors of 5 numbers"),
        ((2, 16), "series of 16 values in 2 channels"),
        ((2, 3, 4, 5), "arrays of 2 × 3 × 4 × 5 numbers"),  # noqa: RUF001
    ],
)
def test_states_are_described_by_their_shape(tmp_path, shape, expected):
    assert states(RunFiles(tmp_path, configuration(shape))).replace("\N{NO-BREAK SPACE}", " ") == expected
