"""Samples in any number: a function of their seeds alone, and nothing finished is drawn twice."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import scoresde as ss
from scoresde.build import Run
from scoresde.data import Affine
from scoresde.evaluation.generation import DRAWING, describe, draw_samples
from scoresde.samplers import DDIM, Ancestral, Langevin, PredictorCorrector
from scoresde.thresholding import Clipped
from scoresde.training.trainer import Interrupted
from tests.conftest import oracle

SDE = ss.VP()
SAMPLER = PredictorCorrector(Ancestral(), Langevin(snr=0.1), steps=4, grid="uniform_log_snr", denoise_final=True)


def a_run(path, scale=0.5):
    config = OmegaConf.create({"data": {"shape": [2, 3]}})
    return Run(oracle((2, 3)).score_model(SDE), Affine(scale), config, path)


class Stopped:
    """The sampler, interrupted at a batch; counts those drawn."""

    def __init__(self, at=None):
        self.at, self.drawn = at, []

    def __call__(self, model, shape, seeds, progress):
        if seeds[0] == self.at:
            raise KeyboardInterrupt
        self.drawn.append(list(seeds))
        return SAMPLER(model, shape=shape, seeds=seeds)


def test_samples_are_those_of_the_sampler_in_data_units_whatever_the_batches(tmp_path):
    run = a_run(tmp_path)
    found = draw_samples(run, SAMPLER, 7, 3, seed=5)
    expected = run.transform.inverse(SAMPLER(run.model, shape=(7, 2, 3), seeds=range(5, 12)).x)
    assert torch.allclose(found.x, expected, atol=1e-5)
    assert (found.nfe, found.backward) == (9, 0)
    assert found.seconds > 0
    assert torch.allclose(draw_samples(run, SAMPLER, 7, 100, seed=5).x, expected, atol=1e-5)
    assert torch.equal(draw_samples(run, SAMPLER, 7, 3, seed=5).x, found.x)
    assert not list((tmp_path / DRAWING).iterdir())


def test_an_interrupted_draw_goes_on_even_to_another_number(tmp_path):
    run, first, second = a_run(tmp_path), Stopped(at=6), Stopped()
    with pytest.raises(Interrupted, match="after 2 of 4 pieces"):
        draw_samples(run, first, 10, 3, described="one")
    (kept,) = (tmp_path / DRAWING).iterdir()
    assert sorted(path.name for path in kept.glob("*.npy")) == ["0-3.npy", "3-6.npy"]
    assert np.load(kept / "0-3.npy", allow_pickle=False).shape == (3, 2, 3)
    found = draw_samples(run, second, 12, 3, described="one")
    assert second.drawn == [[6, 7, 8], [9, 10, 11]]
    assert torch.allclose(found.x, draw_samples(run, SAMPLER, 12).x, atol=1e-5)
    assert not list((tmp_path / DRAWING).iterdir())


def test_what_was_kept_is_of_this_model_and_this_sampler_alone(tmp_path):
    run = a_run(tmp_path)
    for _ in range(2):
        with pytest.raises(Interrupted):
            draw_samples(run, Stopped(at=3), 6, 3, described="one")
    for other in ({"described": "two"}, {"batch_size": 2}, {"model": Clipped(run.model, -1.0, 1.0)}):
        counted = Stopped()
        settings = {"batch_size": 3, "described": "one", **other}
        draw_samples(run, counted, 6, **settings)
        assert counted.drawn[0][0] == 0
    counted = Stopped()
    draw_samples(a_run(tmp_path, scale=2.0), counted, 6, 3, described="one")
    assert len(counted.drawn) == 2
    draw_samples(run, again := Stopped(), 6, 3, described="one")
    assert again.drawn == [[3, 4, 5]]


def test_a_sampler_is_described_by_all_that_it_was_made_of(tmp_path):
    def of(*parts, **options):
        return describe(PredictorCorrector(*parts, **{"steps": 4, **options}))

    first = of(DDIM(eta=0.0))
    assert first == of(DDIM(eta=0.0))
    others = {
        of(DDIM(eta=1.0)),
        of(DDIM(eta=0.0), steps=5),
        of(DDIM(), grid=[1.0, 0.5, 0.2, 0.1, 1e-5]),
        of(Ancestral()),
    }
    others |= {of(DDIM(), Langevin(snr=0.1)), of(DDIM(), Langevin(snr=0.2)), of(DDIM(), grid="karras")}
    assert len(others | {first}) == 8
    assert json.loads(first)["steps"] == 4
    model = a_run(tmp_path).model
    assert describe(Clipped(model, -1.0, 1.0)) != describe(Clipped(model, -1.0, 2.0)) != describe(model)


def test_wrong_numbers(tmp_path):
    for arguments in ({"n": 0}, {"n": 2, "batch_size": 0}, {"n": 1.5}, {"n": True}):
        with pytest.raises(ValueError, match="as a whole number of 1 or more expected; got"):
            draw_samples(a_run(tmp_path), SAMPLER, **arguments)
