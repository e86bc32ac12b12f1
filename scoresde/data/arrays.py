"""Arrays of NumPy, .npy and .npz, of any shape: vectors (N, D), sequences (N, C, L), images, volumes.

The first axis is that of the samples. A .npy file is mapped into memory: only what is asked for is read from the disk,
so the file may be larger than the memory. Nothing pickled is ever loaded.
"""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.data.items import Items, split_indices

KINDS = "biuf"  # NumPy's letters of bool, signed, unsigned and floating


class Arrays(Items):
    """The samples of an array (N, *), as float32 states `*`, in the file's own units.

    Args:
        path: of a .npy or .npz file.
        split: "train", "validation", "test" or "all", see `split_indices`.
        key: of the array in a .npz file; not needed where it holds one array beside the labels.
        labels: the key of the labels (N,) or (N, F) in a .npz file, or the path of a .npy file of them. Whole numbers
            become int64 classes, others float32 conditions.
        channels_last: whether the last axis is that of the channels, to be the first of a state.
        shape: shape of a state, to be sure of it; None takes what there is.
        validation, test: shares of the samples.
        seed: of the permutation; None keeps the order of the file, with the test samples at its end. Windows cut from
            one long series overlap: without a seed only those at the two borders have points in common.

    Raises:
        ValueError: a file that is no such array, another shape, labels of another length, no sample of the split; of an
            item: a value that is not finite.
        FileNotFoundError: no such file.
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
        packed = self.path.suffix.lower() == ".npz"
        if key is not None and not packed:
            raise ValueError(f"a key of the arrays in a .npz file expected; got key={key!r} with {path}: leave it out")
        self.array = _samples(_read(self.path, key, None if labels is None else str(labels)), self.path)
        if channels_last and self.array.ndim < 3:
            raise ValueError(f"samples (*, channels) expected with channels_last; got {self.array.shape} in {path}")
        found = _channels_first(self.array[:1])[0].shape if channels_last else self.array.shape[1:]
        if shape is not None and tuple(shape) != found:
            raise ValueError(
                f"samples of shape {list(shape)} expected; got {list(found)} in {path}: say shape={list(found)}"
                f"{'' if channels_last or len(found) < 2 else ', or channels_last=True if the channels come last'}"
            )
        self.indices = split_indices(len(self.array), split, validation, test, seed, path)
        self.labels = labels is not None
        if labels is not None:
            source = self.path if packed else Path(labels)
            self.classes = _conditions(_read(source, str(labels) if packed else None), len(self.array), source)

    def count(self) -> int:
        """The samples of the split."""
        return len(self.indices)

    def state(self, item: int) -> Tensor:
        """One sample."""
        row = int(self.indices[item])
        values = self.array[row : row + 1]
        with np.errstate(over="ignore"):  # an infinite state is refused
            values = (_channels_first(values) if self.channels_last else values)[0].astype(np.float32, order="C")
        state = torch.from_numpy(values)
        if not bool(torch.isfinite(state).all()):
            raise ValueError(
                f"finite values in the range of float32 expected in {self.path}; sample {row} has others: "
                "remove it, or fill its gaps"
            )
        return state

    def label(self, item: int) -> Tensor:
        """Its label."""
        return self.classes[int(self.indices[item])]

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which maps the file itself: a memory map would be copied as a whole."""
        return {**self.__dict__, "array": None} if isinstance(self.array, np.memmap) else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        array = state["array"]
        if array is None:
            array = _samples(_read(state["path"], None), state["path"])
        self.__dict__.update({**state, "array": array})


def _read(path: Path, key: str | None, beside: str | None = None) -> np.ndarray:
    """An array of a file, mapped into memory where it can be; of a .npz, that of the key, or the only one beside."""
    if not path.is_file():
        raise FileNotFoundError(f"a .npy or .npz file expected at {path}; there is none")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            return found
        with found:
            names = [name for name in found.files if name != beside]
            if key is None and len(names) == 1:
                key = names[0]
            if key not in found.files:
                raise KeyError(f"key={key}, and it holds {', '.join(found.files) or 'none'}")
            return found[key]
    except KeyError as error:
        raise ValueError(f"the key of an array in {path} expected; got {error.args[0]}: name one of these") from error
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"an array of numbers, as numpy.save or numpy.savez writes it, expected in {path}, of "
            f"{path.stat().st_size} bytes; got {type(error).__name__}: {error}: write it again"
        ) from error


def _samples(array: np.ndarray, path: Path) -> np.ndarray:
    """The array (N, *), if it is one of numbers."""
    if array.dtype.kind not in KINDS:
        raise ValueError(f"an array of real numbers expected in {path}; got dtype {array.dtype}: convert it")
    if array.ndim < 2:
        raise ValueError(
            f"an array (N, *), the samples first, expected in {path}; got {array.shape}: reshape it, to (N, 1) if each "
            "sample is one number"
        )
    if not array.size:
        raise ValueError(f"one sample or more expected in {path}; got an array {array.shape}")
    return array


def _conditions(array: np.ndarray, n: int, path: Path) -> Tensor:
    """Labels: int64 if they are whole numbers by their type, float32 otherwise."""
    if array.dtype.kind not in KINDS or array.ndim < 1 or len(array) != n:
        raise ValueError(
            f"{n} labels, numbers, one for each sample, expected in {path}; got {array.shape} of {array.dtype}"
        )
    return torch.from_numpy(np.array(array, np.float32 if array.dtype.kind == "f" else np.int64))


def _channels_first(values: np.ndarray) -> np.ndarray:
    """(1, *, C) as (1, C, *)."""
    return np.moveaxis(values, -1, 1)
