"""Processes of one command: alone, and two of them by gloo."""

import subprocess
import sys

import pytest

from scoresde.training import distributed

SCRIPT = """
from scoresde.training import distributed
with distributed.processes():
    gathered = distributed.gather({"rank": distributed.rank(), "uneven": list(range(distributed.rank()))})
    if distributed.rank() == 0:
        print(distributed.size(), gathered)
assert distributed.size() == 1
"""


def test_alone():
    with distributed.processes():
        assert (distributed.rank(), distributed.size()) == (0, 1)
        assert distributed.gather("x") == ["x"]


@pytest.mark.slow
def test_two_processes_gather_uneven_values(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2 [{'rank': 0, 'uneven': []}, {'rank': 1, 'uneven': [0]}]"
