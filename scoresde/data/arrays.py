"""NumPy arrays in .npy and .npz files, of any shape: vectors (N, D), sequences (N, C, L), images, volumes.

The first axis counts the samples. A .npy file is mapped into memory: only the samples in use are read, so the file
may be larger than the memory. Pickled objects are never loaded.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from scoresde.arguments import Distinct, Seed32, Share, checked
from scoresde.data.items import Items, join_labels, listed, numbered, reading, split_indices

FEW = 4  # a last axis of at most this length, and shorter than the others, is taken for the axis of the channels
KINDS = "biuf"  # NumPy's letters for boolean, signed, unsigned and floating point
TEXTS = "US"  # of text and of bytes
LARGEST = float(np.finfo(np.float32).max)  # the largest value of a network's input


@checked
class Arrays(Items):
    """The samples of an array (N, *), as states (one sample each, a tensor `*`) in the file's own units.

    States are float64 if the array's numbers need it (float64, and integers of 32 bits or more), and float32 otherwise.

    Args:
        path: path of a .npy or .npz file.
        split: "train", "validation", "test" or "all", see `split_indices`.
        key: name of the array in a .npz file; not needed if the file holds one array apart from the labels.
        labels: key of the labels (N,) or (N, F) in a .npz file, or path of a .npy file with them. A list of keys or
            paths gives a dict of labels, named by the keys or by the file names without .npy. Integers are int64
            classes from 0, or -1 for a sample without a class; each text becomes its index in `class_names`, the sorted
            texts of the whole file; floating-point numbers are float32 conditions, all NaN for a sample without one.
        channels_last: if True, the last axis holds the channels and becomes the first axis of a state; if False, the
            axes keep their order. None means False; but if `dims` is set, an array whose last axis looks like the
            channels is refused.
        shape: expected shape of a state; None accepts any.
        validation, test: shares of the samples in these splits.
        seed: seed of the permutation; None keeps the order of the file, with the test samples at its end. Take None for
            overlapping windows of one long series: only windows at the borders between splits then share points.
        dims: number of axes of a state after the channel axis: 1 for series, 2 for images, 3 for volumes. Samples
            without a channel axis then get one: (N, L) and (N, H, W) give states (1, L) and (1, H, W). None takes
            samples as they are.
        levels: number of grey levels; samples with values other than 0, ..., levels - 1 are then refused. None accepts
            any numbers.

    Raises:
        ValueError: the file has no such array, the samples have another shape, the number of labels is not that of the
            samples, or the split is empty; when an item is read: a value is not finite in float32, or is not a grey
            level.
        FileNotFoundError: there is no such file.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "all",
        key: str | None = None,
        labels: str | Path | Annotated[Sequence[str | Path], Distinct(1)] | None = None,
        channels_last: bool | None = None,
        shape: Sequence[int] | None = None,
        validation: Share = 0.05,
        test: Share = 0.05,
        seed: Seed32 | None = 0,
        dims: int | None = None,
        levels: int | None = None,
    ):
        self.path, self.key, self.levels = Path(path), key, levels
        is_npz = self.path.suffix.lower() == ".npz"
        if key is not None and not is_npz:
            raise ValueError(f"key={key!r} is for .npz files: leave it out for {path}")
        sources = listed(labels)
        self.label_keys = tuple(map(str, sources)) if is_npz else ()
        n, *sizes = self.array.shape
        self.has_one_channel = len(sizes) == dims
        if not self.has_one_channel:
            _check_axes(path, sizes, dims, channels_last)
        self.channels_last = bool(channels_last) and not self.has_one_channel
        state_shape = [sizes[-1], *sizes[:-1]] if self.channels_last else [1] * self.has_one_channel + sizes
        if shape is not None and list(shape) != state_shape:
            is_clear = channels_last is not None or self.has_one_channel or len(sizes) < 2
            hint = "" if is_clear else ", or channels_last=True if the channels come last"
            raise ValueError(
                f"samples in {path} must have shape {list(shape)}; got {state_shape}: set shape={state_shape}{hint}"
            )
        indices = split_indices(n, split, validation, test, seed, path)
        columns = [_load_labels(self.path if is_npz else Path(s), str(s) if is_npz else None, n) for s in sources]
        keys = [str(s) if is_npz else Path(s).stem for s in sources] if isinstance(labels, (list, tuple)) else None
        classes, names = join_labels(keys, [(column[indices], texts) for column, texts in columns])
        super().__init__(indices, classes, class_names=names)

    @cached_property
    def array(self) -> np.ndarray:
        """The array (N, *), mapped into memory if it is a .npy file."""
        array = _load(self.path, self.key, self.label_keys)
        if array.ndim < 2 or not array.size:
            raise ValueError(
                f"{self.path} must hold an array (N, *) with N >= 1; got shape {array.shape}: if each sample is one "
                "number, reshape it to (N, 1)"
            )
        return array

    def state(self, entry: int) -> Tensor:
        """Return the sample in a row of the array."""
        values = self.array[entry]
        if self.has_one_channel:
            values = values[None]
        elif self.channels_last:
            values = np.moveaxis(values, -1, 0)
        if self.levels is not None:
            is_level = (values % 1 == 0) & (values >= 0) & (values < self.levels)
            if not is_level.all():
                raise ValueError(
                    f"sample {entry} of {self.path} must have grey levels 0, ..., {self.levels - 1}; got "
                    f"{values[~is_level][0]}: set another number of levels; for continuous values "
                    "set levels=None (in a configuration choose data=arrays)"
                )
        state = torch.from_numpy(
            values.astype(np.float32 if np.can_cast(values.dtype, np.float32) else np.float64, order="C")
        )
        if not bool((state.abs() <= LARGEST).all()):
            raise ValueError(
                f"sample {entry} of {self.path} must be finite in float32; got NaN, infinity or a number beyond "
                f"{LARGEST:.2g}: remove this sample, or replace these values"
            )
        return state

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to pickle: all but the array, which the unpickled copy reads from the file again."""
        return {name: value for name, value in self.__dict__.items() if name != "array"}


def _check_axes(path: str | Path, sizes: Sequence[int], dims: int | None, channels_last: bool | None) -> None:
    """Raise ValueError unless `dims` and `channels_last` fit samples of these sizes."""
    if channels_last and len(sizes) < 2:
        raise ValueError(
            f"samples in {path} must have shape (*, channels) for channels_last=True; got {list(sizes)}: leave "
            "channels_last out"
        )
    if dims is None:
        return
    if len(sizes) != dims + 1:
        raise ValueError(
            f"samples in {path} must have dims={dims} axes, or {dims + 1} with the channel axis; got shape "
            f"{list(sizes)}: reshape the array, or set dims={len(sizes) - 1 or 1} (in a configuration, choose "
            "experiment=series, image_arrays or volumes for dims=1, 2 or 3)"
        )
    if channels_last is None and sizes[-1] <= FEW < min(sizes[:-1]):
        raise ValueError(
            f"the channels of samples {list(sizes)} in {path} seem to come last: set channels_last=True "
            f"(data.channels_last=true in a configuration), or channels_last=False for {sizes[0]} channels"
        )


def _load(path: Path, key: str | None, others: Sequence[str] = (), kinds: str = KINDS) -> np.ndarray:
    """Load the array of a .npy file, or the array `key` of a .npz file (default: the only one not in `others`)."""
    what = "an array of numbers" + (" or texts" if TEXTS in kinds else "") + " from numpy.save or numpy.savez"
    with reading(path, what, "save it again, or choose another key"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            with array as archive:
                keys = [name for name in archive.files if (name not in others if key is None else name == key)]
                if len(keys) != 1:
                    raise ValueError(f"key must be one of {', '.join(archive.files) or 'no arrays'}; got {key!r}")
                array = archive[keys[0]]
        if array.dtype.kind not in kinds:
            raise ValueError(f"the array has dtype {array.dtype}")
        return array


def _load_labels(path: Path, key: str | None, n: int) -> tuple[Tensor, list[str] | None]:
    """Return n labels, float32 (from floating-point numbers) or int64, and the class names if labels are texts."""
    array, what = _load(path, key, kinds=KINDS + TEXTS), f"labels {key!r} in {path}" if key else f"labels in {path}"
    if array.ndim < 1 or len(array) != n:
        raise ValueError(f"expected {n} labels in {path}, one per sample; got shape {array.shape}")
    if array.dtype.kind in TEXTS:
        if array.ndim > 1 or (array == array.dtype.type()).any():
            raise ValueError(f"{what} must be one text per sample, none of them empty; got shape {array.shape}")
        numbers, names = numbered(np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array)
        return torch.from_numpy(numbers), names
    labels = torch.from_numpy(np.array(array, np.float32 if array.dtype.kind == "f" else np.int64))
    is_bad = ~labels.isfinite().reshape(n, -1)
    is_null = labels.isnan().reshape(n, -1).all(dim=1)  # the condition of a sample without one
    if (bad := is_bad.any(dim=1) & ~is_null).any():
        raise ValueError(
            f"{what} must be finite in float32, or all NaN for a sample without a condition; got "
            f"{labels[int(bad.int().argmax())].tolist()} in row {int(bad.int().argmax())}: replace these values"
        )
    return labels, None
