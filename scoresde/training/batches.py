"""The samples and the random draws of each training step: functions of (seed, step, position in the batch) alone.

A resumed run therefore continues exactly as if it had not stopped. A sample and its noise do not depend on the number
of processes that share a batch, on the number of parts that a gradient is accumulated over, or on the workers.
"""

import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from scoresde.data.items import Unreadable
from scoresde.protocols import Condition, to_device
from scoresde.random_stream import RandomStream, random_words
from scoresde.tensors import send
from scoresde.training import distributed

REPLACEMENTS = 8  # items in a row that are tried in place of one that cannot be read


def step_seed(seed: int, step: int, stream: str = "noise", size: int = 4) -> int:
    """Return a seed of `size` bytes for one stream of draws in one step; 4 bytes suit PyTorch's CPU generator."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=size).digest(), "big")


def share(count: int, rank: int, size: int) -> range:
    """Return the part of the positions 0 .. count - 1 that process `rank` of `size` gets; parts are nearly equal."""
    return range(count * rank // size, count * (rank + 1) // size)


class StepNoise(RandomStream):
    """Random draws for part of a step's batch: a sample gets the same draws, however the batch is divided.

    A draw for the whole batch must have fewer than 2^32 words of 64 bits, see `RandomStream`.

    Args:
        positions: consecutive positions in the batch.
        seed, step: the seed of the training run, and the step.
        name: name of the draws; draws with different names are independent.
    """

    def __init__(self, positions: range, seed: int, step: int, name: str = "noise"):
        super().__init__(seeds=[step_seed(seed, step, name, size=16)])
        self._positions = torch.tensor(positions, device="cpu")

    def _words(self, like: Tensor, rows: Tensor | None, size: int) -> Tensor:
        positions = self._positions if rows is None else self._positions[rows.cpu()]
        ((first, step),) = self._keys
        start = (self._numbers << 32) + size * positions
        self._numbers = self._numbers + 1
        return random_words(first + step * start, step.expand_as(start), size, like.device)


class StepBatches(Dataset):
    """A dataset whose item n is this process's share of the batch of step n, collated.

    Each epoch is a new permutation of the samples, without the last incomplete batch. If `dataset` draws from
    PyTorch's global generator, the draws for a sample depend only on the seed, the step and its position in the batch.

    A sample whose file cannot be read does not end the training run: the next sample of the dataset takes its place,
    with a warning that names the file. If eight samples in a row cannot be read, the error of the first is raised.

    Args:
        dataset: the samples.
        batch_size: samples per step in all processes together, at most the size of the dataset.
        seed: the seed of the permutations, and of the draws of `dataset`.

    Raises:
        ValueError: the batch is larger than the dataset (see `fitting`), or smaller than the number of processes.
    """

    spacing = 0x9E3779B1  # between the seeds of neighbouring items: 2^32 / 1.618...

    def __init__(self, dataset: Dataset, batch_size: int, seed: int):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.size, processes = len(dataset), distributed.size()  # type: ignore[arg-type]
        if not processes <= batch_size <= self.size:
            limits = f"{processes} (processes) and {self.size} (samples)"
            raise ValueError(f"trainer.batch_size must lie between {limits}; got {batch_size}")
        self.positions = share(batch_size, distributed.rank(), processes)
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> Any:
        epoch, index = divmod(step, self.size // self.batch_size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(step_seed(self.seed, epoch, "order"))
            self.epoch, self.order = epoch, torch.randperm(self.size, generator=generator)
        numbers = self.order[index * self.batch_size : (index + 1) * self.batch_size].tolist()
        base, items = step_seed(self.seed, step, "items"), []
        for position in self.positions:
            torch.default_generator.manual_seed((base + self.spacing * position) % 2**32)
            items.append(self._item(numbers[position]))
        return default_collate(items)

    def _item(self, number: int) -> Any:
        """Return an item, or the next one that can be read."""
        for replacement in range(number, number + REPLACEMENTS):
            try:
                return self.dataset[replacement % self.size]
            except (Unreadable, FileNotFoundError) as error:
                warnings.warn(
                    f"item {replacement % self.size} is left out, the next one is taken: {error}", stacklevel=2
                )
        return self.dataset[number]


def fitting(batch_size: int, dataset: Dataset) -> int:
    """Return the batch size, or the size of the dataset if that is smaller.

    Warns:
        UserWarning: the batch size is larger than the dataset.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if batch_size > size > 0:
        warnings.warn(
            f"batch_size={batch_size} is larger than the dataset: every batch has all {size} samples", stacklevel=2
        )
        return size
    return batch_size


def batches(
    dataset: Dataset, batch_size: int, seed: int, start: int, stop: int, workers: int = 0, pin: bool = False
) -> DataLoader:
    """Return a loader of this process's share of the batches of steps start .. stop - 1.

    Args:
        dataset: items as `split_condition` accepts them; they may draw from PyTorch's global generator.
        batch_size, seed: see `StepBatches`.
        start, stop: the range of steps.
        workers: processes that load data, each two batches ahead.
        pin: put batches in page-locked memory, for faster copies to a GPU.
    """
    steps = StepBatches(dataset, batch_size, seed)
    return DataLoader(steps, None, sampler=range(start, stop), num_workers=workers, pin_memory=pin)


def split_condition(batch: Any, device: torch.device | str) -> tuple[Tensor, Condition]:
    """Split a batch into (state, condition) and move both to the device; the condition of a plain tensor is None.

    Raises:
        TypeError: the batch is neither a tensor nor a pair (tensor, condition), or the condition is neither a tensor
            nor a dictionary of tensors.
    """
    x, cond = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    if not isinstance(x, Tensor):
        raise TypeError(f"an item of the dataset must be a tensor or (tensor, condition); got {type(x).__name__}")
    device = torch.device(device)
    for part in cond.values() if isinstance(cond, dict) else [cond]:
        if not isinstance(part, Tensor) and cond is not None:
            raise TypeError(f"a condition must be a tensor or a dict of tensors; got {type(part).__name__}")
    return send(x, device), to_device(cond, device)
