"""Which samples each training step sees, and from which seed it draws: functions of (seed, step) alone.

A run that is stopped and resumed then goes on exactly as if it had not been.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from scoresde.protocols import Condition


def step_seed(seed: int, step: int, stream: str = "noise") -> int:
    """The seed of a stream of draws in one step: 32 bits, for PyTorch's CPU generator ignores the higher ones."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=4).digest(), "big")


class Shuffled(Sampler[list[int]]):
    """Batches of indices: a new permutation in each epoch, the last incomplete batch left out.

    Args:
        size: of the dataset.
        batch_size: at most size.
        seed: of the permutations.
        start, stop: the range of steps to go through.

    Raises:
        ValueError: a batch larger than the dataset.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int, stop: int):
        if not 1 <= batch_size <= size:
            raise ValueError(f"a batch size from 1 to the dataset's {size} samples expected; got {batch_size}")
        self.size, self.batch_size, self.seed, self.start, self.stop = size, batch_size, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.size // self.batch_size
        order: list[int] = []
        drawn = None
        for step in range(self.start, self.stop):
            epoch, index = divmod(step, per_epoch)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(step_seed(self.seed, epoch, "order"))
                order, drawn = torch.randperm(self.size, generator=generator).tolist(), epoch
            yield order[index * self.batch_size : (index + 1) * self.batch_size]


def batches(dataset: Dataset, batch_size: int, seed: int, start: int, stop: int, workers: int = 0) -> DataLoader:
    """A loader of the batches of steps start .. stop - 1."""
    sampler = Shuffled(len(dataset), batch_size, seed, start, stop)  # type: ignore[arg-type]
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers)


def split_condition(batch: Any, device: torch.device | str) -> tuple[Tensor, Condition]:
    """(state, condition) of a batch: a tensor, or a pair (tensor, condition), moved to the device.

    Raises:
        TypeError: a batch of another kind.
    """
    x, cond = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    if not isinstance(x, Tensor):
        raise TypeError(f"a dataset whose items are a tensor, or (tensor, condition), expected; got {type(x).__name__}")
    if isinstance(cond, dict):
        return x.to(device), {key: value.to(device) for key, value in cond.items()}
    return x.to(device), cond.to(device) if isinstance(cond, Tensor) else None
