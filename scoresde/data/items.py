"""What the datasets share: items that may have labels and mirror images, and splits.

An item is a float32 tensor, the state `*` in the data's own units, or the pair (state, label).
"""

from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

PARTS = ("train", "validation", "test", "all")


class Items(Dataset):
    """A dataset of n states. A subclass has `count`, `state`, and `label` if its items have one.

    With `flip` there are 2n items, and item n + i is the mirror image of item i. A uniform draw over the items is then
    the random flip of the published trainings, and needs no random state of its own.
    """

    flip = False
    labels = False

    def __len__(self) -> int:
        return self.count() * (2 if self.flip else 1)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        mirrored, item = divmod(range(len(self))[index], self.count())
        state = self.state(item)
        state = state.flip(-1) if mirrored else state
        return (state, self.label(item)) if self.labels else state

    def count(self) -> int:
        """n, without mirror images."""
        raise NotImplementedError(f"{type(self).__name__} must define count() -> int")

    def state(self, item: int) -> Tensor:
        """The state of item 0 .. n - 1, float32."""
        raise NotImplementedError(f"{type(self).__name__} must define state(item) -> Tensor")

    def label(self, item: int) -> Tensor:
        """Its label: an int64 tensor (), or a float32 one."""
        raise NotImplementedError(f"{type(self).__name__} has no labels: define label(item) -> Tensor")


def split_indices(
    n: int, split: str, validation: float, test: float, seed: int | None, source: str | Path
) -> np.ndarray:
    """The indices of a split among n samples, in ascending order; the splits are disjoint, and together everything.

    In the order of numpy.random.RandomState(seed).permutation(n), the first round(test n) are "test", the next
    round(validation n) "validation", the others "train". Without a seed the order is that of the source and the ends
    change places: the last ones are "test", those before them "validation", as for samples in the order of time.

    Raises:
        ValueError: an unknown split, shares that leave nothing to train on, or a split without samples.
    """
    if split not in PARTS:
        raise ValueError(f"split among {', '.join(PARTS)} expected; got {split!r}")
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ValueError(
            f"validation and test as shares of the samples, below 1 together, expected; got {validation}, {test}"
        )
    order = np.arange(n)[::-1] if seed is None else np.random.RandomState(seed).permutation(n)
    first, second = round(test * n), round(test * n) + round(validation * n)
    found = {"test": order[:first], "validation": order[first:second], "train": order[second:], "all": order}[split]
    if not len(found):
        raise ValueError(
            f"one sample or more of split {split!r} expected; got none of the {n} in {source} at "
            f"validation={validation}, test={test}: take a larger share, or split='all'"
        )
    return np.sort(found)
