"""Freed memory that stays with the process, and denormal numbers."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from scoresde.process_settings import keep_freed_memory
if {keep}: assert keep_freed_memory()
torch.set_num_threads(1)
for n in range(12):
    if n == 4: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12_000_000)  # 48 MB: more than glibc ever keeps by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the GNU allocator")
def test_freed_memory_is_not_fetched_anew():
    """Pages of large tensors, allocated and freed again and again, are faulted in each time; once, when kept."""
    faults = {}
    for keep in (False, True):
        found = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        faults[keep] = int(found.stdout)
    assert faults[True] < 8
    assert faults[False] >= 8  # one at least a tensor, with huge pages


DENORMAL = """
import torch
from scoresde.process_settings import tune_process
tune_process()
tiny = torch.full((4_000_000,), 1e-30)
print(int((tiny * 1e-10 != 0).sum()), int((tiny * 1e-7 != 0).sum()))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="where PyTorch can arrange it")
def test_denormal_numbers_are_zero_in_all_threads():
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, "-c", DENORMAL], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["0", "4000000"]
