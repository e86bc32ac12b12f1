"""Samples of states as matrices."""

import pytest
import torch

from scoresde.metrics.samples import flatten, flatten_pair
from tests.conftest import normal


def test_states_of_any_rank_become_float64_rows():
    x = normal(3, 2, 2).float()
    assert torch.equal(flatten(x), x.double().reshape(3, 4))
    assert [part.shape for part in flatten_pair(x, normal(5, 2, 2))] == [(3, 4), (5, 4)]


def test_errors_name_the_wrong_sample():
    with pytest.raises(ValueError, match=r"y must have shape \(N, \*\) with at least 2 samples; got \(1, 2\)"):
        flatten_pair(normal(4, 2), normal(1, 2))
    with pytest.raises(
        ValueError, match=r"y must be finite; got NaN or infinity in 4 of 4 samples \(first \[0, 1, 2, 3"
    ):
        flatten_pair(normal(4, 2), normal(4, 2) / 0)
    with pytest.raises(ValueError, match=r"x and y must have states of the same shape; got \(4, 2\) and \(4, 3\)"):
        flatten_pair(normal(4, 2), normal(4, 3))
