"""The one clock of the benchmarks."""

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(run: Callable[[], Any], device: str) -> float:
    """The time of one call, with all that it left to an accelerator."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
