"""Exponential moving average of a model's parameters, in at least float32: in bfloat16 it stalls at decays above 0.996.

    shadow <- d shadow + (1 - d) parameter,        d = min(decay, w(n)) after step n = 1, 2, ...

The shadow is the average. With w = 1 the weight of the random initial parameters falls only like decay^n. A warm-up w
forgets them sooner:

    "tensorflow"  w(n) = (1 + n) / (10 + n)        TensorFlow's ExponentialMovingAverage, and score_sde
    "edm"         w(n) = 2^(-1 / (r (n - 1)))      the training code of 2206.00364: the half-life is at most the
                                                   fraction r (`rampup_ratio`) of the n - 1 steps before; w(1) = 0
    "none"        w(n) = 1

`scoresde.training.posthoc_ema` has power-function averages, whose width is chosen after training.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scoresde.arguments import checked
from scoresde.configured import Configured
from scoresde.tensors import at_least_float32
from scoresde.training.checkpoint import restore

WARMUPS = ("tensorflow", "edm", "none")


def decay_of_half_life(half_life: float, batch_size: int = 1) -> float:
    """Return the decay that halves a step's weight within `half_life` samples, 2^(-batch_size / half_life).

    Args:
        half_life: a number of samples, or of steps if `batch_size` is 1. 2206.00364 uses 500,000 samples for CIFAR-10.
        batch_size: samples per step.

    Raises:
        ValueError: half_life or batch_size is not positive.
    """
    if not (half_life > 0 and batch_size > 0):
        raise ValueError(f"half_life and batch_size must be positive; got {half_life} and {batch_size}")
    return 2.0 ** (-batch_size / half_life)


@checked
class EMA(Configured):
    """Exponential moving average of a model's parameters, in at least float32.

        shadow <- d shadow + (1 - d) parameter,        d = min(decay, w(n)) after step n = 1, 2, ...

    Args:
        model: its trainable parameters are averaged.
        decay: in [0, 1); with 0 the average is the current parameters. See `decay_of_half_life`.
        warmup: "tensorflow", w(n) = (1 + n) / (10 + n); "edm", the half-life is at most the fraction `rampup_ratio` of
            the steps before; or "none", w = 1.
        rampup_ratio: r of the warm-up "edm"; without effect on the others.

    Raises:
        ValueError: decay is outside [0, 1), warmup is unknown, or rampup_ratio is not positive.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: str = "tensorflow", rampup_ratio: float = 0.05):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1); got {decay}")
        if warmup not in WARMUPS:
            raise ValueError(f"warmup must be one of {', '.join(WARMUPS)}; got {warmup!r}")
        if not rampup_ratio > 0:
            raise ValueError(f"rampup_ratio must be positive; got {rampup_ratio}: for no warm-up use warmup='none'")
        self.decay, self.warmup, self.rampup_ratio = decay, warmup, rampup_ratio
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: at_least_float32(p.detach().clone()) for name, p in self.parameters.items()}

    def decay_at(self, step: int) -> float:
        """Return d of the module docstring after `step` steps (1 after the first)."""
        if self.warmup == "tensorflow":
            return min(self.decay, (1 + step) / (10 + step))
        if self.warmup == "edm":
            return min(self.decay, 2 ** (-1 / (self.rampup_ratio * (step - 1))) if step > 1 else 0.0)
        return self.decay

    def update(self, step: int) -> None:
        """Add the parameters after `step` steps (1 after the first) to the average."""
        averages = list(self.shadow.values())
        current = [p.detach().to(a.dtype) for p, a in zip(self.parameters.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, current, 1 - self.decay_at(step))

    def load(self, shadow: dict[str, Tensor]) -> None:
        """Load the averages from a checkpoint.

        Raises:
            ValueError: names or shapes differ from those of the model's parameters.
        """
        restore(self.shadow, shadow)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged parameters for the duration of the block."""
        raw = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._assign(self.shadow)
        try:
            yield
        finally:
            self._assign(raw)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
