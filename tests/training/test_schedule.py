"""Learning rates."""

from itertools import pairwise

import pytest

from scoresde.training.schedule import rate


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("none", [1, 1, 1]), ("linear", [0.9, 0.5, 0.1]), ("inverse_sqrt", [1, (25 / 50) ** 0.5, (25 / 90) ** 0.5])],
)
def test_decays(decay, expected):
    found = [rate(step, 100, 0, decay, decay_start=25) for step in (10, 50, 90)]
    assert found == pytest.approx(expected)


def test_the_rise_meets_the_decay():
    rates = [rate(step, 1000, 50, "cosine", 1) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 50, rel=1e-3)
    assert max(rates) == rates[49]
    assert all(later < earlier for earlier, later in pairwise(rates[49:]))
