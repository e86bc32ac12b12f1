"""What each training step sees and draws: functions of (seed, step, position in the batch) alone.

A run that is stopped and resumed then goes on exactly as if it had not been, and neither the number of processes that
share a batch, nor the parts it is accumulated in, nor the workers that load it change what a sample is or what noise it
gets.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from scoresde.protocols import Condition
from scoresde.random_stream import RandomStream, random_words
from scoresde.tensors import send


def step_seed(seed: int, step: int, stream: str = "noise", size: int = 4) -> int:
    """The seed of a stream of draws in one step, of `size` bytes: 4, as PyTorch's CPU generator ignores the others."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=size).digest(), "big")


def share(count: int, rank: int, size: int) -> range:
    """The positions among `count` that belong to a process: consecutive ones, of all processes nearly as many."""
    return range(count * rank // size, count * (rank + 1) // size)


class StepNoise(RandomStream):
    """The draws of some positions of a step's batch: parts of the draws of one stream for the whole batch.

    A draw of the whole batch has less than 2^32 words of 64 bits, see `RandomStream`.

    Args:
        positions: n consecutive ones of the batch.
        seed, step: see the module.
    """

    def __init__(self, positions: range, seed: int, step: int):
        super().__init__(seeds=[step_seed(seed, step, size=16)])
        self._positions = torch.tensor(positions, device="cpu")

    def _words(self, like: Tensor, rows: Tensor | None, size: int) -> Tensor:
        positions = self._positions if rows is None else self._positions[rows.cpu()]
        ((first, step),) = self._keys
        start = (self._numbers << 32) + size * positions
        self._numbers = self._numbers + 1
        return random_words(first + step * start, step.expand_as(start), size, like.device)


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
            raise ValueError(
                f"a batch size from 1 to the dataset's {size} samples expected; got {batch_size}: "
                "set trainer.batch_size"
            )
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


class Key(NamedTuple):
    """An item of a batch, and the seed of what it draws at random."""

    seed: int
    item: int


class Keys(Sampler[list[Key]]):
    """The items of some positions of each batch. Neighbours' seeds are 2^32 / 1.618... apart."""

    spacing = 0x9E3779B1

    def __init__(self, order: Shuffled, positions: range):
        self.order, self.positions = order, positions

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[Key]]:
        for step, batch in enumerate(self.order, start=self.order.start):
            base = step_seed(self.order.seed, step, "items")
            yield [Key((base + self.spacing * i) % 2**32, batch[i]) for i in self.positions]


class Keyed(Dataset):
    """A dataset by keys. What an item draws from PyTorch's global generator depends on its key alone."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: Key) -> Any:
        torch.default_generator.manual_seed(key.seed)
        return self.dataset[key.item]


def batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    workers: int = 0,
    rank: int = 0,
    size: int = 1,
    pin: bool = False,
) -> DataLoader:
    """A loader of a process's share of the batches of steps start .. stop - 1.

    Args:
        dataset: items as `split_condition` takes them; may draw from PyTorch's global generator.
        batch_size: of all processes together.
        seed, start, stop: see `Shuffled`.
        workers: processes that load, two batches ahead each.
        rank, size: this process, of how many.
        pin: in page-locked memory, for an accelerator.

    Raises:
        ValueError: fewer samples in a batch than processes.
    """
    order = Shuffled(len(dataset), batch_size, seed, start, stop)  # type: ignore[arg-type]
    if batch_size < size:
        raise ValueError(f"a batch of {size} samples or more, one a process, expected; got batch_size={batch_size}")
    keys = Keys(order, share(batch_size, rank, size))
    return DataLoader(Keyed(dataset), batch_sampler=keys, num_workers=workers, pin_memory=pin)


def split_condition(batch: Any, device: torch.device | str) -> tuple[Tensor, Condition]:
    """(state, condition) of a batch: a tensor, or a pair (tensor, condition), moved to the device.

    Raises:
        TypeError: a batch of another kind, or a condition that is neither a tensor nor a dictionary of tensors.
    """
    x, cond = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    if not isinstance(x, Tensor):
        raise TypeError(f"a dataset whose items are a tensor, or (tensor, condition), expected; got {type(x).__name__}")
    device = torch.device(device)
    for part in cond.values() if isinstance(cond, dict) else [cond]:
        if not isinstance(part, Tensor) and cond is not None:
            raise TypeError(f"a condition that is a tensor, or a dict of tensors, expected; got {type(part).__name__}")
    if isinstance(cond, dict):
        return send(x, device), {key: send(value, device) for key, value in cond.items()}
    return send(x, device), None if cond is None else send(cond, device)
