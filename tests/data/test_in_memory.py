"""Tensors, arrays, pairs, datasets and files become datasets with the same states and conditions."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from scoresde.data import in_memory
from scoresde.data.items import Items
from tests.conftest import seeded

X = torch.randn(20, 3, generator=seeded(1))
LABELS = torch.arange(20) % 4
NAMED = {"label": LABELS, "vector": X[:, :2]}


class Pairs(Dataset):
    """A dataset of a user; the items are tuples with `parts` entries."""

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return (X[index], LABELS[index])[: self.parts]


FORMS = {
    "tensor": (X, None),
    "array": (X.numpy(), None),
    "transposed": (np.asfortranarray(X.numpy()), None),
    "big-endian": (X.numpy().astype(">f4"), None),
    "tensor-dataset": (TensorDataset(X), None),
    "singles": (Pairs(1), None),
    "pair": ((X, LABELS), LABELS),
    "arrays": ((X.numpy(), LABELS.int().numpy()), LABELS),
    "tensor-dataset-pair": (TensorDataset(X, LABELS), LABELS),
    "pairs": (Pairs(2), LABELS),
    "named": ((X, NAMED), NAMED),
    "list": (list(X), None),
    "no conditions": ((X, None), None),
}


@pytest.mark.parametrize(("data", "cond"), FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_items(data, cond):
    dataset = in_memory.dataset(data)
    assert len(dataset) == len(X)
    for i in (0, 7, 19):
        state, own = (dataset[i], None) if cond is None else dataset[i]
        assert torch.equal(state, X[i])
        if isinstance(cond, dict):
            assert all(torch.equal(own[name], cond[name][i]) for name in cond)
        elif cond is not None:
            assert torch.equal(own, cond[i])


@pytest.mark.parametrize("suffix", [".csv", ".npy", ".npz"])
def test_files_are_read_whole_or_in_parts(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".csv":
        np.savetxt(path, X.numpy(), delimiter=",", header="a,b,c", comments="")
    else:
        (np.savez if suffix == ".npz" else np.save)(path, X.numpy())
    assert len(in_memory.dataset(str(path))) == 20
    parts = [in_memory.dataset(path, "data", name, {"test": 0.25}) for name in ("train", "test")]
    rows = torch.stack([parts[i][j] for i in range(2) for j in range(len(parts[i]))])
    assert [len(part) for part in parts] == [15, 5]
    torch.testing.assert_close(rows[rows[:, 0].argsort()].float(), X[X[:, 0].argsort()])


@pytest.mark.parametrize("data", [(X, LABELS), (X, NAMED), X, Pairs(2)], ids=["pair", "named", "states", "dataset"])
def test_parts_are_disjoint_keep_their_conditions_and_are_saved(data, tmp_path):
    whole = in_memory.dataset(data)
    parts = in_memory.divided(whole, {"validation": 0.2, "test": 0.1}, seed=3)
    assert {name: len(part) for name, part in parts.items()} == {"train": 14, "validation": 4, "test": 2}

    def states(dataset):
        return [tuple(state_of(dataset[i]).tolist()) for i in range(len(dataset))]

    def state_of(item):
        return item[0] if isinstance(item, tuple) else item

    assert sorted(states(whole)) == sorted(row for part in parts.values() for row in states(part))
    in_memory.save_arrays(parts["validation"], tmp_path / "run" / "part.npz")
    saved = in_memory.saved_arrays(parts["validation"], tmp_path / "run" / "part.npz")
    for first, second in zip((parts["validation"][i] for i in range(4)), (saved[i] for i in range(4)), strict=True):
        flat = [torch.utils._pytree.tree_flatten(item) for item in (first, second)]
        assert flat[0][1] == flat[1][1]
        assert all(torch.equal(a, b) for a, b in zip(flat[0][0], flat[1][0], strict=True))


def test_grey_levels_keep_their_dtype_for_the_choice_of_a_transform():
    images = torch.randint(0, 256, (6, 1, 8, 8), generator=seeded(), dtype=torch.uint8)
    dataset = in_memory.dataset(images)
    assert in_memory.dtype_of(dataset) == torch.uint8
    assert in_memory.dtype_of(in_memory.divided(dataset, {"test": 0.5})["test"]) == torch.uint8
    assert dataset[0].dtype == torch.float32
    assert in_memory.dtype_of(Pairs(2)) == torch.float32


WRONG = {
    "numbers": (torch.zeros(5), ValueError, r"one state in each row; got .*\(5,\): if each state is one number"),
    "texts": (np.array([["a"], ["b"]]), TypeError, "must hold numbers; got an array of dtype <U1"),
    "nan": (torch.tensor([[0.0], [float("nan")]]), ValueError, r"NaN or infinity in 1 rows, first \[1\]"),
    "channels": (np.zeros((2, 8, 8, 3)), ValueError, r"channels before the pixels.*x.transpose\(0, 3, 1, 2\)"),
    "three": (TensorDataset(X, LABELS, LABELS), ValueError, "got 3 parts: give several conditions as a dict"),
    "rows": ((X, LABELS[:5]), ValueError, "label must have 20 values"),
    "number": (3, TypeError, "must be a tensor or array .* got int"),
    "iterable": (iter([X[0]]), TypeError, "a dataset with a length"),
    "file": ("faces.zip", ValueError, "must be a table .* got faces.zip: pass a dataset"),
    "list": (X.tolist(), TypeError, r"a list of tensors .* got one of list: pass numpy.array"),
    "list of arrays": ([X.numpy(), LABELS.numpy()], TypeError, r"as a tuple, \(states, conditions\)"),
    "complex": (torch.zeros(2, 2, dtype=torch.complex64), ValueError, "must hold numbers"),
}


@pytest.mark.parametrize(("data", "error", "message"), WRONG.values(), ids=WRONG)
def test_data_of_another_form_is_refused_with_the_fix(data, error, message):
    with pytest.raises(error, match=message):
        in_memory.dataset(data)


class Labelled(Pairs):
    """A dataset of a user with the attributes `labels` and `class_names`."""

    labels, class_names = LABELS, {"label": ["a", "b", "c", "d"]}


def test_parts_of_a_dataset_keep_its_labels_and_the_names_of_its_classes():
    part = in_memory.divided(Labelled(2), {"test": 0.25})["test"]
    assert part.labels["label"].tolist() == [int(part[i][1]) for i in range(len(part))]
    assert part.class_names == Labelled.class_names
    mirrored = Items(torch.zeros(4, 1, 2, 2), torch.arange(4), flip=True)
    part = in_memory._Part(mirrored, np.array([1, 6]))
    assert part.labels["label"].tolist() == [int(part[i][1]) for i in range(2)] == [1, 2]
    assert in_memory.labels_of(type("Dataset", (), {"labels": [1, 2]})()) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32_and_saved(dtype, tmp_path):
    data = in_memory.dataset(X.to(dtype))
    assert in_memory.dtype_of(data) == torch.float32
    in_memory.save_arrays(data, tmp_path / "part.npz")
    assert torch.equal(in_memory.saved_arrays(data, tmp_path / "part.npz")[3], X[3].to(dtype).float())
