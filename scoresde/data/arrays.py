"""NumPy arrays in .npy and .npz files, of any shape: vectors (N, D), sequences (N, C, L), images, volumes.

The first axis is that of the samples. A .npy file is mapped into memory: only the samples in use are read, so the file
may be larger than the memory. Pickled objects are never loaded.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.data.items import Items, reading, split_indices

KINDS = "biuf"  # NumPy's letters of bool, signed, unsigned and floating point
LARGEST = float(np.finfo(np.float32).max)  # what a network can take


class Arrays(Items):
    """The samples of an array (N, *), as states `*` in the file's own units.

    States are float64 if the array's numbers need it (float64, and integers of 32 bits or more), and float32 otherwise.

    Args:
        path: path of a .npy or .npz file.
        split: "train", "validation", "test" or "all", see `split_indices`.
        key: name of the array in a .npz file; not needed if the file holds one array apart from the labels.
        labels: key of the labels (N,) or (N, F) in a .npz file, or path of a .npy file with them. Integers become int64
            classes, floating-point numbers float32 conditions.
        channels_last: whether the last axis is that of the channels; it becomes the first axis of a state.
        shape: expected shape of a state; None accepts any.
        validation, test: shares of the samples.
        seed: seed of the permutation; None keeps the order of the file, with the test samples at its end. Windows cut
            from one long series overlap: without a seed only those at the two borders share points.

    Raises:
        ValueError: a file without such an array, another shape, another number of labels, or an empty split; when an
            item is read: a value that is not finite in float32.
        FileNotFoundError: there is no such file.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "all",
        key: str | None = None,
        labels: str | Path | None = None,
        channels_last: bool = False,
        shape: Sequence[int] | None = None,
        validation: float = 0.05,
        test: float = 0.05,
        seed: int | None = 0,
    ):
        self.path, self.key, self.channels_last = Path(path), key, channels_last
        is_npz = self.path.suffix.lower() == ".npz"
        if key is not None and not is_npz:
            raise ValueError(f"key={key!r} is for .npz files: leave it out for {path}")
        self.labels_key = str(labels) if labels is not None and is_npz else None
        n, *sizes = self.array.shape
        if channels_last and len(sizes) < 2:
            raise ValueError(f"channels_last needs an array (N, *, channels); that in {path} is {self.array.shape}")
        state_shape = [sizes[-1], *sizes[:-1]] if channels_last else sizes
        if shape is not None and list(shape) != state_shape:
            hint = "" if channels_last or len(sizes) < 2 else ", or channels_last=True if the channels come last"
            raise ValueError(
                f"samples in {path} have shape {state_shape}, not {list(shape)}: set shape={state_shape}{hint}"
            )
        indices, classes = split_indices(n, split, validation, test, seed, path), None
        if labels is not None:
            classes = _load_labels(self.path if is_npz else Path(labels), self.labels_key, n)[indices]
        super().__init__(indices, classes)

    @cached_property
    def array(self) -> np.ndarray:
        """The array (N, *), mapped into memory if it is a .npy file."""
        array = _load(self.path, self.key, self.labels_key)
        if array.ndim < 2 or not array.size:
            raise ValueError(
                f"{self.path} has shape {array.shape}, expected (N, *) with N >= 1; if each sample is one number, "
                "reshape it to (N, 1)"
            )
        return array

    def state(self, entry: int) -> Tensor:
        """Return the sample in a row of the array."""
        values = self.array[entry]
        values = np.moveaxis(values, -1, 0) if self.channels_last else values
        state = torch.from_numpy(
            values.astype(np.float32 if np.can_cast(values.dtype, np.float32) else np.float64, order="C")
        )
        if not bool((state.abs() <= LARGEST).all()):
            raise ValueError(f"sample {entry} of {self.path} is not finite in float32: remove it, or fill its gaps")
        return state

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the array: another process reads the file itself."""
        return {name: value for name, value in self.__dict__.items() if name != "array"}


def _load(path: Path, key: str | None, other: str | None = None) -> np.ndarray:
    """Load the array of a .npy file, or of a .npz file that with the key, by default the only one besides `other`."""
    with reading(path, "an array of numbers by numpy.save or numpy.savez", "write it again, or choose another key"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            with array as archive:
                keys = [name for name in archive.files if (name != other if key is None else name == key)]
                if len(keys) != 1:
                    raise LookupError(f"key={key}, but its arrays are {', '.join(archive.files) or 'none'}")
                array = archive[keys[0]]
        if array.dtype.kind not in KINDS:
            raise TypeError(f"dtype {array.dtype}")
        return array


def _load_labels(path: Path, key: str | None, n: int) -> Tensor:
    """Load n labels: int64 if their type is an integer type, float32 otherwise."""
    array = _load(path, key)
    if array.ndim < 1 or len(array) != n:
        raise ValueError(f"expected {n} labels in {path}, one per sample, got shape {array.shape}")
    return torch.from_numpy(np.array(array, np.float32 if array.dtype.kind == "f" else np.int64))
