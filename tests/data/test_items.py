"""Splits: disjoint, complete, of the sizes asked for, and always the same."""

import numpy as np
import pytest

from scoresde.data.items import Items, split_indices


def parts(n, validation=0.1, test=0.2, seed=0):
    return [split_indices(n, name, validation, test, seed, "x").tolist() for name in ("train", "validation", "test")]


@pytest.mark.parametrize("seed", [0, 7, None])
@pytest.mark.parametrize("n", [10, 101, 1003])
def test_splits_are_disjoint_and_together_everything(n, seed):
    train, validation, test = parts(n, seed=seed)
    assert sorted(train + validation + test) == list(range(n))
    assert (len(validation), len(test)) == (round(0.1 * n), round(0.2 * n))
    assert split_indices(n, "all", 0.1, 0.2, seed, "x").tolist() == list(range(n))


def test_permutation_is_that_of_the_seed():
    order = np.random.RandomState(3).permutation(50)
    train, validation, test = parts(50, seed=3)
    assert [test, validation, train] == [sorted(order[:10]), sorted(order[10:15]), sorted(order[15:])]
    assert parts(50, seed=4) != parts(50, seed=3) == parts(50, seed=3)


def test_without_a_seed_the_last_ones_are_held_out():
    assert parts(10, seed=None) == [[0, 1, 2, 3, 4, 5, 6], [7], [8, 9]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, "fit", 0.1, 0.1), "split among train, validation, test, all expected; got 'fit'"),
        ((10, "train", 0.5, 0.5), "below 1 together, expected; got 0.5, 0.5"),
        ((10, "train", -0.1, 0.5), "got -0.1, 0.5"),
        ((10, "test", 0.1, 0.01), "sample or more of split 'test' expected; got none of the 10 in x.npy"),
    ],
)
def test_refuses_splits_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_indices(*arguments, 0, "x.npy")


def test_items_is_to_be_subclassed():
    for method in ("count", "state", "label"):
        with pytest.raises(NotImplementedError):
            getattr(Items(), method)(*([0] if method != "count" else []))
