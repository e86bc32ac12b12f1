"""Flat configurations of older runs and of converters become configurations with parts."""

import json

import pytest
import torch

from scoresde import build, run_config
from scoresde.networks import InputSkip, OutputResidual, PositionalEmbedding, UNet, ddpmpp
from scoresde.networks.configuration import with_parts
from scoresde.networks.resampling import ResampledConvolution
from tests.networks.test_layers import randomised

FLAT = {"image_size": 8, "channels": 1, "width": 8, "multipliers": [1, 2], "blocks": 1}


def unet(**arguments):
    return build.instantiate(with_parts({"_target_": "scoresde.networks.UNet", **FLAT, **arguments}))


BLOCK = {"attend_every": True, "heads": 2, "heads_up": 1, "head_channels": 4, "dropout": 0.3, "fir": [1, 3, 3, 1]}
SHAPE = {"group_size": 2, "scale_shift": True, "norm_eps": 0.1}
OTHER = {**SHAPE, "skip_rescale": False, "project_skip": False, "checkpointing": True}
ENDS = {"centered": False, "input_frequencies": [0.5], "scale_by_sigma": True}
MODULES = {"resample": "convolution", "input_pyramid": "skip", "output_pyramid": "residual", "combine": "cat"}
CONDITIONS = {"classes": 3, "cond_features": 2, "context_features": 5, "cond_join": "input"}


def test_every_flat_argument_reaches_its_part():
    network = unet(dims=3, attention=[4], **BLOCK, **OTHER, **ENDS, **MODULES, **CONDITIONS)
    style = vars(network.middle["block0"].residual.style)
    assert {**BLOCK, **OTHER, "dims": 3}.items() <= style.items()
    assert ENDS.items() <= vars(network.ends).items()
    assert type(network.down["8x8x8"].downsample) is ResampledConvolution
    assert type(network.down["8x8x8"].pyramid) is InputSkip
    assert network.down["8x8x8"].pyramid.concatenate
    assert type(network.up["8x8x8"].pyramid) is OutputResidual
    assert (network.conditions, network.time.join) == (["label", "vector", "context"], "input")


@pytest.mark.parametrize(
    ("arguments", "kind", "attributes"),
    [
        ({"time_scale": 30.0}, "PositionalEmbedding", {"features": 8, "scale": 30.0, "endpoint": True}),
        ({"embedding": "adm", "embedding_width": 6}, "PositionalEmbedding", {"features": 6, "endpoint": False}),
        ({"embedding": "fourier", "fourier_scale": 2.0}, "FourierEmbedding", {"scale": 2.0, "log": False}),
        ({"embedding": "fourier_log"}, "FourierEmbedding", {"features": 8, "scale": 16.0, "log": True}),
    ],
)
def test_label_embeddings_by_their_old_names(arguments, kind, attributes):
    label = with_parts({"_target_": "scoresde.networks.UNet", **FLAT, **arguments})["label"]
    assert label["_target_"] == f"scoresde.networks.{kind}"
    assert attributes.items() <= label.items()


def test_the_old_default_attends_at_16():
    old = unet(image_size=16, heads=1)
    expected = ddpmpp(16, channels=1, width=8, multipliers=(1, 2), blocks=1, label=PositionalEmbedding(8))
    expected.load_state_dict(randomised(old).state_dict())
    x, label = torch.ones(2, 1, 16, 16).double(), torch.ones(2).double()
    assert torch.equal(expected.double().eval()(x, label), old(x, label))


def test_the_classes_of_a_classifier_are_its_own():
    node = {"_target_": "scoresde.networks.EncoderUNet", **FLAT, "classes": 7, "cond_features": 3, "dropout": 0.0}
    network = build.instantiate(with_parts({**node, "attention": [], "resample": "plain"}))
    assert (network.classes, network.conditions, network.style.dropout) == (7, ["vector"], 0.0)


def test_other_configurations_stay_as_they_are():
    for node in (
        {"_target_": "scoresde.networks.MLP", "shape": [2], "time_scale": 3.0},
        {"_target_": "scoresde.networks.UNet", **FLAT, "block": {"_target_": "scoresde.networks.BlockStyle"}},
    ):
        assert with_parts(node) == node
    preset = with_parts({"_target_": "scoresde.networks.ncsnpp", "output_pyramid": "skip", "dropout": 0.0})
    assert preset["output_pyramid"] == {"_target_": "scoresde.networks.OutputSkip", "_partial_": True}
    assert preset["dropout"] == 0.0
    dit = with_parts({"_target_": "scoresde.networks.DiT", "image_size": 8, "dims": 1})
    assert dit == {"_target_": "scoresde.networks.DiT", "image_size": [8]}
    points = {"_target_": "scoresde.networks.EquivariantNetwork", "kinds": [0], "dims": 2}
    assert with_parts(points) == points  # dims without an image_size is the network's own


def test_flat_configurations_of_runs_load(tmp_path):
    """Nested ones, too: the network of a `LevelHead`."""
    network = {"_target_": "scoresde.networks.UNet", **FLAT, "attention": [4], "out_channels": 2, "time_scale": 100.0}
    config = {"network": {"_target_": "scoresde.networks.LevelHead", "levels": 2, "network": network}}
    (tmp_path / run_config.CONFIG).write_text(json.dumps(config))
    head = build.instantiate(run_config.read_config(tmp_path).network)
    assert isinstance(head.network, UNet)
    assert float(head.network.time.position.frequencies.max()) == 100.0
