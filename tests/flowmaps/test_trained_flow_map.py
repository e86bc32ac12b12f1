"""Flow maps in the trainer: training finds the exact map, and runs resume."""

from functools import partial

import pytest
import torch

import scoresde as ss
from scoresde.data.items import Items
from scoresde.dequantization import DataMap
from scoresde.flowmaps import Consistency, MeanFlow, ProgressiveDistillation, TrajectoryDistillation
from scoresde.training import Trainer, checkpoint
from scoresde.training.trainer import CHECKPOINT
from tests.conftest import seeded
from tests.flowmaps.exact import GaussianMap, small_map

SDE = ss.VP()
MIXTURE = ss.GaussianMixture(torch.zeros(1, 2), torch.full((1, 2), 0.5))
TEACHER = MIXTURE.score_model(SDE)


class Unchanged:
    """The transform of data that are states."""

    def __call__(self, x):
        return x

    def inverse(self, y):
        return y

    def log_det(self, x):
        return torch.zeros(len(x), dtype=torch.float64)


def fit(model, run, loss, steps, **options):
    data = Items(MIXTURE.sample(500, generator=seeded()).float())
    settings = {"batch_size": 8, "warmup": 2, "ema": 0.8, **options}
    trainer = Trainer(partial(torch.optim.Adam, lr=6e-2), steps, **settings)
    trainer.fit(model, loss, data, run, DataMap(Unchanged()), progress=False)


@pytest.mark.parametrize(
    "loss",
    [
        MeanFlow(TEACHER),
        Consistency(TEACHER),
        Consistency(TEACHER, steps=100),
        ProgressiveDistillation(TEACHER),
        TrajectoryDistillation(TEACHER, steps=5, pairs=2),
    ],
    ids=["mean_flow", "consistency", "discrete-consistency", "progressive", "trajectories"],
)
def test_training_leads_from_a_wrong_map_to_the_exact_one(tmp_path, loss):
    """Of a family of maps with one parameter, in which 0 is the exact map, training finds 0."""
    model = GaussianMap(SDE, 0.0, 0.5, amount=0.5)
    fit(model, tmp_path, loss, 30)
    assert abs(float(model.amount.detach())) < 0.1


def test_a_run_resumes_as_if_it_had_not_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def train(run, steps):
        fit(small_map(SDE, (2,), correction=False).float(), run, MeanFlow(), steps, decay="none", batch_size=8)

    train(whole, 4)
    train(parts, 2)
    train(parts, 4)
    stored = [checkpoint.load(run / CHECKPOINT, {"model"})[0]["model"] for run in (whole, parts)]
    assert any("target" in name for name in stored[0])
    for name, value in stored[0].items():
        torch.testing.assert_close(stored[1][name], value, rtol=0, atol=0)
