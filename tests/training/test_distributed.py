"""Processes of one command: alone, and two of them by gloo."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scoresde.training import checkpoint, distributed
from scoresde.training.log import LOG
from scoresde.training.state import CHECKPOINT

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


def torchrun(processes, *command):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


def run(script, directory):
    path = directory / "script.py"
    path.write_text(script)
    return torchrun(2, path)


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


TRAINING = """
import sys
from functools import partial
from pathlib import Path
import torch
from scoresde.losses import DenoisingScoreMatching, SlicedScoreMatching
from scoresde.training import Trainer, distributed
from tests.training.test_trainer import ADAM, Watched, new_model
from scoresde.data import Levels
from scoresde.dequantization import DataMap, Uniform

run, strategy, batch, objective = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]


def evaluated(model, step):
    with torch.no_grad():
        assert bool(torch.isfinite(model.noise(torch.zeros(4, 2), 0.5)).all())


loss = SlicedScoreMatching() if objective == "sliced" else DenoisingScoreMatching("likelihood")
with distributed.processes():
    for steps in (4, 6):  # and on from the checkpoint
        trainer = Trainer(
            ADAM, steps, batch, log_every=1, accumulate=3, parallel=strategy, warmup=2, preview_every=1
        )
        model = new_model(dropout=0.0, width=16)
        trainer.fit(model, loss, Watched(), run, DataMap(Levels(17), Uniform()), evaluated, progress=False)
"""


def trained(directory, processes, *arguments):
    """The checkpoint and the losses of a training by that number of processes; one is this one."""
    run = directory / f"run{processes}"
    path = directory / "training.py"
    path.write_text(TRAINING)
    command = [str(path), str(run), *map(str, arguments)]
    if processes == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)
            runpy.run_path(str(path))
    else:
        done = torchrun(processes, *command)
        assert done.returncode == 0, done.stderr
    groups, info = checkpoint.load(run / CHECKPOINT)
    return groups, info, [json.loads(line) for line in (run / LOG).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "batch", "objective"),
    [("ddp", 8, "denoising"), ("ddp", 7, "sliced"), ("fsdp", 8, "denoising"), ("fsdp", 5, "denoising")],
)
def test_two_processes_train_as_one_does(tmp_path, strategy, batch, objective):
    """With the same batch of all together, even or not: losses, gradients, weights, averages, moments; and resumed."""
    (groups, info, lines), (expected, expected_info, expected_lines) = (
        trained(tmp_path, processes, strategy, batch, objective) for processes in (2, 1)
    )
    assert info["step"] == expected_info["step"] == 6
    for line, other in zip(lines, expected_lines, strict=True):
        for name in ("loss", "gradient_norm", "learning_rate"):
            assert line[name] == pytest.approx(other[name], rel=1e-5)
        levels, others = line["loss_by_log_snr"], other["loss_by_log_snr"]
        assert [x is None for x in levels] == [x is None for x in others]
        assert [x for x in levels if x is not None] == pytest.approx([x for x in others if x is not None], rel=1e-4)
    assert groups.keys() == expected.keys()
    for group, members in groups.items():
        for name, value in members.items():
            torch.testing.assert_close(value, expected[group][name], rtol=1e-4, atol=1e-5, msg=f"{group}/{name}")


FAILING = """
import sys
from pathlib import Path
from scoresde.data import Levels
from scoresde.dequantization import DataMap
from scoresde.losses import DenoisingScoreMatching
from scoresde.training import Trainer, distributed
from tests.training.test_trainer import ADAM, Watched, new_model

def fail(point):
    raise MemoryError("rank 1 has no more")

with distributed.processes():
    data = Watched(at=3, act=fail) if distributed.rank() == 1 else Watched()
    trainer = Trainer(ADAM, 1000, 16, log_every=1, checkpoint_every=2)
    trainer.fit(new_model(), DenoisingScoreMatching(), data, Path(sys.argv[1]), DataMap(Levels(17)), progress=False)
"""


@pytest.mark.slow
def test_an_error_of_one_process_ends_a_training(tmp_path):
    """The other does not wait for it for ever, and what was reached is there to go on with."""
    path = tmp_path / "failing.py"
    path.write_text(FAILING)
    done = torchrun(2, path, tmp_path)
    assert done.returncode != 0
    assert "rank 1 has no more" in done.stderr
    assert 2 <= checkpoint.load(tmp_path / CHECKPOINT)[1]["step"] < 10
