"""Exponential moving average of a model's parameters.

    shadow <- d shadow + (1 - d) parameter,        d = min(decay, w(n)) after step n = 1, 2, ...

With w = 1 the parameters before training, noise, fade only like decay^n; a warm-up w forgets them sooner:

    "tensorflow"  w(n) = (1 + n) / (10 + n)        TensorFlow's ExponentialMovingAverage, and score_sde
    "edm"         w(n) = 2^(-1 / (r (n - 1)))      the training code of 2206.00364: the half-life is at most the
                                                   fraction r (`rampup_ratio`) of the training before step n; w(1) = 0
    "none"        w(n) = 1

Averages with another profile, and of which the width is chosen after training: `scoresde.training.posthoc`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WARMUPS = ("tensorflow", "edm", "none")


def decay_of_half_life(half_life: float, batch_size: int = 1) -> float:
    """The decay at which a step's share halves within `half_life` samples, 2^(-batch_size / half_life).

    Args:
        half_life: in samples; in steps with the default batch size. 2206.00364 has 500 000 for CIFAR-10.
        batch_size: samples a step.

    Raises:
        ValueError: a half-life or a batch size that is not positive.
    """
    if not (half_life > 0 and batch_size > 0):
        raise ValueError(f"half_life > 0 and batch_size > 0 expected; got {half_life} and {batch_size}")
    return 2.0 ** (-batch_size / half_life)


class EMA:
    """shadow <- d shadow + (1 - d) parameter after every step, d = min(decay, w(n)) at step n.

    Args:
        model: whose trainable parameters are averaged.
        decay: in [0, 1); 0 keeps the parameters themselves. See `decay_of_half_life`.
        warmup: "tensorflow", "edm" or "none": which w, see above.
        rampup_ratio: r of "edm"; without effect for the others.

    Raises:
        ValueError: a decay outside [0, 1), another warm-up, or a ratio that is not positive.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: str = "tensorflow", rampup_ratio: float = 0.05):
        if not 0 <= decay < 1:
            raise ValueError(f"a decay in [0, 1) expected; got {decay}")
        if warmup not in WARMUPS:
            raise ValueError(f"a warm-up of the average among {', '.join(map(repr, WARMUPS))} expected; got {warmup!r}")
        if not rampup_ratio > 0:
            raise ValueError(f"rampup_ratio > 0 expected, for no ramp-up warmup='none'; got {rampup_ratio}")
        self.decay, self.warmup, self.rampup_ratio = decay, warmup, rampup_ratio
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    def decay_at(self, step: int) -> float:
        """What the average keeps of itself at a step, from 1."""
        if self.warmup == "tensorflow":
            return min(self.decay, (1 + step) / (10 + step))
        if self.warmup == "edm":
            return min(self.decay, 2 ** (-1 / (self.rampup_ratio * (step - 1))) if step > 1 else 0.0)
        return self.decay

    def update(self, step: int) -> None:
        """Account for the parameters after `step` steps (1 after the first)."""
        rate = 1 - self.decay_at(step)
        current = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), current, rate)

    def load(self, shadow: dict[str, Tensor]) -> None:
        """Take the averages over from a checkpoint.

        Raises:
            ValueError: a parameter that is missing there, or of another shape.
        """
        take_over(self.shadow, shadow)

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


def take_over(averages: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Copy stored averages into those of a model.

    Raises:
        ValueError: an average that is missing in what was stored, or of another shape; nothing is copied then.
    """
    for name, average in averages.items():
        if name not in stored or stored[name].shape != average.shape:
            found = tuple(stored[name].shape) if name in stored else "nothing"
            raise ValueError(f"the stored averages do not fit: {name} {tuple(average.shape)} expected, got {found}")
    for name, average in averages.items():
        average.copy_(stored[name])
