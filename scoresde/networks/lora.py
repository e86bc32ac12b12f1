r"""Low-rank adapters of a network's weights (LoRA, 2106.09685).

Each weight matrix W (m, n) of a linear layer, or of a convolution with n the inputs of its kernel, becomes

    W + (scale / r) U D,        U (m, r) zero at first,        D (r, n) from N(0, 1/n),

where W is fixed and U and D are trained. The rank r is at most min(m, n). At first the adapted network has the outputs
of the network itself, bit for bit. Its inputs and outputs have the same shapes, so that everything that accepts a
network accepts it. It trains r (m + n) numbers for each matrix in place of m n; the optimiser, the average of the
weights and the file of `save_adapters` hold only these.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from scoresde.arguments import Count, Positive, check
from scoresde.atomic_files import replace_atomically
from scoresde.networks.embeddings import LatentEmbedding, TargetEmbedding
from scoresde.networks.layers import CONVOLUTIONS
from scoresde.networks.magnitude_layers import MagnitudeLayer

ADAPTED: Any = (nn.Linear, MagnitudeLayer, *CONVOLUTIONS.values())


class LowRank(nn.Module):
    """The map W -> W + (scale / r) U D of the module docstring, of a weight W (m, *) flattened to (m, n)."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rank = min(rank, rows, columns)
        self.factor = scale / rank
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        self.down = nn.Parameter(torch.randn_like(weight.new_empty(rank, columns)) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.factor * self.up @ self.down).view_as(weight)


def add_lora(network: nn.Module, rank: int, scale: float = 1.0, full: Iterable[str] | None = None) -> nn.Module:
    """Adapt every linear layer and convolution of a network in place, and freeze its other parameters; return it.

    Args:
        network: any network with `torch.nn.Linear` or convolution layers.
        rank: rank r of the update U D of each weight matrix.
        scale: the factor of U D, times r.
        full: names of submodules that are trained in full, without adapters; default: the embeddings of a flow map's
            target time and of a generator's latent, which start untrained.

    Raises:
        TypeError, ValueError: rank or scale is not positive.
        ValueError: the network already has adapters, has no layer to adapt, or has no submodule of a name in `full`.
    """
    check("rank", rank, Count)
    check("scale", scale, Positive)
    names = dict(network.named_modules())
    new = (TargetEmbedding, LatentEmbedding)
    whole: set[nn.Module] = set()
    for name in [key for key, part in names.items() if isinstance(part, new)] if full is None else full:
        if name not in names or not name:
            raise ValueError(f"full must be names of submodules of the network; got {name!r}")
        whole |= set(names[name].modules())
    if any(_adapters_of(module) for module in names.values()):
        raise ValueError("the network must have no adapters; got one with adapters: call merge_lora(network) first")
    chosen = [module for module in names.values() if isinstance(module, ADAPTED) and module not in whole]
    if not chosen:
        raise ValueError("the network must have linear layers or convolutions outside `full`; got none")
    network.requires_grad_(False)
    for module in whole:
        module.requires_grad_(True)
    for module in chosen:
        weight: Any = module.weight
        parametrize.register_parametrization(module, "weight", LowRank(weight.detach(), rank, scale))
    return network


def merge_lora(network: nn.Module) -> nn.Module:
    """Add the adapters of `add_lora` to the weights in place and remove them, as if the network had none; return it.

    All parameters require a gradient afterwards. The network keeps its outputs to floating-point precision.

    Args:
        network: a network with adapters.

    Raises:
        ValueError: the network has no adapters.
    """
    _check_adapted(network)
    for module in list(network.modules()):
        if _adapters_of(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return network.requires_grad_(True)


def adapters(network: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors of an adapted network by name: U, D, and the parameters of the submodules `full`.

    Raises:
        ValueError: the network has no adapters.
    """
    _check_adapted(network)
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def save_adapters(network: nn.Module, path: str | Path) -> None:
    """Write the trained tensors of an adapted network, `adapters(network)`, to a safetensors file, atomically.

    Args:
        network: a network with adapters, see `add_lora`.
        path: the file to write.

    Raises:
        ValueError: the network has no adapters.
        OSError: the file cannot be written, for example because the disk is full.
    """
    tensors = {name: x.cpu().contiguous() for name, x in adapters(network).items()}
    replace_atomically(Path(path), lambda temporary: temporary.write_bytes(save(tensors)))


@torch.no_grad()
def load_adapters(network: nn.Module, path: str | Path) -> nn.Module:
    """Load the file of `save_adapters` into a network with the same adapters, in place; return the network.

    Args:
        network: a network with adapters of the same rank, see `add_lora`.
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the network has no adapters, or the file has tensors of other names, shapes or types; nothing is
            copied then.
    """
    own = adapters(network)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no adapters at {path}; save_adapters writes them")
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
    for name in sorted(own.keys() | stored.keys()):
        expected, got = (_described(part.get(name)) for part in (own, stored))
        if expected != got:
            raise ValueError(
                f"the adapters in {path} must be those of the network, with the same rank and `full`: expected {name} "
                f"to be {expected}; got {got}"
            )
    for name, value in own.items():
        value.copy_(stored[name])
    return network


def _described(x: Tensor | None) -> str:
    return "absent" if x is None else f"{x.dtype} {tuple(x.shape)}"


def _adapters_of(module: nn.Module) -> list[LowRank]:
    """Return the adapters of a layer's weight."""
    if not parametrize.is_parametrized(module, "weight"):
        return []
    parametrizations: Any = module.parametrizations
    return [part for part in parametrizations.weight if isinstance(part, LowRank)]


def _check_adapted(network: nn.Module) -> None:
    if not any(_adapters_of(module) for module in network.modules()):
        raise ValueError("the network must have adapters; got none: call add_lora(network, rank) first")
