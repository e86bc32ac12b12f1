"""The base class of the datasets, their splits, and the error of a file that cannot be read.

An item is a state, a floating-point tensor `*` in the data's own units, or a pair (state, label). A state is float32 if
float32 holds the numbers of the source without loss, and float64 otherwise, as a transform may subtract large numbers.
"""

import gzip
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from scoresde.tensors import floating

PARTS = ("train", "validation", "test", "all")


class Items(Dataset):
    """A dataset of n states, each made from an entry, such as the state itself, a row number or the name of a file.

    A subclass whose entries are not tensors overrides `state`.

    Args:
        entries: n entries.
        labels: labels of the n states, (n,) or (n, F); an item is then (state, label).
        flip: if True, append the mirror images: item n + i is the mirror image of item i. A uniform draw over the 2n
            items replaces the random flip of the published training code, without random numbers in the dataset.
    """

    def __init__(self, entries: Sequence[Any] | np.ndarray | Tensor, labels: Tensor | None = None, flip: bool = False):
        self.entries, self.labels, self.flip = entries, labels, flip

    @property
    def mirrored(self) -> int:
        """The number of mirror images among the items."""
        return len(self.entries) if self.flip else 0

    def __len__(self) -> int:
        return len(self.entries) + self.mirrored

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        mirrored, item = divmod(range(len(self))[index], len(self.entries))
        state = self.state(self.entries[item])
        state = state.flip(-1) if mirrored else state
        return state if self.labels is None else (state, self.labels[item])

    def state(self, entry: Any) -> Tensor:
        """Return the floating-point state made from an entry."""
        return floating(entry)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError unless the argument `name` is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed if it is a gzip file."""
    content = path.read_bytes()
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


class Unreadable(ValueError):
    """A file or one of its items cannot be read; the message names it."""


@contextmanager
def reading(source: str | Path, kind: str, advice: str) -> Iterator[None]:
    """Turn an error of the block into `Unreadable`: its message says that `source` is not `kind`, why, and what to do.

    A FileNotFoundError remains one; its message names the source.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {source}: expected {kind}") from error
    except Exception as error:  # the libraries raise exceptions of many classes for damaged content
        name = "" if type(error) is ValueError else f"{type(error).__name__}: "
        reason = " ".join(f"{name}{error}".split())
        raise Unreadable(f"{source} is not {kind} ({reason}): {advice}") from error


def split_indices(
    n: int, split: str, validation: float, test: float, seed: int | None, source: str | Path
) -> np.ndarray:
    """Return the indices of a split of n samples, in ascending order. The three splits are disjoint and cover all.

    The first round(test n) indices of numpy.random.RandomState(seed).permutation(n) are "test", the next
    round(validation n) "validation", the others "train". With seed=None the samples keep the order of the source: the
    last ones are "test", those before them "validation", as suits a time series.

    Args:
        n: number of samples.
        split: "train", "validation", "test" or "all".
        validation, test: shares of the samples in these splits.
        seed: seed of the permutation, or None.
        source: name of the data in error messages.

    Raises:
        ValueError: unknown split, shares that leave nothing to train on, or an empty split.
    """
    check_choice("split", split, PARTS)
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ValueError(
            f"validation and test must be >= 0, with a sum below 1; got validation={validation}, test={test}"
        )
    order = np.arange(n)[::-1] if seed is None else np.random.RandomState(seed).permutation(n)
    first, second = round(test * n), round(test * n) + round(validation * n)
    indices = {"test": order[:first], "validation": order[first:second], "train": order[second:], "all": order}[split]
    if not len(indices):
        raise ValueError(
            f"split {split!r} of the {n} samples in {source} is empty with validation={validation}, test={test}: "
            "change these shares, or take split='all'"
        )
    return np.sort(indices)
