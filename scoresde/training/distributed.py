"""Several processes for one command: who this one is, what the others have found, and how a training is shared.

`torchrun --nproc-per-node 2 -m scoresde VERB ...` starts processes that read their rank from the environment. An
evaluation divides its work without talk and gathers plain Python values at the end. In a training each process has its
share of every batch, and the gradients are averaged:

ddp     every process has the whole model; gradients are reduced while the backward pass goes on
        (DistributedDataParallel);
fsdp    parameters, gradients, moments and averages are sharded, and gathered block by block when they are needed
        (`fully_shard`, FSDP2), for models that do not fit.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from scoresde.score import ScoreModel

if TYPE_CHECKING:  # importing them takes half a second: left to those who shard
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

Value = TypeVar("Value")
PATIENCE = timedelta(days=7)  # of a process whose share is done, for the others
STRATEGIES = ("ddp", "fsdp")
CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # of blocks


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
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def started() -> int:
    """How many processes torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device(name: str) -> str:
    """The device of that name for this process: with several, each has an accelerator of its own."""
    if name != "cuda" or size() == 1:
        return name
    mine = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(mine)
    return mine


def gather(value: Value) -> list[Value]:
    """The values of all processes, in the order of their ranks, in each of them."""
    if size() == 1:
        return [value]
    values: list = [None] * size()
    dist.all_gather_object(values, value)
    return values


def total(x: Tensor) -> Tensor:
    """The sum of a tensor on the CPU over all processes, in place."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def anyone(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if size() == 1 else bool(total(torch.tensor(float(flag))))


# --- how a training is shared


class Shared:
    """An objective whose gradients are those of all processes' samples.

    Args:
        objective: a module whose call gives the loss terms of a batch.
        model: in it, what is trained.
        strategy: "ddp" or "fsdp"; of no consequence for one process.

    Raises:
        ValueError: another strategy, or "fsdp" for parameters beside the network's.
    """

    def __init__(self, objective: nn.Module, model: ScoreModel, strategy: str):
        if strategy not in STRATEGIES:
            raise ValueError(f"parallel among {', '.join(STRATEGIES)} expected; got {strategy!r}")
        self._call: nn.Module = objective
        self._sharded = shard(model) if size() > 1 and strategy == "fsdp" else None
        if size() > 1 and self._sharded is None:
            place = next(model.parameters()).device
            ids = [place] if place.type == "cuda" else None
            # A network may leave parameters out (an embedding of labels that are not given).
            self._call = DistributedDataParallel(objective, device_ids=ids, find_unused_parameters=True)

    def __call__(self, *arguments: Any) -> Any:
        """The objective of these arguments."""
        return self._call(*arguments)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Within the block gradients are added up, and exchanged for the last part of a batch only."""
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(last)
        call = self._call
        with call.no_sync() if isinstance(call, DistributedDataParallel) and not last else contextlib.nullcontext():
            yield


def shard(model: ScoreModel) -> "FSDPModule":
    """A model's network, sharded in place over all processes: each block of its containers, and what is left.

    Raises:
        ValueError: a network that is no module, or parameters beside its own, such as those of a learned path.
    """
    from torch.distributed.fsdp import fully_shard

    network = model.network
    if not isinstance(network, nn.Module):
        raise ValueError(f"a network that is a torch.nn.Module expected by parallel=fsdp; got {type(network).__name__}")
    own = {id(parameter) for parameter in network.parameters()}
    if any(id(parameter) not in own for parameter in model.parameters()):
        raise ValueError("a path without parameters expected by parallel=fsdp; take parallel=ddp for a learned one")
    mesh = init_device_mesh(next(network.parameters()).device.type, (size(),))
    for module in reversed(list(network.modules())):  # inner blocks before those that they are part of
        for block in module.children() if isinstance(module, CONTAINERS) else ():
            if not isinstance(block, CONTAINERS) and any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
    # Resharded even at the root: what an evaluation has gathered is no longer right when the weights are put back.
    return fully_shard(network, mesh=mesh, reshard_after_forward=True)


def whole(x: Tensor) -> Tensor:
    """The tensor with all its shards; every process has to ask."""
    return x.full_tensor() if _sharded(x) else x


def collected(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors in the memory of the first process, none in the others; every process has to ask."""
    found = ((name, whole(x)) for name, x in tensors.items())  # one at a time: together they may not fit
    return {name: x.detach().cpu() for name, x in found if rank() == 0}


def placed(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as another one of its shape is: its device, its shard, its layout (fused optimisers need it)."""
    if _sharded(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def _sharded(x: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor: there is none where nobody has imported them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)
