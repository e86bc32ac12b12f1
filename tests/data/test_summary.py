"""Statistics in one pass: NumPy's on the whole array, levels and duplicates that were put there."""

import numpy as np
import pytest
import torch

from scoresde.data import CIFAR10, Digits, Toy2D, describe, summary
from scoresde.data.summary import Moments, moments
from tests.conftest import normal
from tests.data.files import contents, write_files


@pytest.mark.parametrize("shape", [(4,), (3, 5), (3, 4, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("block", [1, 7, 100, 10**6])
def test_moments_are_those_of_numpy(shape, block, monkeypatch):
    monkeypatch.setattr(summary, "BLOCK", block * int(np.prod(shape)))
    x = (1e6 + normal(53, *shape)).float()
    found, array = describe(list(x)), x.double().numpy()
    axes = (0, *range(2, array.ndim))
    np.testing.assert_allclose(found.mean, array.mean(axis=axes), rtol=1e-14)
    np.testing.assert_allclose(found.std, array.std(axis=axes), rtol=1e-9)  # a sum of squares would have no digit
    assert (found.min, found.max) == (array.min(), array.max())
    assert (found.count, found.examined, found.shape, found.dtype) == (53, 53, shape, "float32")
    per_dimension = moments(list(x), per_channel=False)
    np.testing.assert_allclose(per_dimension.mean, array.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(per_dimension.std, array.std(axis=0), rtol=1e-9)


def test_blocks_of_unequal_sizes():
    found, x = Moments(), 1e8 + normal(1000, 2)
    for part in x.split([1, 500, 2, 497]):
        found.update(part)
    np.testing.assert_allclose(found.std, x.numpy().std(axis=0), rtol=1e-7)
    assert found.count == 1000


def test_digits_are_seventeen_levels():
    found = describe(Digits("fit"))
    assert (found.integers, found.levels, found.min, found.max) == (True, 17, 0, 16)
    assert found.duplicates == 0
    within = describe(Digits("validation"), others={"fit": found, "test": describe(Digits("test"))})
    assert within.shared == {"fit": 200, "test": 0}


def test_continuous_values_have_no_levels():
    found = describe(Toy2D(n=500))
    assert (found.integers, found.levels) == (False, None)
    whole = torch.arange(70_000.0).reshape(-1, 1000)
    assert (describe(list(whole)).integers, describe(list(whole)).levels) == (True, None)
    assert describe(list(whole[:60])).levels == 60_000


def test_duplicates_within_and_across_splits():
    x = torch.arange(20.0).reshape(10, 2)
    train = describe([*x[:6], x[2], x[2], torch.tensor([-0.0, 1.0])])
    assert train.duplicates == 3  # -0.0 is 0.0
    test = describe([x[2], x[2], x[8], x[9], x[0] + 1e-6], others={"train": train})
    assert (test.shared, test.duplicates) == ({"train": 2}, 1)


def test_labels_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "records", 30)
    write_files(tmp_path, contents(n=30))
    dataset = CIFAR10(tmp_path, labels=True)
    expected = np.bincount(dataset.classes.numpy(), minlength=10)
    assert describe(dataset).classes == dict(enumerate(expected.tolist()))
    assert describe([(torch.zeros(2), torch.ones(3)), (torch.ones(2), torch.tensor(0.5))]).classes == {}


def test_items_that_are_not_finite_are_left_out():
    x = normal(9, 3)
    x[4, 1], x[8, 0] = float("nan"), float("inf")
    found, kept = describe(list(x)), x[[0, 1, 2, 3, 5, 6, 7]].numpy()
    assert (found.not_finite, found.count) == (2, 9)
    np.testing.assert_allclose(found.mean, kept.mean(axis=0), rtol=1e-12)
    assert (found.min, found.max) == (kept.min(), kept.max())


def test_a_limit_spreads_over_the_dataset():
    x = torch.arange(100.0)[:, None]
    found = describe(list(x), limit=4)
    assert (found.count, found.examined, found.min, found.max) == (100, 4, 0, 75)
    assert found.mean == (37.5,)
    assert describe(list(x), limit=1000).examined == 100


@pytest.mark.parametrize(
    ("items", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "one item or more, and limit >= 1, expected; got 0 items"),
        ([torch.zeros(2)], {"limit": 0}, ValueError, "limit=0"),
        ([torch.zeros(2), torch.zeros(3)], {}, ValueError, r"item 0 is \(2,\), item 1 \(3,\): crop or pad"),
        ([torch.full((2,), float("nan"))], {}, ValueError, "finite values or more expected; got none among 1"),
        ([[1, 2]], {}, TypeError, r"items that are a tensor, or \(tensor, condition\), expected; got list"),
        ([np.zeros(2)], {}, TypeError, "got ndarray"),
    ],
)
def test_refuses_what_it_cannot_describe(items, arguments, error, message):
    with pytest.raises(error, match=message):
        describe(items, **arguments)
