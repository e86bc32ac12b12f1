"""Scales compared: on an exact score, guidance raises the class accuracy and lowers recall; costs are counted."""

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import TensorDataset

import scoresde as ss
from scoresde.build import Run
from scoresde.data import Affine
from scoresde.evaluation.guidance_comparison import GuidanceRow, GuidanceSettings, compare_scales, table
from scoresde.evaluation.sampler_comparison import write_csv
from scoresde.guidance import ClassifierFree
from scoresde.metrics.features import Features
from scoresde.samplers import DPMSolverPP, PredictorCorrector

LABELS = torch.arange(200) % 2
MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
POINTS = MEANS[LABELS] + 0.8 * torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
NAME = "dpmpp2"


class Points(TensorDataset):
    """Draws from two Gaussians with their component, as states of a shape."""

    def __init__(self, shape):
        super().__init__(POINTS.reshape(-1, *shape), LABELS)


class Sign:
    """A feature space of images of two pixels: the pixels, and as logits the signs of the first pixel."""

    name, digest, description = "sign", None, ""

    def __call__(self, images, span):
        first = images[:, 0, 0, :1]
        return Features(images.flatten(1), torch.cat([-first, first], dim=1))


def run(path, *shape):
    mixture = ss.GaussianMixture(MEANS.reshape(-1, *shape), torch.full((2,), 0.8))
    data = {split: {"_target_": f"{__name__}.Points", "shape": list(shape)} for split in ("train", "test")}
    config = {"data": {"shape": list(shape), "range": [-4, 4], "training": None, **data}, "class_names": None}
    return Run(mixture.score_model(ss.VP()), Affine(), OmegaConf.create(config), path)


def build(steps):
    return PredictorCorrector(DPMSolverPP(2), steps=steps)


def compared(own, scales, space=None, budget=21, **settings):
    models = {scale: ClassifierFree(own.model, scale=scale) for scale in scales}
    settings = GuidanceSettings(NAME, budget, 200, trust=(__name__,), **settings)
    return compare_scales(own, models, build, {"label": LABELS}, space, settings)


def values(rows, metric):
    return {row.scale: row for row in rows if row.metric == metric}


def assert_larger(first, second):
    """Assert that a metric is larger by more than two standard errors of the difference."""
    assert first.value > second.value + 2 * (first.error**2 + second.error**2) ** 0.5


def test_a_larger_scale_has_samples_of_their_class_and_less_variety(tmp_path):
    rows, left_out = compared(run(tmp_path, 1, 1, 2), (0.0, 3.0), Sign())
    assert not left_out
    recall, distance, accuracy = (values(rows, m) for m in ("recall", "frechet_distance", "class_accuracy"))
    assert_larger(accuracy[3.0], accuracy[0.0])
    assert_larger(recall[0.0], recall[3.0])
    assert_larger(distance[3.0], distance[0.0])
    # At scale 0 samples are those of the components: the sign is right with probability Phi(1/0.8) = 0.894.
    assert abs(accuracy[0.0].value - 0.894) < 3 * accuracy[0.0].error
    assert {(row.space, row.reference_n) for row in rows} == {("sign", 200)}


def test_states_are_compared_in_model_space_and_costs_are_counted(tmp_path):
    rows, left_out = compared(run(tmp_path, 2), (0.0, 1.0))
    assert left_out == {"class_accuracy": "the states are not images"}
    assert {(row.steps, row.budget, row.n, row.sampler) for row in rows} == {(10, 21, 200, NAME)}
    assert {scale: row.nfe for scale, row in values(rows, "precision").items()} == {0.0: 10, 1.0: 20}
    titles, *lines = table(rows)
    assert titles == ["scale", "NFE", "precision", "recall", "frechet_distance"]
    assert [line[:2] for line in lines] == [["0", "10"], ["1", "20"]]
    assert all(" +- " in cell for line in lines for cell in line[2:])
    text = write_csv(rows, tmp_path / "rows.csv", GuidanceRow).read_text().splitlines()
    assert text[0].startswith("scale,sampler,budget,steps,nfe")
    assert len(text) == 1 + len(rows)


@pytest.mark.parametrize(
    ("shape", "scales", "budget", "message"),
    [
        ((2,), (), 20, "guidance.scale must have at least one scale"),
        ((2,), (1.0,), 1, "nfe must be at least 2, one step of dpmpp2; got 1"),
        ((1, 1, 2), (1.0,), 20, "images need a feature space"),
    ],
)
def test_wrong_input(shape, scales, budget, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compared(run(tmp_path, *shape), scales, budget=budget)
