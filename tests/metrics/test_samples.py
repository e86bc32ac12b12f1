"""Samples of states as matrices."""

import pytest
import torch

from scoresde.metrics.samples import both, everything, flatten
from tests.conftest import normal


def test_states_of_any_rank_become_rows_in_float64():
    x = normal(3, 2, 2).float()
    assert torch.equal(flatten(x), x.double().reshape(3, 4))
    assert [part.shape for part in both(x, normal(5, 2, 2))] == [(3, 4), (5, 4)]
    assert everything(x).tolist() == [0, 1, 2]


def test_the_sample_that_is_wrong_is_named():
    with pytest.raises(ValueError, match=r"y as two samples or more, \(N, \*\), expected; got shape \(1, 2\)"):
        both(normal(4, 2), normal(1, 2))
    with pytest.raises(ValueError, match=r"one shape expected; got \(4, 2\) and \(4, 3\)"):
        both(normal(4, 2), normal(4, 3))
