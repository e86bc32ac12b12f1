"""Outputs of a network's inner layers: read them as features, or change them.

A layer is a module of the network with a name, such as "up.8x8.block0" of a `networks.UNet`. While `hooked` is open,
every evaluation of the network passes the layer's output y to a function; the network continues with its result,

    y  <-  change(y),

or with y itself if the result is None. `ScoreModel.features` reads outputs in this way (DIFT, 2306.03881, section 4.1),
and `wrappers.Modulated` changes them (EmerDiff, 2401.11739, section 3.3).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import Tensor, nn

Change = Callable[[Tensor], Tensor | None]
NEAR = 3  # number of names that a message suggests


@contextmanager
def hooked(network: Any, changes: Mapping[str, Change]) -> Iterator[None]:
    """Apply `changes`, by name of the layer, in every evaluation of `network`.

    Raises:
        TypeError: the network is not a `torch.nn.Module`; or, in an evaluation, a layer's output is not a tensor.
        ValueError: the network has no layer of this name.
    """
    layers = [(layer_named(network, name), name, change) for name, change in changes.items()]
    handles = [layer.register_forward_hook(partial(_apply, name, change)) for layer, name, change in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_named(network: Any, name: str) -> nn.Module:
    """Return the layer `name` of a network; see `hooked` for the errors."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"a network with named layers must be a torch.nn.Module; got {type(network).__name__}")
    layers = {known: layer for known, layer in network.named_modules() if known}
    if name not in layers:
        near = get_close_matches(str(name), list(layers), n=NEAR, cutoff=0.0)
        raise ValueError(
            f"at must be the name of a layer of {type(network).__name__}; got {name!r}: choose one of its "
            f"named_modules(), such as {', '.join(near) or 'none (it has no layers)'}"
        )
    return layers[name]


def _apply(name: str, change: Change, layer: nn.Module, inputs: Any, output: Any) -> Tensor | None:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the layer {name} must return a tensor; got {type(output).__name__}: choose a layer inside it, or the next"
        )
    return change(output)
