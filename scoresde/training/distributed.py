"""Several processes for one command: who this one is, and what the others have found.

`torchrun --nproc-per-node 2 -m scoresde VERB ...` starts processes that read their rank from the environment. Work is
divided without talk; the only exchange is `gather`, at the end, of plain Python values.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")
PATIENCE = timedelta(days=7)  # of a process whose share is done, for the others


def rank() -> int:
    """Number of this process among those of the command, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes the command has."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def processes() -> Iterator[None]:
    """Within the block the processes that torchrun started know each other; alone, nothing happens."""
    if started() == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def started() -> int:
    """How many processes torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device(name: str) -> str:
    """The device of that name for this process: with several, each has an accelerator of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and size() > 1 else name


def gather(value: Value) -> list[Value]:
    """The values of all processes, in the order of their ranks, in each of them."""
    if size() == 1:
        return [value]
    values: list = [None] * size()
    dist.all_gather_object(values, value)
    return values
