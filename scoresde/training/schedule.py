"""Decays of the learning rate: functions of (step, steps, start) that multiply the optimiser's own rate.

"none" is 1. "linear" and "cosine" fall from 1 to 0 at step `steps`. "inverse_sqrt" is 1 up to step `start` and then
(step / start)^(-1/2) (EDM2, 2312.02696, appendix B).
"""

import math
from collections.abc import Callable

DECAYS: dict[str, Callable[[float, int, int], float]] = {
    "none": lambda step, steps, start: 1.0,
    "linear": lambda step, steps, start: 1 - step / steps,
    "cosine": lambda step, steps, start: 0.5 * (1 + math.cos(math.pi * step / steps)),
    "inverse_sqrt": lambda step, steps, start: 1 / math.sqrt(max(1.0, step / start)),
}
