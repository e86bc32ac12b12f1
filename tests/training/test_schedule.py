"""Learning rates."""

import math
from itertools import pairwise

import pytest

from scoresde.training import Trainer
from tests.training.runs import ADAM


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", [1, 1, 1]),
        ("linear", [0.9, 0.5, 0.1]),
        ("cosine", [math.cos(math.pi * u / 2) ** 2 for u in (0.1, 0.5, 0.9)]),
        ("inverse_sqrt", [1, (25 / 50) ** 0.5, (25 / 90) ** 0.5]),
    ],
)
def test_decays(decay, expected):
    trainer = Trainer(ADAM, 100, decay=decay, decay_start=25)
    assert [trainer.rate(step) for step in (10, 50, 90)] == pytest.approx(expected)


def test_the_warmup_is_linear_and_meets_the_decay():
    assert [Trainer(ADAM, 100, warmup=4).rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    rates = [Trainer(ADAM, 1000, warmup=50, decay="cosine").rate(step) for step in range(1000)]
    assert max(rates) == rates[49]
    assert all(later < earlier for earlier, later in pairwise(rates[49:]))
