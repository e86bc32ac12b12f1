"""Learning rates: a linear warm-up and a decay, as a fraction of the optimiser's own rate."""

import math
from collections.abc import Callable

DECAYS: dict[str, Callable[[float, int, int], float]] = {
    "none": lambda step, steps, start: 1.0,
    "linear": lambda step, steps, start: 1 - step / steps,
    "cosine": lambda step, steps, start: 0.5 * (1 + math.cos(math.pi * step / steps)),
    "inverse_sqrt": lambda step, steps, start: 1 / math.sqrt(max(1.0, step / start)),
}


def rate(step: int, steps: int, warmup: int, decay: str, decay_start: int) -> float:
    """Return the rate of step 0 .. steps - 1.

    Args:
        step: the step.
        steps: length of the training.
        warmup: length of the linear warm-up, in steps.
        decay: "none"; "linear" or "cosine" to 0 at the last step; "inverse_sqrt", 1 up to decay_start and then
            (step / decay_start)^(-1/2) (EDM2, 2312.02696, appendix B).
        decay_start: in steps, positive.
    """
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return warm * DECAYS[decay](step, steps, decay_start)
