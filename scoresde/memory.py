"""Memory that a process of its own may keep: handed back and fetched anew otherwise.

A network's activations are allocated and freed at every evaluation, megabytes each. By default glibc maps and unmaps
them, and the kernel fills each page with zeros again: for the network of the digits on a processor an eighth of the
time, and most of its scatter. A process that has nothing else to do had better keep them. This is for programs (the
command line, the benchmarks): a library does not change the allocator of whoever imports it.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """From now on freed memory stays with this process, to be used again; whether that could be arranged (glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
