"""Counting what a computation costs: evaluations of networks, and products with their Jacobians.

A score model reports each evaluation of its network (`evaluated`), to every count that is open around it (`counting`):
however many models are wrapped around it, and however often they call it, the number is that of the network. A
backward pass through the network is counted when a gradient reaches its output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

_open: ContextVar[tuple["Evaluations", ...]] = ContextVar("open counts", default=())
_products = [0]  # of one pass within `vectorised`; not a context variable: autograd calls hooks from threads of its own


@dataclass
class Evaluations:
    """How often networks were evaluated, and how many products with a Jacobian, a backward pass each, were made."""

    forward: int = 0
    backward: int = 0


@contextmanager
def counting(count: Evaluations | None = None) -> Iterator[Evaluations]:
    """Within the block, evaluations of networks are added to a count: a new one unless one is given."""
    count = Evaluations() if count is None else count
    token = _open.set((*_open.get(), count))
    try:
        yield count
    finally:
        _open.reset(token)


@contextmanager
def vectorised(number: int) -> Iterator[None]:
    """Within the block, a vectorised pass through a network, backward or with tangents, is that many products."""
    before, _products[0] = _products[0], number
    try:
        yield
    finally:
        _products[0] = before


def evaluated(output: Tensor) -> None:
    """Count an evaluation of a network by its output, and each gradient that will reach the output."""
    counts = _open.get()
    if not counts:
        return
    for count in counts:
        if _products[0]:
            count.backward += _products[0]
        else:
            count.forward += 1
    if output.requires_grad:

        def differentiated(gradient: Tensor) -> None:
            for count in counts:
                count.backward += _products[0] or 1

        output.register_hook(differentiated)
