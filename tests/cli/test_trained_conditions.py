"""The conditions of a network that its configuration leaves to the data."""

import pytest
import torch
from omegaconf import OmegaConf

from scoresde import build
from scoresde.cli.trained_conditions import fit_network
from scoresde.data.items import Items
from scoresde.networks import TextEncoder
from scoresde.networks.condition_embeddings import numbers_of_classes

STATES = torch.zeros(6, 1, 8, 8)
LABELS = torch.arange(6) % 3
UNET = {"_target_": "scoresde.networks.UNet", "image_size": 8, "channels": 1, "width": 8, "multipliers": [1]}
MLP = {"_target_": "scoresde.networks.MLP", "shape": [1, 8, 8], "width": 8}
HEAD = {"_target_": "scoresde.networks.LevelHead", "levels": 2, "network": {**UNET, "out_channels": 2}}
PRESET = {"_target_": "scoresde.networks.ddpmpp", "image_size": 8, "channels": 1, "width": 8, "multipliers": [1]}
PRESET |= {"attention": []}
DIT = {"_target_": "scoresde.networks.DiT", "image_size": 8, "channels": 1, "width": 16, "depth": 1, "heads": 2}
NETWORKS = {"U-Net": UNET, "perceptron": MLP, "level head": HEAD, "preset": PRESET, "transformer": DIT}


def fitted(network, labels, names=None, added=None):
    dataset = Items(STATES, labels, class_names=names or {})
    config = OmegaConf.create({"network": network, "data": {"text": {"size": 9, "length": 4}}})
    OmegaConf.set_struct(config, True)
    fit_network(config, dataset, added)
    return config.network


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_every_network_gets_the_classes_of_the_data(network):
    model = build.instantiate(fitted(network, LABELS, {"label": list("abcd")}))
    assert numbers_of_classes(model) == {"label": 4}
    assert model.conditions == ["label"]


@pytest.mark.parametrize("network", [UNET, MLP], ids=["U-Net", "perceptron"])
def test_several_labels_and_a_vector_have_their_names(network):
    labels = {"tone": LABELS, "vector": torch.zeros(6, 5)}
    model = build.instantiate(fitted(network, labels))
    assert numbers_of_classes(model) == {"tone": 3}
    assert model.conditions == ["tone", "vector"]


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_every_network_gets_the_image_that_the_loss_adds(network):
    model = build.instantiate(fitted(network, LABELS, added={"image": (2, 8, 8)}))
    assert model.conditions == ["label", "image"]
    if network is not HEAD:
        assert model.image.shape == (2, 8, 8)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_every_network_gets_an_encoder_of_the_texts_of_the_data(network):
    model = build.instantiate(fitted(network, {"text": torch.zeros(6, 4, dtype=torch.int64)}))
    assert model.conditions == ["text"]
    (encoder,) = (module for module in model.modules() if isinstance(module, TextEncoder))
    assert (encoder.style.vocabulary, encoder.style.length) == (9, 4)


@pytest.mark.parametrize("network", [UNET, DIT], ids=["U-Net", "transformer"])
def test_networks_with_attention_get_the_length_of_context_vectors(network):
    model = build.instantiate(fitted(network, {"context": torch.zeros(6, 4, 5)}))
    assert (model.conditions, model.context_features) == (["context"], 5)


def test_a_choice_of_the_configuration_stays():
    chosen = {**MLP, "classes": 0}
    assert fitted(chosen, LABELS) == chosen
    chosen = {**UNET, "conditions": {"_target_": "scoresde.networks.Conditions", "classes": 7}}
    assert fitted(chosen, LABELS) == chosen


def test_networks_of_others_and_data_without_labels_are_left_alone():
    assert fitted({"_target_": "points.Network"}, LABELS) == {"_target_": "points.Network"}
    assert fitted(UNET, None) == UNET
