"""The configurations of ImageNet's published models: their parameters, and a step of training of narrow networks."""

import functools

import pytest
import torch
from omegaconf import OmegaConf
from torch.optim import Optimizer

from scoresde import build
from scoresde.pipelines import Cascade, CascadeStage
from tests.conftest import seeded
from tests.test_build import compose

PUBLISHED = {  # the number here, and that of the papers in millions: 2105.05233, tables 11 and 12; 2212.09748, table 1
    "imagenet64_adm": (295_904_454, 296),
    "imagenet256_adm_upsampler": (311_795_910, 312),
    "imagenet256_dit_xl2": (674_833_568, 675),
}
NARROW = {
    "width": 16,
    "blocks": 1,
    "multipliers": [1, 2],
    "attention": [8],
    "head_channels": 8,
    "heads": 1,
    "classes": 4,
}


@functools.cache
def built(experiment):
    """The model of a configuration on the meta device, and the configuration."""
    config = compose("train", f"experiment={experiment}").copy()
    if "size" in config.data:
        config.data.root = "imagenet"
    with torch.device("meta"):
        return build.build_model(config), config


def loss_nodes(config, model):
    """The nodes of the chain of the hybrid loss."""
    loss = build.instantiate(config.loss)
    return getattr(loss, "loss", loss).times.nodes(model.sde)


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_the_network_has_the_published_number_of_parameters(experiment):
    model, config = built(experiment)
    count, millions = PUBLISHED[experiment]
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert round(count / 1e6) == millions
    assert model.learned_variance
    assert len(loss_nodes(config, model)) == 1000
    optimizer = build.instantiate(config.optimizer)
    assert isinstance(optimizer([torch.nn.Parameter(torch.zeros(1))]), Optimizer)
    assert build.instantiate(config.trainer, optimizer=optimizer).clip == float("inf")
    assert build.instantiate(config.sampler).predictor.variance == "learned"


def test_the_two_adm_models_are_a_cascade():
    stages = []
    for experiment in ("imagenet64_adm", "imagenet256_adm_upsampler"):
        model, config = built(experiment)
        loss = build.instantiate(config.loss)
        data_map = build.build_data_map(config.data)
        split = getattr(loss, "resolutions", None)
        stages.append(CascadeStage(model, data_map.transform, tuple(config.data.shape), data_map.dequantization, split))
    cascade = Cascade(stages)
    assert [stage.state_shape for stage in cascade.stages] == [(3, 64, 64), (3, 256, 256)]
    assert str(cascade.stages[1].resolutions) == "AveragePooling(factor=4)"
    assert "image" in stages[1].model.network.conditions


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_a_narrow_network_makes_a_step(experiment):
    config = built(experiment)[1].copy()
    shape = [4, 8, 8] if "dit" in experiment else [3, 16, 16]
    config.data.shape = shape
    if "dit" in experiment:
        node = {
            "_target_": "scoresde.networks.DiT",
            "image_size": 8,
            "channels": 4,
            "width": 16,
            "depth": 1,
            "heads": 2,
        }
        config.network = {**node, "classes": 4, "out_channels": 8}
    else:
        OmegaConf.update(config, "network", {**NARROW, "image_size": shape[1:]}, force_add=True)
    model, loss = build.build_model(config), build.instantiate(config.loss)
    x = torch.randn(2, *shape, generator=seeded(0)).clamp(-1, 1)
    terms = loss(model, x, torch.tensor([0, 3]), generator=seeded(1))
    terms.value.mean().backward()
    assert bool(torch.isfinite(terms.value).all())
    assert any(bool(p.grad.abs().max() > 0) for p in model.parameters() if p.grad is not None)
