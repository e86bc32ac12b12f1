"""The statistics of a dataset in one pass: count, shape, range, moments per channel, levels, duplicates.

Moments are accumulated in float64 by the update of Chan, Golub and LeVeque (1983). A block of k values with mean m' and
variance v' joins n values with mean m and variance v by

    m  <-  m + w (m' - m)          v  <-  v + w (v' - v) + w (1 - w) (m' - m)^2,          w = k / (n + k).

The update never subtracts the square of a sum from a sum of squares, so no digits cancel.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scoresde.progress import progress_bar
from scoresde.protocols import by_name

BLOCK = 2**20  # number of values in a block
MANY = 65_536  # largest number of distinct levels that is counted


class Moments:
    """Mean and standard deviation of states that arrive in blocks (B, *), updated as the module docstring says.

    They are taken per entry of a state, or per channel (its first axis).

    Args:
        per_channel: if True, average over all axes of a block except the second; if False, over the first axis only.
    """

    def __init__(self, per_channel: bool = True):
        self.per_channel = per_channel
        self.count = 0
        self.mean = self._variance = torch.zeros((), dtype=torch.float64)

    def update(self, block: Tensor) -> None:
        """Add a block (B, *) of one sample or more."""
        values = block.double()
        if self.per_channel and values.ndim > 2:
            values = values.movedim(1, -1).flatten(0, -2)
        variance, mean = torch.var_mean(values, dim=0, correction=0)
        self.count += len(values)
        weight, step = len(values) / self.count, mean - self.mean
        self.mean = self.mean + weight * step
        self._variance = self._variance + weight * (variance - self._variance + (1 - weight) * step.square())

    @property
    def std(self) -> Tensor:
        """The standard deviation of all n values, with the divisor n, float64."""
        return self._variance.sqrt()


@dataclass(frozen=True)
class DatasetSummary:
    """The statistics of a dataset, made by `describe`.

    Attributes:
        count: number of items in the dataset.
        examined: number of items that the other statistics are computed from.
        shape: shape of a state.
        dtype: dtype of a state.
        min, max: smallest and largest value.
        mean, std: mean and standard deviation per channel, the first axis of a state (each dimension of a vector is a
            channel).
        integers: whether all values are whole numbers.
        levels: number of distinct values, if they are whole numbers and at most 65,536; otherwise None.
        not_finite: number of items with a NaN or infinite value; the statistics of states leave these items out.
        duplicates: number of items whose state equals that of an earlier item.
        shared: for each other split, by name, the number of items whose state is in that split too.
        classes: for each condition of integers, by name, the number of items with each class, also of classes that the
            dataset names and that do not occur; -1 is the null class.
        fingerprints: hashes of the states.
    """

    count: int
    examined: int
    shape: tuple[int, ...]
    dtype: str
    min: float
    max: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    integers: bool
    levels: int | None
    not_finite: int
    duplicates: int
    shared: dict[str, int]
    classes: dict[str, dict[int, int]]
    fingerprints: frozenset[bytes] = field(repr=False, compare=False)


def describe(
    dataset: Dataset,
    limit: int | None = None,
    others: Mapping[str, DatasetSummary] | None = None,
    progress: bool = False,
) -> DatasetSummary:
    """Return the statistics of a dataset.

    Args:
        dataset: items are states `*`, or (state, condition), all of one shape.
        limit: number of items to examine, evenly spaced; None for all.
        others: summaries of other splits, by name; states that are in these splits too are counted.
        progress: whether to show a progress bar.

    Raises:
        ValueError: an empty dataset, states of different shapes, no finite state, or a limit below 1.
        TypeError: an item is neither a tensor nor (tensor, condition).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more; got limit={limit}")
    n = len(dataset)  # type: ignore[arg-type]
    indices = range(n) if limit is None or limit >= n else [i * n // limit for i in range(limit)]
    total, low, high = Moments(), float("inf"), float("-inf")
    integers, levels = True, set[float]()
    fingerprints = Counter[bytes]()
    classes = {
        name: Counter(dict.fromkeys(range(len(c)), 0)) for name, c in getattr(dataset, "class_names", {}).items()
    }
    for states, labels in _blocks(dataset, progress_bar(indices, title="examining", unit="item", shown=progress)):
        for name, label in labels:
            classes.setdefault(name, Counter())[label] += 1
        finite = states[states.isfinite().reshape(len(states), -1).all(dim=1)]
        if not len(finite):
            continue
        total.update(finite)
        values = finite.numpy() + 0  # -0.0 becomes 0.0
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        if integers:
            distinct = np.unique(values)
            integers = bool((distinct == np.trunc(distinct)).all())
            levels.update(distinct.tolist() if len(levels) <= MANY else [])
        fingerprints.update(hashlib.blake2b(state.tobytes(), digest_size=16).digest() for state in values)
    if not fingerprints:
        raise ValueError(f"the dataset must have a finite state; got NaN or infinity in each of {len(indices)} items")
    return DatasetSummary(
        count=n,
        examined=len(indices),
        shape=tuple(states.shape[1:]),
        dtype=str(states.dtype).removeprefix("torch."),
        min=low,
        max=high,
        mean=tuple(total.mean.reshape(-1).tolist()),
        std=tuple(total.std.reshape(-1).tolist()),
        integers=integers,
        levels=len(levels) if integers and len(levels) <= MANY else None,
        not_finite=len(indices) - fingerprints.total(),
        duplicates=fingerprints.total() - len(fingerprints),
        shared={
            name: sum(count for mark, count in fingerprints.items() if mark in other.fingerprints)
            for name, other in (others or {}).items()
        },
        classes={name: dict(sorted(counts.items())) for name, counts in sorted(classes.items())},
        fingerprints=frozenset(fingerprints),
    )


def moments(dataset: Dataset, per_channel: bool = True) -> Moments:
    """Return the mean and standard deviation of all states of a dataset.

    Raises:
        ValueError: an empty dataset, or states of different shapes.
        TypeError: an item is neither a tensor nor (tensor, condition).
    """
    total = Moments(per_channel)
    for states, _ in _blocks(dataset, range(len(dataset))):  # type: ignore[arg-type]
        total.update(states)
    return total


def state_of(item: Any) -> Tensor:
    """Return the state of an item, on the CPU.

    Raises:
        TypeError: the item is neither a tensor nor (tensor, condition).
    """
    return _state_and_classes(item)[0]


def _state_and_classes(item: Any) -> tuple[Tensor, list[tuple[str, int]]]:
    """Return the state of an item, and the names and values of its conditions that are integers."""
    state, condition = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
    if not isinstance(state, Tensor):
        raise TypeError(f"an item of a dataset must be a tensor or (tensor, condition); got {type(item).__name__}")
    conditions = by_name(condition if isinstance(condition, (Tensor, dict)) else None).items()
    integers = [(name, x) for name, x in conditions if isinstance(x, Tensor) and not x.is_floating_point()]
    return state.detach().cpu(), [(name, int(label)) for name, label in integers if label.ndim == 0]


def _blocks(dataset: Any, indices: Iterable[int]) -> Iterator[tuple[Tensor, list[tuple[str, int]]]]:
    """Yield blocks of states (B, *) of about BLOCK values, each with the pairs (condition, class) of its states."""
    if not len(dataset):
        raise ValueError("the dataset is empty: expected at least one item")
    first, remaining = state_of(dataset[0]), iter(indices)
    size = max(1, BLOCK // max(1, first.numel()))
    while block := [_state_and_classes(dataset[i]) for i in islice(remaining, size)]:
        states, classes = zip(*block, strict=True)
        if shapes := {tuple(state.shape) for state in states} - {tuple(first.shape)}:
            raise ValueError(
                f"all states must have the same shape; got {tuple(first.shape)} and {min(shapes)}: crop or pad them"
            )
        yield torch.stack(states), [pair for pairs in classes for pair in pairs]
