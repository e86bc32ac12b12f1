"""Counting what a computation costs: evaluations of networks, and products with their Jacobians.

A score model reports each evaluation of its network (`evaluated`), to every count that is open around it (`counting`):
however many models are wrapped around it, and however often they call it, the number is that of the network. A
backward pass through the network is counted when a gradient reaches its output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

_open: ContextVar[tuple["Evaluations", ...]] = ContextVar("open counts", default=())


@dataclass
class Evaluations:
    """How often networks were evaluated, and how many products with a Jacobian, a backward pass each, were made.

    products: of one vectorised pass, 0 outside of `vectorised`.
    """

    forward: int = 0
    backward: int = 0
    products: int = field(default=0, repr=False)


@contextmanager
def counting(count: Evaluations | None = None) -> Iterator[Evaluations]:
    """Evaluations of networks within the block are added to a count: a new one unless one is given.

    A gradient that reaches one of their outputs is added as well, also after the block.
    """
    count = Evaluations() if count is None else count
    token = _open.set((*_open.get(), count))
    try:
        yield count
    finally:
        _open.reset(token)


@contextmanager
def vectorised(products: int) -> Iterator[None]:
    """Within the block, a pass through a network, backward or with tangents, is that many products."""
    before = [(count, count.products) for count in _open.get()]
    for count, _ in before:
        count.products = products
    try:
        yield
    finally:
        for count, number in before:
            count.products = number


def evaluated(output: Tensor) -> None:
    """Count an evaluation of a network by its output, and each gradient that will reach the output."""
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
