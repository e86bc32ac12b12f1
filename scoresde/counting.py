"""Counts of network evaluations and of products with Jacobians of networks.

A score model reports each evaluation of its network (`evaluated`) to every open `counting` block. An evaluation
counts once, however many models wrap the score model. A backward pass through the network is counted when a gradient
reaches its output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

_open: ContextVar[tuple["Evaluations", ...]] = ContextVar("open counts", default=())


@dataclass
class Evaluations:
    """Number of network evaluations (`forward`), and of products with a Jacobian, one backward pass each (`backward`).

    products: number of products in one vectorised pass, 0 outside of `vectorised`.
    """

    forward: int = 0
    backward: int = 0
    products: int = field(default=0, repr=False)


@contextmanager
def counting(count: Evaluations | None = None) -> Iterator[Evaluations]:
    """Yield a count of the network evaluations within the block; they are added to `count` if it is given.

    A gradient that reaches the output of one of these evaluations is counted too, even after the block.
    """
    count = Evaluations() if count is None else count
    token = _open.set((*_open.get(), count))
    try:
        yield count
    finally:
        _open.reset(token)


@contextmanager
def vectorised(products: int) -> Iterator[None]:
    """Count each pass through a network within the block, backward or forward-mode, as `products` Jacobian products."""
    before = [(count, count.products) for count in _open.get()]
    for count, _ in before:
        count.products = products
    try:
        yield
    finally:
        for count, number in before:
            count.products = number


def evaluated(output: Tensor) -> None:
    """Count one evaluation of a network with this output, and each gradient that will reach the output."""
    counts = _open.get()
    if not counts:
        return
    for count in counts:
        if count.products:
            count.backward += count.products
        else:
            count.forward += 1
    if output.requires_grad:

        def differentiated(gradient: Tensor) -> None:
            for count in counts:
                count.backward += count.products or 1

        output.register_hook(differentiated)
