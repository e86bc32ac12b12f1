"""The benchmark of texts: shares of pictures with the right tone, and that are near to their own real picture."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import text as benchmark  # noqa: E402

from scoresde.metrics.features import Features  # noqa: E402
from scoresde.metrics.intervals import wilson  # noqa: E402
from tests.conftest import normal  # noqa: E402


def test_own_pictures_are_nearest_and_permuted_ones_are_not():
    truth = normal(7, 3, 4, 4)
    nearer, nearest = benchmark.nearness(truth + 1e-3 * normal(7, 3, 4, 4, seed=1), truth)
    assert (nearer.value, nearest.value) == (1.0, 1.0)
    assert benchmark.nearness(truth.roll(1, 0), truth)[1].value == 0.0
    two = benchmark.nearness(truth.repeat_interleave(2, 0), truth)
    assert (two[0].value, two[1]) == (1.0, wilson(14, 14, 1.96))


def test_independent_pictures_are_nearer_in_half_of_the_pairs_and_ties_count_half():
    nearer, nearest = benchmark.nearness(normal(200, 2), normal(200, 2, seed=1))
    assert nearer.low < 0.5 < nearer.high
    assert nearer.high - nearer.low < 0.12
    assert nearest.value < 0.05
    assert benchmark.nearness(torch.zeros(6, 2), torch.ones(6, 2))[0].value == 0.5


def test_agreement_counts_the_classes_that_a_classifier_sees():
    logits = torch.eye(5)[[0, 1, 2, 2]]
    interval = benchmark.agreement(
        lambda images, span: Features(images, logits), torch.zeros(4, 2), torch.tensor([0, 1, 2, 3])
    )
    assert interval == wilson(3, 4, 1.96)
