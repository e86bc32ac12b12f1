"""Recall at k of retrieval: ranks, ties, and chance."""

import pytest
import torch

from scoresde.metrics import ranks, retrieval
from tests.conftest import normal


def test_the_share_of_partners_among_the_most_similar():
    similarities = torch.tensor(
        [[0.9, 0.1, 0.2, 0.0], [0.5, 0.4, 0.6, 0.1], [0.0, 0.2, 0.3, 0.4], [0.7, 0.8, 0.9, 0.6]]
    )
    assert ranks(similarities).tolist() == [1, 3, 2, 4]
    assert [retrieval(similarities, k).value for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_a_constant_similarity_retrieves_nothing_and_a_random_one_by_chance():
    assert retrieval(torch.zeros(10, 10), 9).value == 0.0
    found = retrieval(normal(2000, 2000), 100, z=4.0)
    assert found.low < 0.05 < found.high


@pytest.mark.parametrize(
    ("similarities", "k", "message"),
    [
        (torch.zeros(2, 3), 1, r"square matrix \(N, N\); got shape \(2, 3\)"),
        (torch.full((2, 2), torch.nan), 1, "similarities"),
        (torch.zeros(2, 2), 0, "k must be"),
    ],
)
def test_what_is_not_a_similarity_of_pairs_is_refused(similarities, k, message):
    with pytest.raises(ValueError, match=message):
        retrieval(similarities, k)
