"""Data that a Python program has at hand, as a dataset: tensors, NumPy arrays, tables, datasets and files.

The states of an array (N, *) are its rows. Conditions are a second array, or a dict of named arrays:

    dataset(x)                       states (N, *)
    dataset((x, labels))             and one condition per state, integers (N,) or numbers (N, F)
    dataset((x, {"label": labels}))  and conditions by name
    dataset(TensorDataset(x, y))     the same; any other dataset with a length is taken as it is
    dataset("table.csv")             a file that `Table` or `Arrays` reads
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from scoresde.atomic_files import replace_atomically
from scoresde.data.arrays import FEW, Arrays
from scoresde.data.items import Items, split_indices
from scoresde.data.summary import state_of
from scoresde.data.tables import Table
from scoresde.protocols import by_name

TABLES, ARRAYS = (".csv", ".tsv", ".txt"), (".npy", ".npz")
STATES = "states"  # name of the states in a file that `save_arrays` writes


def dataset(data: Any, name: str = "data", split: str = "all", shares: Mapping[str, float] | None = None) -> Any:
    """Return data as a dataset; see the module docstring for the forms.

    Args:
        data: a tensor or array (N, *), a pair (states, conditions), a dataset, or the path of a file.
        name: name of the argument in messages.
        split: the part of a file to read, "train", "validation", "test" or "all".
        shares: the shares of the rows of a file in its parts "validation" and "test".

    Raises:
        TypeError: `data` has none of these forms.
        ValueError: the states are not numbers (N, *), some are not finite, or a condition has another number of rows.
        FileNotFoundError: there is no such file.
    """
    if isinstance(data, (str, Path)):
        return _file(Path(data), name, split, shares or {})
    if isinstance(tensors := getattr(data, "tensors", None), tuple):  # a TensorDataset
        data = tensors[0] if len(tensors) == 1 else tensors
    if isinstance(data, tuple):
        if len(data) != 2:
            raise ValueError(
                f"{name} must be states, or a pair (states, conditions); got {len(data)} parts: give several "
                'conditions as a dict, (states, {"label": ..., "vector": ...})'
            )
        return Items(_states(data[0], name), None if data[1] is None else _conditions(data[1]))
    if isinstance(data, Tensor) or hasattr(data, "__array__"):
        return Items(_states(data, name))
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            f"{name} must be a tensor or array (N, *), a pair (states, conditions), a dataset with a length, or the "
            f"path of a file; got {type(data).__name__}"
        )
    is_alone = len(data) and isinstance(data[0], (tuple, list)) and len(data[0]) == 1
    found = _First(data) if is_alone else data
    if isinstance(data, list) and len(data) and not isinstance(data[0], (Tensor, tuple)):
        raise TypeError(
            f"{name} must be a list of tensors or of pairs (state, condition); got one of {type(data[0]).__name__}: "
            "pass numpy.array(...) for numbers, and a pair of states and conditions as a tuple, (states, conditions)"
        )
    if len(data):
        state_of(found[0])  # raises an error for an item without a state
    return found


class _First(Dataset):
    """A dataset whose items are tuples of one state."""

    def __init__(self, items: Any):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index][0]


def _file(path: Path, name: str, split: str, shares: Mapping[str, float]) -> Any:
    suffix = path.suffix.lower()
    if suffix not in TABLES + ARRAYS:
        raise ValueError(
            f"{name} must be a table ({', '.join(TABLES)}) or an array ({', '.join(ARRAYS)}); got {path}: pass a "
            "dataset of scoresde.data for other files, such as ImageFolder"
        )
    kind: Any = Table if suffix in TABLES else Arrays
    return kind(str(path), split=split, **{"validation": 0.0, "test": 0.0, **shares})


def _states(values: Any, name: str) -> Tensor:
    """Return an array of states (N, *) as a tensor."""
    x = values.detach() if isinstance(values, Tensor) else torch.from_numpy(_numbers(values, name))
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    if x.ndim < 2 or not x.numel() or x.is_complex():
        raise ValueError(
            f"{name} must hold numbers (N, *), one state in each row; got {x.dtype} of shape {tuple(x.shape)}"
            + (": if each state is one number, reshape it to (N, 1)" if x.ndim == 1 else "")
        )
    if x.ndim == 4 and x.shape[-1] <= FEW < min(x.shape[1:-1]):
        raise ValueError(
            f"{name} must have the channels before the pixels, (N, C, H, W); got {tuple(x.shape)}: use "
            "x.transpose(0, 3, 1, 2) of an array, or x.permute(0, 3, 1, 2) of a tensor"
        )
    if bad := (~torch.isfinite(x.flatten(1)).all(dim=1)).nonzero().flatten().tolist():
        raise ValueError(f"{name} must be finite; got NaN or infinity in {len(bad)} rows, first {bad[:4]}: remove them")
    return x.cpu()


def _numbers(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold numbers; got an array of dtype {array.dtype}: leave out or encode texts")
    native = array.dtype.newbyteorder("=")
    wide = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64, "float16": np.float32}
    return np.array(array, wide.get(native.name, native), order="C")


def _conditions(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {str(key): _conditions(value) for key, value in values.items()}
    labels = torch.as_tensor(values) if isinstance(values, Tensor) else torch.from_numpy(_numbers(values, "conditions"))
    return labels.detach().cpu().float() if labels.is_floating_point() else labels.detach().cpu().long()


def divided(data: Any, shares: Mapping[str, float], seed: int = 0) -> dict[str, Any]:
    """Divide a dataset at random into "train" and the parts named in `shares`, as `split_indices` does.

    Args:
        data: the dataset.
        shares: the shares of the items in the parts "validation" and "test".
        seed: seed of the permutation.

    Raises:
        ValueError: shares that leave nothing to train on, or an empty part.
    """
    validation, test = (shares.get(name, 0.0) for name in ("validation", "test"))
    parts = {name: split_indices(len(data), name, validation, test, seed, "data") for name in ("train", *shares)}
    return {name: _rows(data, indices) for name, indices in parts.items()}


def is_in_memory(data: Any) -> bool:
    """Return whether a dataset holds its states as a tensor, so that no configuration can describe it."""
    return type(data) is Items


def dtype_of(data: Any) -> torch.dtype:
    """Return the dtype of the states before `Items` converts integers to floating point."""
    return _entries(data).dtype if is_in_memory(data) else state_of(data[0]).dtype


def _rows(data: Any, indices: np.ndarray) -> Any:
    """Return the items of a dataset with these indices."""
    if not is_in_memory(data):
        return _Part(data, indices)
    rows = torch.from_numpy(indices)
    labels = {name: part[rows] for name, part in labels_of(data).items()}
    return Items(_entries(data)[rows], labels if isinstance(data.labels, dict) else next(iter(labels.values()), None))


class _Part(Subset):
    """Some items of a dataset, with their labels and the names of the classes if the dataset has these attributes."""

    def __init__(self, data: Any, indices: np.ndarray):
        super().__init__(data, indices.tolist())
        if hasattr(data, "class_names"):
            self.class_names = data.class_names
        rows = torch.from_numpy(indices)  # item n + i of n labels is the mirror image of item i, see `Items`
        self.labels = {name: part[rows % len(part)] for name, part in labels_of(data).items()}


def labels_of(data: Any) -> dict[str, Tensor]:
    """Return the conditions of all items by name, if a dataset has them as tensors in `labels`, as `Items` do."""
    labels = getattr(data, "labels", None)
    return by_name(labels) if isinstance(labels, (Tensor, dict)) else {}


def _entries(data: Any) -> Tensor:
    """Return the states of `Items` in memory."""
    return data.entries


def save_arrays(data: Any, path: Path) -> None:
    """Write all items of a dataset to a .npz file, from which `saved_arrays` reads them.

    Raises:
        OSError: the file cannot be written.
    """
    if is_in_memory(data):
        states, labels = _entries(data), data.labels
    else:
        pairs = (data[i] for i in range(len(data)))
        items = [item if isinstance(item, (tuple, list)) else (item, None) for item in pairs]
        states = torch.stack([torch.as_tensor(state) for state, _ in items])
        labels = None if items[0][1] is None else default_collate([label for _, label in items])
    arrays = {STATES: states, **by_name(labels)}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **{name: array.numpy() for name, array in arrays.items()})  # type: ignore[arg-type]

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, write)


def saved_arrays(data: Any, path: Path) -> Arrays:
    """Return the dataset of a file that `save_arrays` wrote, with the conditions that `data` has."""
    labels = data[0][1] if isinstance(data[0], (tuple, list)) else None
    if labels is None or isinstance(labels, Mapping):
        return Arrays(str(path), "all", key=STATES, labels=None if labels is None else list(labels))
    return Arrays(str(path), "all", key=STATES, labels=next(iter(by_name(torch.as_tensor(labels)))))
