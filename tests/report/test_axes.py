"""Axes: places in proportion, round numbers inside."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoresde.report.axes import Axis, is_wide, span, steps, text

numbers = st.floats(-1e6, 1e6).map(lambda x: round(x, 6))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (1500, "1,500"), (-2.5, "\N{MINUS SIGN}2.5"), (0.001, "0.001"), (1e-5, "10⁻⁵"), (2.5e-6, "2.5·10⁻⁶")],
)
def test_numbers_as_an_axis_has_them(value, expected):
    assert text(value) == expected


def test_places_are_in_proportion():
    axis = Axis(0, 10, 100, 200)
    assert [axis(v) for v in (0, 2.5, 10, 20, -1)] == [100, 125, 200, 200, 100]
    log = Axis(1, 100, 0, 2, log=True)
    assert [log(v) for v in (1, 10, 100)] == pytest.approx([0, 1, 2])


@given(numbers, st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low, width):
    ticks = Axis(low, low + width, 0, 1).ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-6 * width <= tick <= low + width + 1e-6 * width for tick in ticks)
    step = ticks[1] - ticks[0]
    assert step / 10 ** math.floor(math.log10(step) + 1e-6) == pytest.approx(
        min((1, 2, 2.5, 5, 10), key=lambda r: abs(r - step / 10 ** math.floor(math.log10(step) + 1e-6))), rel=1e-3
    )


@given(st.floats(1e-6, 1e6), st.floats(1.2, 1e9))
def test_ticks_of_a_logarithmic_axis_are_inside(low, ratio):
    axis = Axis(low, low * ratio, 0, 1, log=True)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low * (1 - 1e-6) <= tick <= low * ratio * (1 + 1e-6) for tick in ticks)


def test_steps_are_multiples():
    assert steps(0.3, 2.4, 4) == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_an_axis_shows_all_finite_values():
    assert span([1.0, math.nan, 3.0, math.inf], margin=0.5) == (0.0, 4.0)
    low, high = span([0.0, 1.0, 100.0], log=True)
    assert 0 < low < 1
    assert high > 100
    assert span([]) == (0.0, 1.0)
    assert span([2.0]) == (1.0, 3.0)


def test_positive_values_far_apart_want_a_logarithmic_axis():
    assert is_wide([1.0, 30.0])
    assert not is_wide([1.0, 10.0])
    assert not is_wide([-1.0, 30.0])
    assert not is_wide([])
