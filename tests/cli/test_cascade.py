"""Cascades on the command line: a stage that is trained for super-resolution, samples and bits of a list of runs."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import scoresde as ss
from scoresde.cli import main
from scoresde.cli.cascade import known_conditions
from scoresde.data import AveragePooling
from scoresde.pipelines import Cascade
from tests.cli.conftest import GREY, rows

STEPS = ["sampler.steps=2", "n=3"]
FINE = ["network.shape=[3,4,4]", "loss=super_resolution", "loss.resolutions={_target_: scoresde.data.Haar}"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The directory of two short runs: `small` of digits of 4 x 4 pixels, and `fine`, their super-resolution."""
    folder = tmp_path_factory.mktemp("cascade")
    digits = ss.data.Digits("validation")
    levels = AveragePooling().mean(torch.stack([digits[i] for i in range(len(digits))]))
    np.save(folder / "small.npy", levels.round().numpy().astype(np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = ["data=level_arrays", "data.path=small.npy", "data.levels=17", "network.shape=[1,4,4]"]
        assert main(["train", *GREY, *small, "run=small"]) == 0
        assert main(["train", *GREY, *FINE, "trainer.preview_every=1", "trainer.evaluate_every=1", "run=fine"]) == 0
    return folder


@pytest.fixture
def runs(pair, monkeypatch):
    monkeypatch.chdir(pair)
    return "run=[small,fine]"


def test_the_stage_of_a_run_is_that_of_its_training(runs):
    run = ss.load("fine")
    assert run.model.conditional == ("image",)
    assert run.model.network.conditions == ["image"]
    assert run.stage.state_shape == (3, 4, 4)
    assert (str(run.stage.resolutions), run.stage.augmentation) == ("Haar()", 0.5)
    assert ss.load("small").stage.resolutions is None
    *_, evaluated = rows("fine", file="log.jsonl")  # without a bound or a preview of this stage alone
    assert set(evaluated) == {"step", "validation_loss", "validation_loss_stderr"}
    assert not list(Path("fine", "figures").glob("step*.png"))
    with pytest.raises(ValueError, match="trained with the condition image"):
        run.model.score(torch.zeros(1, 3, 4, 4), 0.5)


def test_samples_of_a_cascade_are_those_of_its_runs(runs):
    assert main(["sample", runs, *STEPS, "augmentation=0.2", "seed=4"]) == 0
    (row,) = rows("fine", "samples")
    assert (row["cascade"], row["augmentation"], row["n"]) == (["small", "fine"], 0.2, 3)
    stored = np.load(Path("fine", "samples", row["file"]))
    sampler = ss.build.instantiate(ss.load("fine").config.sampler)
    sampler.steps = 2
    cascade = Cascade([ss.load("small"), ss.load("fine")])
    expected = cascade.sample(3, seeds=[4, 5, 6], samplers=sampler, augmentation=0.2).x
    assert stored.shape == (3, 1, 8, 8)
    np.testing.assert_allclose(stored, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert list(Path("fine", "figures").glob("samples_*.png"))


def test_bits_of_a_cascade_have_the_parts_of_its_stages(runs):
    assert main(["bpd", runs, "split=validation", "likelihood.solver.steps=4"]) == 0
    (row,) = rows("fine", "cascade_likelihood")
    assert row["unit"] == "bits/dim"
    assert row["mean"] == pytest.approx(sum(stage["mean"] for stage in row["stages"]), rel=1e-9)
    values = np.load(Path("fine", "per_sample", row["file"]))
    np.testing.assert_allclose(values["stages"].sum(axis=1), values["values"], rtol=1e-9)
    assert row["mean"] == pytest.approx(values["values"].mean(), rel=1e-9)


class Numbers:
    """An encoder of captions, the lengths of words plus an offset."""

    def __init__(self, offset=0, name="text"):
        self.offset, self.name = offset, name

    def __call__(self, captions):
        return {self.name: torch.tensor([[len(caption) + self.offset, -1] for caption in captions])}

    def check(self, captions):
        pass


def part(conditions, class_names=None, text=None):
    """What `known_conditions` reads of a run."""
    network = SimpleNamespace(conditions=conditions)
    model = torch.nn.Module()
    model.network = network
    config = OmegaConf.create({"class_names": class_names})
    return SimpleNamespace(model=model, config=config, text=text, path="runs/part")


def test_conditions_of_a_cascade_are_those_of_all_its_stages():
    """A condition that the first stage alone takes, such as the label above an upsampler without, can be set."""
    first, last = part(["tone", "text"], {"tone": ["a", "b"]}, Numbers()), part(["image", "vector"])
    classes, others, text = known_conditions([first, last], OmegaConf.create({}))
    assert (classes, others, text) == ({"tone": ["a", "b"]}, ["text", "vector"], first.text)
    assert known_conditions([first, part(None)], OmegaConf.create({}))[1] is None
    with pytest.raises(ValueError, match="must have the same classes of tone; those of runs/part differ"):
        known_conditions([first, part(["tone"], {"tone": ["b", "a"]})], OmegaConf.create({}))
    *_, both = known_conditions([first, part(["context"], None, Numbers(name="context"))], OmegaConf.create({}))
    assert {name: part.tolist() for name, part in both(["owl"]).items()} == {"text": [[3, -1]], "context": [[3, -1]]}
    *_, wrong = known_conditions([first, part(["text"], None, Numbers(offset=1))], OmegaConf.create({}))
    with pytest.raises(ValueError, match=r"the runs of a cascade must encode captions alike; .* train the later runs"):
        wrong(["owl"])


def test_errors(runs, refused):
    assert "run" in refused("sample", "run=[small]")
    assert "order the stages from the smallest images" in refused("sample", "run=[fine,small]", *STEPS)
    assert "augmentation must be from 0 to 0.5" in refused("sample", runs, *STEPS, "augmentation=0.9")
    assert "likelihood.samples must have its default for a cascade" in refused("bpd", runs, "likelihood.samples=2")
    assert "data.path must have its default for a cascade" in refused("bpd", runs, "data.path=new")
