"""Short trainings with everything random in them, for the tests of the trainer and of its processes."""

import math
import os
import signal
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset

import scoresde as ss
from scoresde.data import Levels
from scoresde.dequantization import DataMap, Uniform
from scoresde.losses import DenoisingScoreMatching
from scoresde.networks import MLP, edm2
from scoresde.training import Trainer, checkpoint
from scoresde.training.json_lines import read_lines
from scoresde.training.locks import locked
from scoresde.training.log import LOG
from scoresde.training.state import CHECKPOINT
from tests.conftest import seeded

STEPS, BATCH = 12, 8
ADAM, SGD = (partial(kind, lr=1e-2) for kind in (torch.optim.Adam, torch.optim.SGD))


class Points(Dataset):
    """Grey levels of two pixels; the items of the batches `at`, counted from the start of the process, are
    `act(item)`."""

    def __init__(self, *at, act=None):
        self.points = torch.randint(0, 17, (40, 2), generator=seeded())
        self.at, self.act, self.count = at, act, 0

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        batch, self.count = self.count // BATCH, self.count + 1
        return self.act(self.points[index]) if batch in self.at else self.points[index]


class Mirrored(Points):
    """Each item mirrored at random, as in data augmentation."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return 16 - item if torch.rand(()) < 0.5 else item


def nan_at(*steps):
    return Points(*steps, act=lambda point: point * math.nan)


def kill_at(batch, number):
    """Points; the process receives one signal when it loads this batch."""
    pending = [number]

    def act(point):
        if pending:
            os.kill(os.getpid(), pending.pop())
        return point

    return Points(batch, act=act)


def new_model(seed=0, **options):
    torch.manual_seed(seed)
    return ss.ScoreModel(MLP(2, **{"width": 8, "depth": 1, "dropout": 0.1, **options}), ss.VP(), "karras")


def fit(
    run, dataset=None, model=None, preview=None, evaluate=None, loss=None, dequantization=None, config=None, **options
):
    """Train for a few steps, with random order, dequantisation, times, noise and dropout."""
    model = model or new_model()
    settings = {"optimizer": ADAM, "steps": STEPS, "batch_size": BATCH, "log_every": 4, "checkpoint_every": 5}
    trainer = Trainer(**{**settings, "warmup": 3, "decay": "cosine", **options})
    loss, data_map = loss or DenoisingScoreMatching("likelihood"), DataMap(Levels(17), dequantization or Uniform())
    trainer.fit(model, loss, dataset or Points(), run, data_map, preview, evaluate, False, config)
    return model


def saved(run):
    """Every tensor of the run's checkpoint by its name, and its information."""
    groups, info = checkpoint.load(run / CHECKPOINT)
    return {f"{group}/{name}": tensor for group, part in groups.items() for name, tensor in part.items()}, info


def saved_step(run):
    return saved(run)[1]["step"] if (run / CHECKPOINT).exists() else None


def rows(run):
    return read_lines(run / LOG)


def assert_same_run(run, other):
    """The same bits: weights, averages, moments, step, snapshots, and every line of the log but speed and memory."""
    (tensors, info), (expected, expected_info) = saved(run), saved(other)
    assert info == expected_info
    assert tensors.keys() == expected.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []
    logs = rows(run), rows(other)
    for row in logs[0] + logs[1]:
        assert row.pop("images_per_second") > 0
        assert row.pop("memory_gb") > 0
    assert logs[0] == logs[1]
    snapshots = [{path.name: path.read_bytes() for path in (each / "averages").glob("*")} for each in (run, other)]
    assert [sorted(files) for files in snapshots] == 2 * [sorted(snapshots[0])]
    assert [name for name, content in snapshots[0].items() if content != snapshots[1][name]] == []


# --- in processes of their own


def hold(directory, connection):
    """Hold the lock of a directory, and say so, until the process is killed."""
    with locked(directory):
        connection.send("locked")
        time.sleep(300)


def fit_killed_while_saving(run, save):
    """Train until the process is killed just before checkpoint number `save` is renamed to its place."""
    replace, saves = os.replace, []

    def kill(source, target):
        saves.append(Path(target).name == CHECKPOINT)
        if sum(saves) == save:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = kill
    fit(run)


def fit_slowly(run, steps, delay):
    """Train with frequent checkpoints, snapshots, lines and previews; loading an item takes `delay` seconds."""

    class Slow(Mirrored):
        def __getitem__(self, index):
            time.sleep(delay)
            return super().__getitem__(index)

    options = {"power": (0.05, 0.1), "snapshot_every": 3, "checkpoint_every": 2, "preview_every": 3, "log_every": 3}
    fit(run, Slow(), preview=lambda model, step: torch.rand(3), steps=steps, **options)


class PixelNetwork(torch.nn.Module):
    """A U-Net of magnitude-preserving layers for two pixels (B, 2)."""

    def __init__(self):
        super().__init__()
        options = {"channels": 1, "multipliers": (1, 2), "blocks": 1, "attention": (), "head_channels": 8}
        self.unet = edm2((2,), 8, **options, uncertainty=4)

    @property
    def uncertainty(self):
        return self.unet.uncertainty

    def forward(self, x, c_noise, cond=None):
        return self.unet(x[:, None], c_noise, cond)[:, 0]


def fit_shared(run, strategy, batch, loss, preserves=False):
    """Train in all processes together: 4 steps, then 2 more from the checkpoint; evaluate after each step."""

    def evaluate(model, step):
        with torch.no_grad():
            assert bool(torch.isfinite(model.noise(torch.zeros(4, 2), 0.5)).all())

    for steps in (4, 6):
        torch.manual_seed(0)
        model = ss.ScoreModel(PixelNetwork(), ss.VP(), "karras") if preserves else new_model(dropout=0.0, width=16)
        options = {
            "optimizer": SGD if preserves else ADAM,
            "accumulate": 3,
            "parallel": strategy,
            "warmup": 2,
            "preview_every": 1,
            "log_every": 1,
        }
        fit(run, model=model, loss=loss, preview=evaluate, steps=steps, batch_size=batch, **options)
