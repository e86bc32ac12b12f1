"""The timer of all benchmarks."""

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(run: Callable[[], Any], device: str) -> float:
    """Return the seconds of one call, including the kernels that it launches on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
