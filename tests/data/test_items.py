"""Items with labels and mirror images; splits that are disjoint, complete and reproducible; errors of damaged files."""

import gzip

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from scoresde.data.items import Items, check_choice, read_bytes, reading, split_indices
from tests.data.files import stacked


def test_mirror_images_follow_the_states_and_keep_their_labels():
    states, labels = torch.arange(24, dtype=torch.uint8).reshape(4, 2, 3), torch.tensor([5, 6, 7, 8])
    plain, flipped = Items(states), Items(states, labels, flip=True)
    assert stacked(plain).dtype == torch.float32
    assert torch.equal(stacked(plain), states.float())
    times = 1.7e9 + torch.rand(4, 2, dtype=torch.float64)
    assert torch.equal(stacked(Items(times)), times)
    assert torch.equal(stacked(Items(times.long())), times.long().double())
    assert (len(plain), len(flipped)) == (4, 8)
    assert (plain.mirrored, flipped.mirrored) == (0, 4)
    for i in range(8):
        state, label = flipped[i]
        assert torch.equal(state, plain[i % 4] if i < 4 else plain[i % 4][:, [2, 1, 0]])
        assert label == labels[i % 4]
    assert torch.equal(flipped[-1][0], flipped[7][0])
    for dataset, index in ((plain, 4), (plain, -5), (flipped, 8), (flipped, -9)):
        with pytest.raises(IndexError):
            dataset[index]


def test_labels_may_be_a_dict_and_named(tmp_path):
    states = torch.arange(12.0).reshape(4, 3)
    labels = {"kind": torch.tensor([0, 1, -1, 1]), "vector": torch.eye(4)}
    items = Items(states, labels, flip=True, class_names={"kind": ("a", "b")})
    assert items.class_names == {"kind": ["a", "b"]}
    for i in range(8):
        state, condition = items[i]
        assert torch.equal(state, states[i % 4] if i < 4 else states[i % 4].flip(0))
        assert {name: value.tolist() for name, value in condition.items()} == {
            "kind": labels["kind"][i % 4].tolist(),
            "vector": labels["vector"][i % 4].tolist(),
        }
    batches = list(DataLoader(items, batch_size=8, num_workers=2))
    assert torch.equal(batches[0][1]["kind"], labels["kind"].repeat(2))
    assert not hasattr(Items(states, labels["kind"]), "class_names")
    assert not hasattr(Items(states), "class_names")


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (torch.tensor([0, 1, 2]), None, r"label must have 2 values, one per sample; got shape \(3,\)"),
        (torch.tensor([0, -2]), None, "label must hold classes 0, or -1 for a sample without a class; got -2 .. 0"),
        (torch.tensor([0, 2]), {"label": ["a", "b"]}, r"label must hold classes 0 .. 1, or -1 .*; got 0 .. 2: number"),
        ({"kind": torch.tensor([0, 5])}, {"kind": ["a"]}, "kind must hold classes 0 .. 0, or"),
        ({"kind": torch.tensor(0)}, None, r"kind must have 2 values, one per sample; got shape \(\)"),
        (torch.zeros(3, 2), None, "vector must have 2 values, one per sample"),
    ],
)
def test_labels_that_are_no_classes(labels, names, message):
    with pytest.raises(ValueError, match=message):
        Items(torch.zeros(2, 3), labels, class_names=names)


def splits(n, validation=0.1, test=0.2, seed=0):
    return [split_indices(n, name, validation, test, seed, "x").tolist() for name in ("train", "validation", "test")]


@pytest.mark.parametrize("seed", [0, 7, None])
@pytest.mark.parametrize("n", [10, 101, 1003])
def test_splits_are_disjoint_and_complete(n, seed):
    train, validation, test = splits(n, seed=seed)
    assert sorted(train + validation + test) == list(range(n))
    assert (len(validation), len(test)) == (round(0.1 * n), round(0.2 * n))
    assert split_indices(n, "all", 0.1, 0.2, seed, "x").tolist() == list(range(n))


def test_splits_follow_the_permutation_of_their_seed():
    order = np.random.RandomState(3).permutation(50)
    train, validation, test = splits(50, seed=3)
    assert [test, validation, train] == [sorted(order[:10]), sorted(order[10:15]), sorted(order[15:])]
    assert splits(10, seed=None) == [[0, 1, 2, 3, 4, 5, 6], [7], [8, 9]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, "fit", 0.1, 0.1), "split must be one of train, validation, test, all; got 'fit'"),
        ((10, "train", 0.5, 0.5), "must be >= 0, with a sum below 1; got validation=0.5, test=0.5"),
        ((10, "train", -0.1, 0.5), "validation=-0.1"),
        ((10, "test", 0.1, 0.01), "split 'test' of the 10 samples in x.npy is empty with validation=0.1, test=0.01"),
    ],
)
def test_impossible_splits_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_indices(*arguments, 0, "x.npy")


def test_errors_of_damaged_and_of_missing_files(tmp_path):
    message = r"^x is not a list \(KeyError: 'a'\): write it again$"
    with pytest.raises(ValueError, match=message), reading("x", "a list", "write it again"):
        raise KeyError("a")
    with pytest.raises(FileNotFoundError, match="there is no file x: expected a list"), reading("x", "a list", ""):
        read_bytes(tmp_path / "x")
    (tmp_path / "x").write_bytes(gzip.compress(b"abc"))
    assert read_bytes(tmp_path / "x") == b"abc"


def test_choices_are_listed():
    check_choice("name", "b", ("a", "b"))
    with pytest.raises(ValueError, match=r"^name must be one of a, b; got 'c'$"):
        check_choice("name", "c", ("a", "b"))
