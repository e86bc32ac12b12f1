"""Arrays of .npy and .npz files: dtypes, memory maps, splits and damaged files."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from scoresde.data import Arrays
from tests.data.files import Evil, stacked

VALUES = np.random.RandomState(0).normal(size=(40, 3, 5))


def save(path, values):
    np.save(path, values) if path.suffix == ".npy" else np.savez(path, values)
    return path


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", ">f8", "i8", "i4", "u1", "u2", "?", "g"])
@pytest.mark.parametrize(("suffix", "shape"), [(".npy", (40, 15)), (".npz", (40, 1, 3, 5))])
def test_states_are_the_samples_in_float32_or_float64_if_they_need_it(suffix, shape, dtype, tmp_path):
    values = np.asfortranarray((100 * VALUES).reshape(shape).astype(np.dtype(dtype), casting="unsafe"))
    states = stacked(Arrays(save(tmp_path / f"x{suffix}", values)))
    needs_more = dtype in ("f8", ">f8", "i8", "i4", "g")
    assert states.dtype == (torch.float64 if needs_more else torch.float32)
    assert np.array_equal(states, values.astype(np.float64 if needs_more else np.float32))


@pytest.mark.parametrize("shape", [(9, 4, 3), (9, 5, 4, 3)])
def test_channels_come_first(shape, tmp_path):
    values = np.random.RandomState(1).normal(size=shape).astype(np.float32)
    states = stacked(Arrays(save(tmp_path / "x.npy", values), channels_last=True, shape=[3, *shape[1:-1]]))
    assert np.array_equal(states, np.stack([values[..., c] for c in range(3)], axis=1))


def test_splits_are_disjoint_and_keep_their_labels(tmp_path):
    np.savez(tmp_path / "x.npz", states=np.arange(40)[:, None] * [1, 10], classes=np.arange(40) % 7)
    arguments = {"labels": "classes", "validation": 0.1, "test": 0.25, "seed": 5}
    parts = [Arrays(tmp_path / "x.npz", split, **arguments) for split in ("train", "validation", "test")]
    assert list(map(len, parts)) == [26, 4, 10]
    pairs = [part[i] for part in parts for i in range(len(part))]
    assert sorted(int(state[0]) for state, _ in pairs) == list(range(40))
    assert all(int(label) == int(state[0]) % 7 and label.dtype == torch.int64 for state, label in pairs)


def test_labels_in_a_second_npy_file(tmp_path):
    path, labels = save(tmp_path / "x.npy", VALUES), save(tmp_path / "y.npy", VALUES[:, 0, :2])
    _, condition = Arrays(path, labels=labels)[11]
    assert condition.dtype == torch.float32
    assert np.array_equal(condition, VALUES[11, 0, :2].astype(np.float32))
    save(labels, np.arange(39))
    with pytest.raises(ValueError, match=r"expected 40 labels in .*y.npy, one per sample; got shape \(39,\)"):
        Arrays(path, labels=labels)


def test_npy_is_mapped_and_not_copied_to_other_processes(tmp_path):
    dataset = Arrays(save(tmp_path / "x.npy", VALUES))
    assert isinstance(dataset.array, np.memmap)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < VALUES.nbytes / 2
    assert isinstance(pickle.loads(pickled).array, np.memmap)
    batches = list(DataLoader(pickle.loads(pickled), 8, num_workers=2))
    assert torch.equal(torch.cat(batches), stacked(dataset))


def test_arrays_of_a_npz_by_their_key(tmp_path):
    np.savez(tmp_path / "x.npz", a=VALUES, b=VALUES + 1)
    assert float(Arrays(tmp_path / "x.npz", key="b")[0][0, 0]) == pytest.approx(VALUES[0, 0, 0] + 1)
    for arguments, message in (({}, "None"), ({"key": "c"}, "'c'"), ({"key": "a", "labels": "c"}, "'c'")):
        with pytest.raises(
            ValueError, match=rf"x.npz is not .*key must be one of a, b; got {message}.*choose another key"
        ):
            Arrays(tmp_path / "x.npz", **arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_value_that_float32_cannot_hold_is_named(value, tmp_path):
    values = VALUES.copy()
    values[7, 1, 2] = value
    dataset = Arrays(save(tmp_path / "x.npy", values), split="train", seed=None)
    assert dataset[6].shape == (3, 5)
    with pytest.raises(ValueError, match=r"sample 7 of .*x.npy must be finite in float32; got NaN"):
        dataset[7]


OTHERS = {
    "objects": (np.array([Evil(), None], dtype=object), "is not an array of numbers from .*(Object|Python objects)"),
    "strings": (np.array(["a", "b"]), "is not an array of numbers from .*dtype <U1"),
    "complex": (VALUES + 0j, "dtype complex128"),
    "structured": (np.zeros(3, [("a", "f4")]), r"dtype \[\('a', '<f4'\)\]"),
    "numbers": (VALUES[:, 0, 0], r"array \(N, \*\) with N >= 1; got shape \(40,\): .*reshape it to \(N, 1\)"),
    "no samples": (VALUES[:0], r"array \(N, \*\) with N >= 1; got shape \(0, 3, 5\)"),
}


@pytest.mark.parametrize(("values", "message"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_of_another_kind_are_refused(suffix, values, message, tmp_path):
    path = save(tmp_path / f"x{suffix}", values)
    with pytest.raises(ValueError, match=f"{path} .*{message}"):
        Arrays(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    "change",
    [lambda content: b"", lambda content: pickle.dumps(Evil()), lambda content: content[:60], lambda x: x[:-9]],
    ids=["empty", "pickle", "header", "truncated"],
)
def test_damaged_file_is_refused(change, suffix, tmp_path):
    path = save(tmp_path / f"x{suffix}", VALUES)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path} is not an array of numbers from .* \(.+\): save it again"):
        Arrays(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": [5, 3]}, r"must have shape \[5, 3\]; got \[3, 5\]: set shape=\[3, 5\], or channels_last=True"),
        ({"key": "a"}, "key='a' is for .npz files: leave it out"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    path = save(tmp_path / "x.npy", VALUES)
    assert len(Arrays(path, shape=(3, 5))) == 40
    with pytest.raises(ValueError, match=message):
        Arrays(path, **arguments)


def test_missing_file_and_samples_without_channels(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/x.npy"):
        Arrays(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"must have shape \(\*, channels\) for channels_last=True; got \[5\]"):
        Arrays(save(tmp_path / "x.npy", VALUES[:, 0]), channels_last=True)


@pytest.mark.parametrize(("dims", "shape"), [(1, (16,)), (2, (5, 7)), (3, (2, 3, 4))])
def test_samples_without_an_axis_of_channels_get_one(dims, shape, tmp_path):
    values = np.random.RandomState(2).normal(size=(9, *shape)).astype(np.float32)
    path = save(tmp_path / "x.npy", values)
    for options in ({}, {"channels_last": True}, {"channels_last": False}):
        states = stacked(Arrays(path, dims=dims, shape=[1, *shape], **options))
        assert np.array_equal(states, values[:, None])
    assert np.array_equal(stacked(Arrays(path)), values)
    path = save(tmp_path / "x.npy", np.stack([values, -values], axis=1))
    assert np.array_equal(stacked(Arrays(path, dims=dims))[:, 1], -values)


def test_channels_on_the_last_axis_are_not_taken_for_space(tmp_path):
    values = np.random.RandomState(2).normal(size=(9, 20, 30, 3))
    path = save(tmp_path / "x.npy", values)
    message = r"channels of samples \[20, 30, 3\] in .* come last: set channels_last=True .*False for 20 channels"
    with pytest.raises(ValueError, match=message):
        Arrays(path, dims=2)
    assert stacked(Arrays(path, dims=2, channels_last=True)).shape == (9, 3, 20, 30)
    assert stacked(Arrays(path, dims=2, channels_last=False)).shape == (9, 20, 30, 3)
    with pytest.raises(ValueError, match=r"must have dims=1 axes, or 2 with .*; got shape \[20, 30, 3\]: .*set dims=2"):
        Arrays(path, dims=1)
    assert stacked(Arrays(save(tmp_path / "y.npy", values.swapaxes(1, 3)), dims=2)).shape == (9, 3, 30, 20)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i8", "f4", "?"])
def test_levels_are_whole_numbers_from_zero(dtype, tmp_path):
    values = np.random.RandomState(3).randint(0, 2 if dtype == "?" else 16, (40, 3, 5)).astype(dtype)
    path = save(tmp_path / "x.npy", values)
    assert np.array_equal(stacked(Arrays(path, levels=16)), values.astype(np.float32))


@pytest.mark.parametrize(("value", "shown"), [(0.5, r"0\.5"), (-1, "-1"), (16, "16"), (np.nan, "nan")])
def test_other_values_than_levels_are_named(value, shown, tmp_path):
    values = np.zeros((4, 3))
    values[2, 1] = value
    dataset = Arrays(save(tmp_path / "x.npy", values), levels=16)
    assert dataset[1].tolist() == [0, 0, 0]
    with pytest.raises(
        ValueError, match=rf"sample 2 of .* must have grey levels 0, \.\.\., 15; got {shown}.*: set another"
    ):
        dataset[2]


def test_several_labels_are_a_dict_by_key_or_by_the_name_of_the_file(tmp_path):
    kinds, vectors = np.array(["b", "a", "ü"] * 10), np.arange(60.0).reshape(30, 2)
    np.savez(tmp_path / "x.npz", states=VALUES[:30], kind=kinds, vector=vectors, part=np.arange(30) - 1)
    path = save(tmp_path / "x.npy", VALUES[:30])
    files = [save(tmp_path / "kind.npy", np.char.encode(kinds, "utf-8")), save(tmp_path / "vector.npy", vectors)]
    first = Arrays(tmp_path / "x.npz", "train", labels=["kind", "vector", "part"])
    second = Arrays(path, "train", labels=[*files, save(tmp_path / "part.npy", np.arange(30) - 1)])
    for dataset in (first, second):
        assert dataset.class_names == {"kind": ["a", "b", "ü"]}
        for i, row in enumerate(dataset.entries):
            state, condition = dataset[i]
            assert np.array_equal(state, VALUES[row].astype(state.numpy().dtype))
            assert int(condition["kind"]) == [1, 0, 2][row % 3]
            assert condition["vector"].tolist() == [2 * row, 2 * row + 1]
            assert int(condition["part"]) == row - 1  # -1 is the null class
    assert Arrays(tmp_path / "x.npz", "test", labels="kind", key="states").class_names == {"label": ["a", "b", "ü"]}


def test_a_vector_of_nan_is_the_null_condition(tmp_path):
    vectors = np.ones((40, 2))
    vectors[3] = np.nan
    path, labels = save(tmp_path / "x.npy", VALUES), save(tmp_path / "y.npy", vectors)
    assert Arrays(path, labels=labels).labels.isnan().all(dim=1).nonzero().tolist() == [[3]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [[1.0, float("nan")]] * 40,
            r"must be finite in float32, or all NaN for a sample .*; got \[1.0, nan\] in row 0",
        ),
        ([0.5] * 39 + [float("inf")], "must be finite in float32.* got inf in row 39: replace these values"),
        ([0] * 39 + [-3], "label must hold classes 0, or -1 for a sample without a class; got -3 .. 0"),
        (["a"] * 39 + [""], "must be one text per sample, none of them empty"),
        ([["a", "b"]] * 40, r"must be one text per sample, none of them empty; got shape \(40, 2\)"),
        ([1j] * 40, "is not an array of numbers or texts .* complex128"),
    ],
)
def test_labels_that_are_no_conditions(labels, message, tmp_path):
    path = save(tmp_path / "x.npy", VALUES)
    with pytest.raises(ValueError, match=message):
        Arrays(path, labels=save(tmp_path / "y.npy", np.array(labels)))
