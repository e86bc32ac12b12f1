"""What a dataset holds, in one pass: count, shape, range, moments per channel, levels, duplicates.

Moments are accumulated in float64 by the update of Chan, Golub and LeVeque (1983), block by block: of n values with
mean m and sum of squared deviations S, and a block of k with m' and S',

    m  <-  m + (m' - m) k / (n + k)          S  <-  S + S' + (m' - m)^2 n k / (n + k).

There is no sum of squares to cancel against the square of a sum.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scoresde.progress import progress_bar

BLOCK = 2**20  # values at once
MANY = 65_536  # distinct levels, beyond which they are not counted


class Moments:
    """Mean and variance of blocks (B, *), per entry of `*` or per entry of its first axis (see the module).

    Args:
        per_channel: over all axes but the second of the blocks; False: over the first alone.
    """

    def __init__(self, per_channel: bool = True):
        self.per_channel = per_channel
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def update(self, block: Tensor) -> None:
        """Take in a block (B, *) of one sample or more."""
        values = block.double()
        if self.per_channel and values.ndim > 2:
            values = values.movedim(1, -1).flatten(0, -2)
        mean = values.mean(dim=0)
        squares, k = (values - mean).square().sum(dim=0), len(values)
        share, step = k / (self.count + k), mean - self.mean
        self._squares = self._squares + squares + step.square() * self.count * share
        self.mean = self.mean + step * share
        self.count += k

    @property
    def std(self) -> Tensor:
        """Standard deviation of the values seen (division by their number), float64."""
        return (self._squares / self.count).sqrt()


@dataclass(frozen=True)
class DatasetSummary:
    """What `describe` found.

    Attributes:
        count: items in the dataset.
        examined: of these, how many the other figures rest on.
        shape: of a state.
        dtype: of a state.
        min, max: over all values.
        mean, std: per channel, the first axis of a state (in a vector each dimension is one).
        integers: whether every value is a whole number.
        levels: distinct values where they are whole numbers; None where they are not, or are more than 65,536.
        not_finite: items with a value that is NaN or infinite; the other figures leave these out.
        duplicates: items that equal an earlier one, value for value.
        shared: items that are in another split too, by its name.
        classes: items of each label, where labels are whole numbers.
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
    classes: dict[int, int]
    fingerprints: frozenset[bytes] = field(repr=False, compare=False)


def describe(
    dataset: Dataset,
    limit: int | None = None,
    others: Mapping[str, DatasetSummary] | None = None,
    progress: bool = False,
) -> DatasetSummary:
    """The statistics of a dataset.

    Args:
        dataset: items are states `*`, or (state, condition), all of one shape.
        limit: examine at most so many items, spread evenly; all by default.
        others: of further splits, by name: which items are in these too.
        progress: show a progress bar.

    Raises:
        ValueError: no item, items of different shapes, no item with finite values, or a limit below 1.
        TypeError: items of another kind.
    """
    indices = _spread(len(dataset), limit)  # type: ignore[arg-type]
    seen, found = _Seen(), Moments()
    shared: Counter[str] = Counter(dict.fromkeys(others or {}, 0))
    first: Tensor | None = None
    block: list[Tensor] = []
    for index in progress_bar(indices, title="examining", unit="item", shown=progress):
        item = dataset[index]
        state, label = state_of(item), _label(item)
        first = state if first is None else first
        if state.shape != first.shape:
            raise ValueError(
                f"items of one shape expected; item {indices[0]} is {tuple(first.shape)}, item {index} "
                f"{tuple(state.shape)}: crop or pad them"
            )
        mark = seen.take(state, label)
        shared.update(name for name, other in (others or {}).items() if mark in other.fingerprints)
        if mark is not None:
            block.append(state)
        if block and (index == indices[-1] or len(block) * max(1, state.numel()) >= BLOCK):
            found.update(torch.stack(block))
            block = []
    if first is None or not found.count:
        raise ValueError(f"one item with finite values or more expected; got none among {len(indices)}")
    return DatasetSummary(
        count=len(dataset),  # type: ignore[arg-type]
        examined=len(indices),
        shape=tuple(first.shape),
        dtype=str(first.dtype).removeprefix("torch."),
        min=seen.low,
        max=seen.high,
        mean=tuple(found.mean.reshape(-1).tolist()),
        std=tuple(found.std.reshape(-1).tolist()),
        integers=seen.integers,
        levels=len(seen.levels) if seen.integers and len(seen.levels) <= MANY else None,
        not_finite=seen.not_finite,
        duplicates=seen.duplicates,
        shared=dict(shared),
        classes=dict(sorted(seen.classes.items())),
        fingerprints=frozenset(seen.marks),
    )


def moments(dataset: Dataset, per_channel: bool = True) -> Moments:
    """Mean and standard deviation of all states of a dataset.

    Raises:
        ValueError: no item.
        TypeError: items of another kind.
    """
    found = Moments(per_channel)
    for block in _blocks(dataset):
        found.update(block)
    return found


class _Seen:
    """What is known of the items so far, but for the moments."""

    def __init__(self) -> None:
        self.low, self.high, self.integers = float("inf"), float("-inf"), True
        self.levels: set[float] = set()
        self.marks: set[bytes] = set()
        self.classes: Counter[int] = Counter()
        self.not_finite = self.duplicates = 0

    def take(self, state: Tensor, label: int | None) -> bytes | None:
        """Take in an item; its fingerprint, None if it is not finite."""
        if label is not None:
            self.classes[label] += 1
        if not bool(torch.isfinite(state).all()):
            self.not_finite += 1
            return None
        values = np.ascontiguousarray(state.numpy() + 0)  # -0.0 is 0.0
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        if self.integers:
            levels = np.unique(values)
            self.integers = bool(np.array_equal(levels, np.trunc(levels)))
            if len(self.levels) <= MANY:
                self.levels.update(levels.tolist())
        mark = hashlib.blake2b(values.tobytes(), digest_size=16).digest()
        self.duplicates += mark in self.marks
        self.marks.add(mark)
        return mark


def state_of(item: Any) -> Tensor:
    """The state of an item, on the CPU.

    Raises:
        TypeError: neither a tensor nor (tensor, condition).
    """
    state = item[0] if _is_pair(item) else item
    if not isinstance(state, Tensor):
        raise TypeError(f"items that are a tensor, or (tensor, condition), expected; got {type(item).__name__}")
    return state.detach().cpu()


def _label(item: Any) -> int | None:
    """The label of an item, if it has one that is a whole number."""
    label = item[1] if _is_pair(item) else None
    if isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point():
        return int(label)
    return None


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2


def _spread(n: int, limit: int | None) -> Sequence[int]:
    """At most so many of n indices, evenly spread."""
    if n < 1 or (limit is not None and limit < 1):
        raise ValueError(f"one item or more, and limit >= 1, expected; got {n} items, limit={limit}")
    if limit is None or limit >= n:
        return range(n)
    return [i * n // limit for i in range(limit)]


def _blocks(dataset: Dataset) -> Iterator[Tensor]:
    """The states of a dataset, (B, *) at a time."""
    block: list[Tensor] = []
    for index in _spread(len(dataset), None):  # type: ignore[arg-type]
        block.append(state_of(dataset[index]))
        if len(block) * max(1, block[0].numel()) >= BLOCK:
            yield torch.stack(block)
            block = []
    if block:
        yield torch.stack(block)
