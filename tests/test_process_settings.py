"""Freed memory that stays with the process, and denormal numbers."""

import json
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, torch
from scoresde.process_settings import keep_freed_memory, tune_process

def faults():
    for n in range(12):
        if n == 4: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(12_000_000)  # 48 MB: more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
before, kept, after = faults(), keep_freed_memory(), faults()
torch.set_num_threads(2)
tune_process()
tiny = torch.full((4_000_000,), 1e-30)
nonzero = [int((tiny * factor != 0).sum()) for factor in (1e-10, 1e-7)]
print(json.dumps({"before": before, "kept": kept, "after": after, "nonzero": nonzero}))
"""


@pytest.fixture(scope="module")
def measured():
    """What a process of its own measures."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the GNU allocator")
def test_kept_memory_is_not_faulted_in_again(measured):
    """Pages of large tensors, allocated and freed again and again, are faulted in each time; once, when kept."""
    assert measured["kept"]
    assert measured["after"] < 8
    assert measured["before"] >= 8  # at least one a tensor, with huge pages


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="PyTorch cannot arrange it elsewhere")
def test_denormal_numbers_are_zero_in_all_threads(measured):
    assert measured["nonzero"] == [0, 4_000_000]
