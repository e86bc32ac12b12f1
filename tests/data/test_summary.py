"""Statistics in one pass agree with NumPy's on the whole array; levels, duplicates and labels are counted."""

import numpy as np
import pytest
import torch

from scoresde.data import Digits, Toy2D, describe, summary
from scoresde.data.items import Items
from scoresde.data.summary import Moments, moments
from tests.conftest import normal


@pytest.mark.parametrize("shape", [(4,), (3, 5), (3, 4, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_moments_are_those_of_numpy(shape, block, monkeypatch):
    monkeypatch.setattr(summary, "BLOCK", block * int(np.prod(shape)))
    x = (1e6 + normal(53, *shape)).float()
    statistics, array = describe(list(x)), x.double().numpy()
    axes = (0, *range(2, array.ndim))
    np.testing.assert_allclose(statistics.mean, array.mean(axis=axes), rtol=1e-14)
    np.testing.assert_allclose(statistics.std, array.std(axis=axes), rtol=1e-9)  # a sum of squares loses all digits
    assert (statistics.min, statistics.max) == (array.min(), array.max())
    assert (statistics.count, statistics.examined, statistics.shape) == (53, 53, shape)
    assert statistics.dtype == "float32"
    per_dimension = moments(list(x), per_channel=False)
    np.testing.assert_allclose(per_dimension.mean, array.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(per_dimension.std, array.std(axis=0), rtol=1e-9)


def test_blocks_of_unequal_sizes():
    total, x = Moments(), 1e8 + normal(1000, 2)
    for part in x.split([1, 500, 2, 497]):
        total.update(part)
    np.testing.assert_allclose(total.std, x.numpy().std(axis=0), rtol=1e-7)


def test_levels_are_counted_if_all_values_are_whole_numbers(monkeypatch):
    fit = describe(Digits("fit", labels=True))
    assert (fit.integers, fit.levels, fit.min, fit.max, fit.duplicates) == (True, 17, 0, 16, 0)
    assert fit.classes == {"label": dict(enumerate(np.bincount(Digits("fit", labels=True).labels).tolist()))}
    within = describe(Digits("validation"), others={"fit": fit, "test": describe(Digits("test"))})
    assert within.shared == {"fit": 200, "test": 0}
    assert (describe(Toy2D(n=500)).integers, describe(Toy2D(n=500)).levels) == (False, None)
    monkeypatch.setattr(summary, "BLOCK", 1000)
    whole = list(torch.arange(70_000.0).reshape(-1, 1000))
    assert (describe(whole).integers, describe(whole).levels) == (True, None)
    assert describe(whole[:60]).levels == 60_000
    assert not describe([*whole, torch.full((1000,), 0.5)]).integers


def test_duplicates_within_and_across_splits(monkeypatch):
    monkeypatch.setattr(summary, "BLOCK", 4)
    x = torch.arange(20.0).reshape(10, 2)
    train = describe([*x[:6], x[2], x[2], torch.tensor([-0.0, 1.0])])
    assert train.duplicates == 3  # -0.0 is 0.0
    test = describe([x[2], x[2], x[8], x[9], x[0] + 1e-6], others={"train": train})
    assert (test.shared, test.duplicates) == ({"train": 2}, 1)


def test_only_integer_labels_are_counted():
    pairs = [(torch.zeros(2), torch.ones(3)), (torch.ones(2), torch.tensor(0.5)), (torch.ones(2), torch.tensor(4))]
    assert describe(pairs).classes == {"label": {4: 1}}


def test_classes_are_counted_for_each_condition_also_those_that_do_not_occur():
    labels = {"kind": torch.tensor([0, 2, 2, -1]), "part": torch.tensor([7, 7, 9, 9]), "vector": torch.ones(4, 2)}
    items = Items(normal(4, 3), labels, class_names={"kind": ["a", "b", "c"]})
    assert describe(items).classes == {"kind": {-1: 1, 0: 1, 1: 0, 2: 2}, "part": {7: 2, 9: 2}}


def test_items_that_are_not_finite_are_left_out():
    x = normal(9, 3)
    x[4, 1], x[8, 0] = float("nan"), float("inf")
    statistics, finite = describe(list(x)), x[[0, 1, 2, 3, 5, 6, 7]].numpy()
    assert (statistics.not_finite, statistics.count) == (2, 9)
    np.testing.assert_allclose(statistics.mean, finite.mean(axis=0), rtol=1e-12)
    assert (statistics.min, statistics.max) == (finite.min(), finite.max())


def test_a_limit_spreads_over_the_dataset():
    x = torch.arange(100.0)[:, None]
    statistics = describe(list(x), limit=4)
    assert (statistics.count, statistics.examined, statistics.min, statistics.max) == (100, 4, 0, 75)
    assert statistics.mean == (37.5,)
    assert describe(list(x), limit=1000).examined == 100


@pytest.mark.parametrize(
    ("items", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "the dataset is empty"),
        ([torch.zeros(2)], {"limit": 0}, ValueError, "limit=0"),
        ([torch.zeros(2), torch.zeros(3)], {}, ValueError, r"the same shape; got \(2,\) and \(3,\): crop or pad them"),
        (
            [torch.full((2,), float("nan"))],
            {},
            ValueError,
            "must have a finite state; got NaN or infinity in each of 1 items",
        ),
        ([[1, 2]], {}, TypeError, r"must be a tensor or \(tensor, condition\); got list"),
        ([np.zeros(2)], {}, TypeError, "got ndarray"),
    ],
)
def test_datasets_that_cannot_be_described(items, arguments, error, message):
    with pytest.raises(error, match=message):
        describe(items, **arguments)
