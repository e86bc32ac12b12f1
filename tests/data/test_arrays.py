"""Arrays of .npy and .npz files: every kind of number, memory maps, splits, and files that hold something else."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from scoresde.data import Arrays
from tests.data.files import stacked

VALUES = np.random.RandomState(0).normal(size=(40, 3, 5))


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", ">f8", "i8", "u1", "u2", "?"])
@pytest.mark.parametrize("shape", [(40, 15), (40, 3, 5), (40, 1, 3, 5)])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_states_are_the_samples_in_float32(suffix, shape, dtype, tmp_path):
    values = (100 * VALUES).reshape(shape).astype(np.dtype(dtype), casting="unsafe")
    path = tmp_path / f"x{suffix}"
    np.save(path, values) if suffix == ".npy" else np.savez_compressed(path, values)
    states = stacked(Arrays(path))
    assert states.dtype == torch.float32
    assert np.array_equal(states.numpy(), values.astype(np.float32))


def test_array_in_fortran_order(tmp_path):
    np.save(tmp_path / "x.npy", np.asfortranarray(VALUES))
    assert np.array_equal(stacked(Arrays(tmp_path / "x.npy")).numpy(), VALUES.astype(np.float32))


@pytest.mark.parametrize("shape", [(9, 4, 3), (9, 5, 4, 3)])
def test_channels_come_first(shape, tmp_path):
    values = np.random.RandomState(1).normal(size=shape).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    states = stacked(Arrays(tmp_path / "x.npy", channels_last=True, shape=[3, *shape[1:-1]]))
    assert np.array_equal(states.numpy(), np.stack([values[..., c] for c in range(3)], axis=1))


def test_splits_are_disjoint_and_keep_their_labels(tmp_path):
    np.savez(tmp_path / "x.npz", states=np.arange(40)[:, None] * [1, 10], classes=np.arange(40) % 7)
    arguments = {"labels": "classes", "validation": 0.1, "test": 0.25, "seed": 5}
    parts = [Arrays(tmp_path / "x.npz", split, **arguments) for split in ("train", "validation", "test")]
    assert list(map(len, parts)) == [26, 4, 10]
    seen = [part[i] for part in parts for i in range(len(part))]
    assert sorted(int(state[0]) for state, _ in seen) == list(range(40))
    assert all(int(label) == int(state[0]) % 7 and label.dtype == torch.int64 for state, label in seen)


def test_labels_beside_a_npy_file(tmp_path):
    np.save(tmp_path / "x.npy", VALUES)
    np.save(tmp_path / "y.npy", VALUES[:, 0, :2])
    _, condition = Arrays(tmp_path / "x.npy", labels=tmp_path / "y.npy")[11]
    assert condition.dtype == torch.float32
    assert np.array_equal(condition.numpy(), VALUES[11, 0, :2].astype(np.float32))
    np.save(tmp_path / "y.npy", np.arange(39))
    with pytest.raises(ValueError, match=r"40 labels.* expected in .*y.npy; got \(39,\) of int64"):
        Arrays(tmp_path / "x.npy", labels=tmp_path / "y.npy")


def test_npy_is_mapped_and_not_copied_to_other_processes(tmp_path):
    np.save(tmp_path / "x.npy", VALUES)
    dataset = Arrays(tmp_path / "x.npy")
    assert isinstance(dataset.array, np.memmap)
    packed = pickle.dumps(dataset)
    assert len(packed) < VALUES.nbytes / 2
    assert torch.equal(pickle.loads(packed)[3], dataset[3])
    batches = list(DataLoader(dataset, 8, num_workers=2))
    assert torch.equal(torch.cat(batches), stacked(dataset))


def test_arrays_of_a_npz_by_their_key(tmp_path):
    np.savez(tmp_path / "x.npz", a=VALUES, b=VALUES + 1)
    assert float(Arrays(tmp_path / "x.npz", key="b")[0][0, 0]) == pytest.approx(VALUES[0, 0, 0] + 1)
    for key, found in ((None, "key=None"), ("c", "key=c")):
        with pytest.raises(
            ValueError, match=rf"the key of an array in .*x.npz expected; got {found}, and it holds a, b"
        ):
            Arrays(tmp_path / "x.npz", key=key)
    with pytest.raises(ValueError, match="got key=c"):
        Arrays(tmp_path / "x.npz", key="a", labels="c")


def test_shape_that_is_not_the_one_declared(tmp_path):
    np.save(tmp_path / "x.npy", VALUES)
    message = r"shape \[5, 3\] expected; got \[3, 5\] in .*x.npy: say shape=\[3, 5\], or channels_last=True"
    with pytest.raises(ValueError, match=message):
        Arrays(tmp_path / "x.npy", shape=[5, 3])
    assert len(Arrays(tmp_path / "x.npy", shape=(3, 5))) == 40


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_value_that_float32_cannot_hold_is_named(value, tmp_path):
    values = VALUES.copy()
    values[7, 1, 2] = value
    np.save(tmp_path / "x.npy", values)
    dataset = Arrays(tmp_path / "x.npy", split="train", seed=None)
    assert dataset[6].shape == (3, 5)
    with pytest.raises(ValueError, match=r"finite values .* expected in .*x.npy; sample 7 has others"):
        dataset[7]


class Evil:
    """What fails the test when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


OTHERS = {
    "objects": (
        np.array([Evil(), None], dtype=object),
        "numpy.save or numpy.savez writes it.*(Object arrays|Python objects)",
    ),
    "strings": (np.array(["a", "b"]), "real numbers expected.*got dtype <U1"),
    "complex": (VALUES + 0j, "got dtype complex128"),
    "structured": (np.zeros(3, [("a", "f4")]), r"got dtype \[\('a', '<f4'\)\]"),
    "numbers": (VALUES[:, 0, 0], r"the samples first, expected.*got \(40,\): reshape it, to \(N, 1\)"),
    "one number": (np.array(3.0), r"got \(\): reshape"),
    "no samples": (VALUES[:0], r"one sample or more expected.*got an array \(0, 3, 5\)"),
}


@pytest.mark.parametrize(("values", "message"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_of_something_else(suffix, values, message, tmp_path):
    path = tmp_path / f"x{suffix}"
    np.save(path, values) if suffix == ".npy" else np.savez(path, values)
    with pytest.raises(ValueError, match=message) as error:
        Arrays(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    "change",
    [lambda content: b"", lambda content: b"hello", lambda content: content[:60], lambda content: content[:-9]],
    ids=["empty", "text", "header", "truncated"],
)
def test_file_that_is_damaged_is_named(change, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    np.save(path, VALUES) if suffix == ".npy" else np.savez(path, VALUES)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"expected in {path}, of \d+ bytes; got \w+: .*: write it again"):
        Arrays(path)


def test_pickle_is_refused_and_not_executed(tmp_path):
    (tmp_path / "x.npy").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"numpy.save or numpy.savez writes it, expected in .*x.npy"):
        Arrays(tmp_path / "x.npy")


def test_file_that_is_not_there_and_arguments_that_do_not_go_together(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"a .npy or .npz file expected at {tmp_path}/x.npy"):
        Arrays(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", VALUES[:, 0])
    with pytest.raises(ValueError, match=r"got key='a' with .*leave it out"):
        Arrays(tmp_path / "x.npy", key="a")
    with pytest.raises(ValueError, match=r"samples \(\*, channels\) expected with channels_last; got \(40, 5\)"):
        Arrays(tmp_path / "x.npy", channels_last=True)
