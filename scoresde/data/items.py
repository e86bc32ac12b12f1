"""The base class of the datasets, their splits, and the error of a file that cannot be read.

An item is a state, a floating-point tensor `*` in the data's own units, or a pair (state, condition). A state is
float32 if float32 holds the numbers of the source without loss. Otherwise it is float64, so that small differences
between large numbers are not lost before a transform removes the offset. A condition is a tensor, named "label" if it
holds integers and "vector" if it does not, or a dict of named tensors:

    ()    int64      a class 0 .. K - 1, or -1, the null class: the sample has no label
    (F,)  float32    a vector; all NaN if the sample has none
    (L,)  int64      a text, named "text": numbers of tokens, then -1; all -1 if the sample has none
    (C', *space)  float32    an image, named "image", for states (C, *space); all NaN if the sample has none

A dataset that knows the names of its classes has the attribute `class_names`: {name of the condition: [name of class 0,
...]}. These are the classes of the whole data, in the same order in every split. A dataset without names lacks the
attribute.
"""

import gzip
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from scoresde.configured import Configured
from scoresde.protocols import NULL, CaptionEncoder, by_name
from scoresde.tensors import floating

PARTS = ("train", "validation", "test", "all")
LABEL = "label"  # name of a condition that is a tensor of integers


class Items(Configured, Dataset):
    """A dataset of n states, each made from an entry, such as the state itself, a row number or the name of a file.

    A subclass whose entries are not tensors overrides `state`.

    Args:
        entries: n entries.
        labels: conditions of the n states, a tensor (n,) or (n, F), or a dict of them by name; an item is then
            (state, condition).
        flip: if True, append the mirror images: item n + i is the mirror image of item i. A uniform draw over the 2n
            items replaces the random flip of the published training code, without random numbers in the dataset.
        class_names: names of the classes of each condition that has class names; if empty, the attribute is not set.

    Raises:
        ValueError: the number of labels is not that of the entries, or a label is not one of the named classes.
    """

    class_names: dict[str, list[str]]

    def __init__(
        self,
        entries: Sequence[Any] | np.ndarray | Tensor,
        labels: Tensor | dict[str, Tensor] | None = None,
        flip: bool = False,
        class_names: Mapping[str, Sequence[str]] | None = None,
    ):
        self.entries, self.labels, self.flip = entries, labels, flip
        if class_names:
            self.class_names = {name: list(classes) for name, classes in class_names.items()}
        for name, values in by_name(labels).items():
            _check_labels(name, values, len(entries), (class_names or {}).get(name))

    @property
    def mirrored(self) -> int:
        """The number of mirror images among the items."""
        return len(self.entries) if self.flip else 0

    def __len__(self) -> int:
        return len(self.entries) + self.mirrored

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor | dict[str, Tensor]]:
        mirrored, item = divmod(range(len(self))[index], len(self.entries))
        state = self.state(self.entries[item])
        state = state.flip(-1) if mirrored else state
        if isinstance(self.labels, dict):
            return state, {name: values[item] for name, values in self.labels.items()}
        return state if self.labels is None else (state, self.labels[item])

    def state(self, entry: Any) -> Tensor:
        """Return the floating-point state made from an entry."""
        return floating(entry)


def listed(labels: Any) -> list[Any]:
    """Return an argument such as `labels` as a list: None gives an empty list, and a single value a list of one."""
    return [] if labels is None else list(labels) if isinstance(labels, (list, tuple)) else [labels]


def join_labels(
    keys: Sequence[str] | None, columns: Sequence[tuple[Tensor, list[str] | None]]
) -> tuple[Tensor | dict[str, Tensor] | None, dict[str, list[str]]]:
    """Convert columns of labels to the arguments `labels` and `class_names` of `Items`.

    Args:
        keys: the names of the columns, which give a dict of labels; None for a single column, which gives a tensor.
        columns: for each column, its labels and the names of its classes (None without names); may be empty.
    """
    class_names = {key: names for key, (_, names) in zip(keys or [LABEL], columns, strict=False) if names is not None}
    if keys is None:
        return (columns[0][0] if columns else None), class_names
    return {key: labels for key, (labels, _) in zip(keys, columns, strict=True)}, class_names


def described(
    labels: Tensor | dict[str, Tensor] | None, captions: Sequence[str], text: CaptionEncoder | None
) -> Tensor | dict[str, Tensor] | None:
    """Return the argument `labels` of `Items` with the conditions that an encoder makes of captions, if there is one.

    Raises:
        ValueError: the encoder makes a condition with the name of a label.
    """
    if text is None:
        return labels
    own, made = by_name(labels), text(captions)
    if both := sorted(own.keys() & made.keys()):
        raise ValueError(f"no label may have the name {both[0]!r}, which is that of the captions: rename the label")
    return {**own, **made}


def numbered(texts: Sequence[str] | np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Number the distinct texts in sorted order; return the number of each text, int64, and the distinct texts."""
    classes, numbers = np.unique(np.asarray(texts, str), return_inverse=True)
    return numbers.astype(np.int64).reshape(-1), classes.tolist()


def _check_labels(name: str, labels: Tensor, n: int, classes: Sequence[str] | None) -> None:
    """Raise ValueError unless there are n labels, and each is -1 or the number of a named class."""
    if labels.ndim < 1 or len(labels) != n:
        raise ValueError(f"{name} must have {n} values, one per sample; got shape {tuple(labels.shape)}")
    if labels.is_floating_point() or not n:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < NULL or (classes is not None and high >= len(classes)):
        last = "" if classes is None else f" .. {len(classes) - 1}"
        raise ValueError(
            f"{name} must hold classes 0{last}, or {NULL} for a sample without a class; got {low} .. {high}: number "
            "the classes from 0"
        )


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError unless the argument `name` is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed if it is a gzip file."""
    content = path.read_bytes()
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


class Unreadable(ValueError):
    """Raised for a file, or an item of a file, that cannot be read; the message names the file or item."""


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
