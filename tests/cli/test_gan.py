"""Denoising diffusion GANs on the command line: trained, resumed, sampled in their steps only."""

import pytest
import torch

import scoresde as ss
from scoresde.cli import main
from scoresde.flowmaps import DenoisingGenerator
from scoresde.training import checkpoint
from scoresde.training.trainer import CHECKPOINT
from tests.cli.conftest import TOY, rows

QUICK = [option.replace("experiment=toy2d", "experiment=gan_2d") for option in TOY]
QUICK += ["generator.steps=2", "loss.discriminator.network.width=8", "loss.discriminator.network.depth=1"]


@pytest.fixture
def gan(tmp_path):
    for steps in (1, 2):
        assert main(["train", *QUICK, f"trainer.steps={steps}", "run=gan"]) == 0
    return tmp_path / "gan"


def test_a_generator_is_trained_resumed_and_sampled(gan, refused):
    run = ss.load(gan)
    assert isinstance(run.model, DenoisingGenerator)
    groups, info = checkpoint.load(gan / CHECKPOINT)
    assert info["step"] == 2
    assert {name.split(".")[0] for name in groups["loss"]} == {"discriminator"}
    assert main(["sample", f"run={gan}", "sampler=gan", "sampler.steps=2", "n=5"]) == 0
    (row,) = rows(gan, "samples")
    assert row["nfe"] == 2
    x = run.model.sample((3, 2), seeds=range(3))
    assert torch.equal(x[:2], run.model.sample((2, 2), seeds=range(2)))
    assert "trained for steps=2" in refused("sample", f"run={gan}", "sampler=gan", "sampler.steps=4", "n=2")
    assert "for sampling only" in refused("bpd", f"run={gan}", prints=True)
    assert "generator.steps" in refused("train", *QUICK, "generator.steps=0", "run=other")
