"""Settings that make a process faster, which a library must not impose on the programs that import it.

Freed memory: the activations of a network, megabytes each, are allocated and freed at every evaluation. By default
glibc maps and unmaps them, and the kernel fills each page with zeros again. For the network of the digits on a CPU this
takes an eighth of the run time, and causes most of the variation of the run time. `keep_freed_memory` makes glibc keep
the memory.

Denormal numbers: where a posterior is almost certain, gradients fall below 1e-38, the smallest normal number of
float32. CPUs compute many times slower with denormal numbers than with normal ones (they take a twentieth of a training
step on the digits). Flushing them to zero has no other effect.

The command line and the benchmarks set both.
"""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
NEVER = 2**31 - 1


def tune_process() -> None:
    """Keep freed memory and flush denormal numbers to zero, as far as the machine allows.

    Call it first, so that all threads inherit both settings.
    """
    keep_freed_memory()
    torch.set_flush_denormal(True)


def keep_freed_memory() -> bool:
    """Make the process keep freed memory for reuse; return whether this succeeded (glibc only)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
