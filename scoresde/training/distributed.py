"""The processes that torchrun starts: their ranks, values gathered from all of them, and training shared by them.

`torchrun --nproc-per-node 2 -m scoresde VERB ...` (VERB: train, sample, bpd or evaluate) starts processes that read
their rank from the environment. In an evaluation each process does its share of the work, and Python values are
gathered at the end. In a training run each process takes its share of every batch, and the gradients are averaged:

ddp     every process has the whole model; gradients are reduced during the backward pass (DistributedDataParallel);
fsdp    parameters, gradients, optimiser moments and averages are sharded, and gathered block by block when they are
        needed (`fully_shard`, FSDP2), for models too large for one device.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from scoresde.score import ScoreModel

if TYPE_CHECKING:  # importing it takes half a second, and only sharded training needs it
    from torch.distributed.fsdp import FSDPModule

Value = TypeVar("Value")
PATIENCE = "SCORESDE_PATIENCE"  # environment variable: minutes that a process waits for the others
DEFAULT_PATIENCE = 7 * 24 * 60.0  # a process that has finished its share waits for the slowest one
RELEASE = 0.5  # seconds in which Gloo frees the tensors of failed operations
STRATEGIES = ("ddp", "fsdp")
CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # they hold the blocks of a network


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def processes() -> Iterator[None]:
    """During the block, connect the processes that torchrun started; do nothing in a single process.

    A process gives up waiting for the others after the minutes in the environment variable SCORESDE_PATIENCE, by
    default a week.

    Raises:
        ValueError: SCORESDE_PATIENCE is not a positive number.
        RuntimeError: a process waited too long.
    """
    if started() == 1 or dist.is_initialized():
        yield
        return
    minutes = patience()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    has_ended = False
    try:
        yield
        dist.barrier()  # a process that ends while another still sends would abort that one
        has_ended = True
    except RuntimeError as error:
        if "Timed out" not in str(error):
            raise
        raise RuntimeError(
            f"another process did not answer within {minutes:g} minutes ({PATIENCE}): stop all processes, and run the "
            "same command to resume"
        ) from error
    finally:
        if not has_ended:
            # Gloo frees the tensors of a failed operation in a thread, which needs Python's lock. If this thread, which
            # has the lock, destroyed the group at that moment, both would wait forever.
            time.sleep(RELEASE)
        dist.destroy_process_group()


def patience() -> float:
    """Return the minutes that a process waits for the others."""
    text = os.environ.get(PATIENCE, str(DEFAULT_PATIENCE))
    minutes = float(text) if text.replace(".", "", 1).isdigit() else 0.0
    if not minutes > 0:
        raise ValueError(f"{PATIENCE} must be a positive number of minutes; got {text!r}")
    return minutes


def started() -> int:
    """Return the number of processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device(name: str) -> str:
    """Return the name of this process's device: with several processes, "cuda" is a different GPU for each."""
    if name != "cuda" or size() == 1:
        return name
    local = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(local)
    return local


def gather(value: Value) -> list[Value]:
    """Return the values of all processes, in the order of their ranks, in every process."""
    if size() == 1:
        return [value]
    values: list = [None] * size()
    dist.all_gather_object(values, value)
    return values


def total(x: Tensor) -> Tensor:
    """Sum a CPU tensor over all processes, in place."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def anyone(flag: bool) -> bool:
    """Return whether the flag is set in any process."""
    return flag if size() == 1 else bool(total(torch.tensor(float(flag))))


# --- training shared by several processes


class SharedObjective:
    """An objective whose gradients are averaged over all processes.

    Args:
        objective: a module that returns the loss terms of a batch.
        model: the model that `objective` trains.
        strategy: "ddp" or "fsdp"; no effect in a single process.

    Raises:
        ValueError: the strategy is unknown, or "fsdp" cannot shard the model.
    """

    def __init__(self, objective: nn.Module, model: ScoreModel, strategy: str):
        if strategy not in STRATEGIES:
            raise ValueError(f"parallel must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
        self._call: nn.Module = objective
        self._sharded = shard(model) if size() > 1 and strategy == "fsdp" else None
        if size() > 1 and self._sharded is None:
            place = next(model.parameters()).device
            ids = [place] if place.type == "cuda" else None
            # A network may leave parameters unused, such as the embedding of labels in an unconditional batch.
            self._call = DistributedDataParallel(objective, device_ids=ids, find_unused_parameters=True)

    def __call__(self, *arguments: Any) -> Any:
        """Return the loss terms that the objective returns for these arguments."""
        return self._call(*arguments)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """During the block, accumulate gradients; in the `last` part of a batch, average them over the processes."""
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(last)
        call = self._call
        with call.no_sync() if isinstance(call, DistributedDataParallel) and not last else contextlib.nullcontext():
            yield


def shard(model: ScoreModel) -> "FSDPModule":
    """Shard a model's network in place over all processes: each block in a module list or dict, then the remainder.

    Raises:
        ValueError: the network is not a module, or the model has parameters outside the network (a learned SDE).
    """
    from torch.distributed.fsdp import fully_shard

    network = model.network
    if not isinstance(network, nn.Module):
        raise ValueError(f"parallel=fsdp needs a torch.nn.Module as network; got {type(network).__name__}")
    if set(model.parameters()) - set(network.parameters()):
        raise ValueError("parallel=fsdp cannot shard parameters outside the network (a learned SDE): use parallel=ddp")
    mesh = init_device_mesh(next(network.parameters()).device.type, (size(),))
    for module in reversed(list(network.modules())):  # inner blocks before those that contain them
        for block in module.children() if isinstance(module, CONTAINERS) else ():
            if not isinstance(block, CONTAINERS) and any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
    if isinstance(uncertainty := getattr(network, "uncertainty", None), nn.Module):
        fully_shard(uncertainty, mesh=mesh)  # losses evaluate it by itself, after the network
    # Reshard the root too: an evaluation gathers averaged weights, which are outdated once the raw ones are restored.
    return fully_shard(network, mesh=mesh, reshard_after_forward=True)


def whole(x: Tensor) -> Tensor:
    """Return the whole of a sharded tensor; every process must call this function."""
    return x.full_tensor() if _is_sharded(x) else x  # type: ignore[attr-defined]


def collect(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather tensors into the CPU memory of the first process; the others, which must call it too, get {}."""
    gathered = ((name, whole(x)) for name, x in tensors.items())  # one at a time: together they may not fit
    return {name: x.detach().cpu() for name, x in gathered if rank() == 0}


def place_like(x: Tensor, like: Tensor) -> Tensor:
    """Return x with the device, the sharding and the memory format of `like`; fused optimisers need the same format."""
    if _is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def sharded_like(x: Tensor, like: Tensor) -> Tensor:
    """Return x with the sharding of `like`; every process must call this function. x itself if `like` is whole."""
    return place_like(x, like) if _is_sharded(like) else x


def _is_sharded(x: Tensor) -> bool:
    """Return whether x is a DTensor, without importing that class."""
    return hasattr(x, "placements")
