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


BROKEN = """
from scoresde.training import distributed
with distributed.processes():
    if distributed.rank() == 1:
        raise SystemExit("rank 1 gives up")
    distributed.gather(0)
"""


def run(script, directory):
    path = directory / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_two_processes_gather_uneven_values(tmp_path):
    done = run(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2 [{'rank': 0, 'uneven': []}, {'rank': 1, 'uneven': [0]}]"


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(tmp_path):
    done = run(BROKEN, tmp_path)
    assert done.returncode != 0
    assert "rank 1 gives up" in done.stderr
