"""A dataset's multilevel likelihood: that of the images in memory, resumable, and in nats for continuous data."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.data import Affine, Levels
from scoresde.evaluation import evaluate_likelihood
from scoresde.networks import MLP
from scoresde.solvers import Adams
from scoresde.training.trainer import Interrupted
from tests.conftest import close, f64, oracle, seeded
from tests.evaluation.test_dataset_likelihood import SDE, as_run
from tests.flowmaps.exact import GaussianMap
from tests.networks.test_layers import randomised

pytestmark = pytest.mark.filterwarnings("ignore:the last level")
OPTIONS = {"tolerance": 0.3, "levels": (4, 8)}


def test_a_dataset_has_the_estimate_of_its_images_and_resumes(tmp_path, monkeypatch):
    images, transform = torch.randint(0, 8, (16, 2), generator=seeded()), Levels(8)
    model = ss.ScoreModel(randomised(MLP(2, width=4)), ss.VP()).eval()
    run, calls, solve = as_run(model, transform, tmp_path), [], Adams.__call__

    def counted(self, *arguments):
        calls.append(self.steps)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return solve(self, *arguments)

    monkeypatch.setattr(Adams, "__call__", counted)
    stop, options = 0, {"progress": False, "batch_size": 10, **OPTIONS}
    expected = ss.bits_per_dim(model, images, transform, **OPTIONS)
    calls.clear()
    stop = 6
    with pytest.raises(Interrupted, match="run the same command again"):
        evaluate_likelihood(run, list(images), ss.Uniform(), **options)
    assert list((tmp_path / "likelihood").iterdir())
    calls.clear()
    stop = 0
    result = evaluate_likelihood(run, list(images), ss.Uniform(), **options)
    resumed = len(calls)
    assert not list((tmp_path / "likelihood").iterdir())
    evaluate_likelihood(run, list(images), ss.Uniform(), **options)
    assert len(calls) - resumed == resumed + 5
    close(result.per_sample, expected.per_image, rtol=1e-9)
    close(f64(result.mean, result.stderr), f64(expected.mean, expected.stderr), rtol=1e-9)
    close(f64(result.beyond), f64(expected.multilevel.error), rtol=1e-9)
    assert [term["draws"] for term in result.terms] == [term["draws"] for term in expected.multilevel.terms()]
    assert result.conventions["levels"] == expected.conventions["levels"]


def test_a_surrogate_gives_the_estimate_of_its_images(tmp_path):
    mixture, transform = ss.GaussianMixture(torch.zeros(1, 2), torch.full((1,), 0.5)), Levels(4)
    images, model = torch.randint(0, 4, (24, 2), generator=seeded()), mixture.score_model(ss.VP())
    maps = [GaussianMap(ss.VP(), 0.0, 0.5, amount=amount).requires_grad_(False) for amount in (0.0, 0.2)]
    runs = [as_run(flow_map, transform, tmp_path / f"map{i}") for i, flow_map in enumerate(maps)]
    options = {"solver": Adams(4, data_scale=1.0), **OPTIONS}
    for flow_map, surrogate in zip(maps, runs, strict=True):
        expected = ss.bits_per_dim(model, images, transform, surrogate=flow_map, **options)
        run, settings = as_run(model, transform, tmp_path), {"progress": False, "surrogate": surrogate, **options}
        result = evaluate_likelihood(run, list(images), ss.Uniform(), **settings)
        close(result.per_sample, expected.per_image, rtol=1e-9)
        assert [term["name"] for term in result.terms] == [term["name"] for term in expected.multilevel.terms()]
        assert result.conventions["surrogate"] == f"{surrogate.path}, at level 0"
        assert result.conventions["density"] == expected.conventions["density"]
    with pytest.raises(ValueError, match="surrogate must come with a tolerance"):
        evaluate_likelihood(run, list(images), ss.Uniform(), progress=False, surrogate=runs[0])


def test_continuous_data_have_nats(tmp_path):
    mixture, transform = oracle((2,)), Affine(2.0, 1.0)
    points = transform.inverse(mixture.sample(24, generator=seeded()))
    run = as_run(mixture.score_model(SDE), transform, tmp_path)
    options = {"trace": ss.ExactTrace(), "progress": False, "tolerance": 0.1, "levels": (12, 24)}
    result = evaluate_likelihood(run, list(points), None, **options)
    nats = -(mixture.log_prob(transform(points), SDE, SDE.t_min) + 2 * math.log(2)) / 2
    assert result.unit == "nats/dim"
    assert abs(result.mean - float(nats.mean())) < 4.5 * result.beyond + 2e-3
    close(f64(result.population), nats.std() / math.sqrt(24), rtol=0.1)
    assert result.terms[0]["stderr"] == 0
