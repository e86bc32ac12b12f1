"""What makes a process of its own faster, and is not for a library to decide over whoever imports it.

Freed memory. A network's activations are allocated and freed at every evaluation, megabytes each. By default glibc maps
and unmaps them, and the kernel fills each page with zeros again: for the network of the digits on a processor an eighth
of the time, and most of its scatter. A process that has nothing else to do had better keep them.

Denormal numbers. Where a posterior is almost certain, gradients fall below 1e-38, float32's smallest normal number.
Processors compute with what is left below it many times slower (a twentieth of a training step of the digits); taken
for zero, nothing else changes.

The command line and the benchmarks do both.
"""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
NEVER = 2**31 - 1


def tune_process() -> None:
    """Arrange both, as far as this machine can; before the first computation, so that all threads take it over."""
    keep_freed_memory()
    torch.set_flush_denormal(True)


def keep_freed_memory() -> bool:
    """From now on freed memory stays with this process, to be used again; whether that could be arranged (glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
