"""Exponential moving average of a model's parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """shadow <- d shadow + (1 - d) parameter after every step, d = min(decay, (1 + n) / (10 + n)) at step n.

    The warm-up forgets the first steps' noise (the rule of TensorFlow's ExponentialMovingAverage, which score_sde
    uses too).

    Args:
        model: whose trainable parameters are averaged.
        decay: in [0, 1); 0 keeps the parameters themselves.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"a decay in [0, 1) expected; got {decay}")
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    def update(self, step: int) -> None:
        """Account for the parameters after `step` steps (1 after the first)."""
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        current = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), current, rate)

    def load(self, shadow: dict[str, Tensor]) -> None:
        """Take the averages over from a checkpoint."""
        for name, average in self.shadow.items():
            average.copy_(shadow[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averaged parameters."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._assign(self.shadow)
        try:
            yield
        finally:
            self._assign(kept)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
