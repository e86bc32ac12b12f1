"""Names of layers: each tensor of a state dict there is one of ours, and two conventions of tensors differ."""

import pytest
import torch

from scoresde.convert.adm_weights import POOLS, layer_names, translate
from scoresde.convert.from_adm import adm, classifier_run
from tests.convert.reference import DATA


def case(name):
    """The network of a checkpoint, its weights there, and the names of the layers of its pool."""
    path = DATA / "adm" / f"{name}.pth"
    is_classifier = name == "adm_classifier"
    network = (classifier_run if is_classifier else adm)(path).model.network
    return network, torch.load(path, weights_only=True), POOLS["attention"][2] if is_classifier else {}


def layers(state, known):
    """The names of the layers of a state dict: those in `known`, and those of tensors without their last part."""
    return list(dict.fromkeys(key if key in known else key.rpartition(".")[0] for key in state))


@pytest.mark.parametrize("name", ["adm_cond_learned", "improved_cosine", "adm_classifier"])
def test_names_are_one_to_one(name):
    network, state, pool = case(name)
    table = layer_names(network, pool)
    theirs = [table[layer] for layer in layers(network.state_dict(), table)]
    assert len(set(theirs)) == len(theirs)
    assert set(theirs) == set(layers(state, theirs))


def test_the_orders_of_query_key_and_value_differ():
    """There, the 48 channels of each of 4 heads are its query, key and value, in the old order."""
    network, state, pool = case("adm_cond_learned")
    old, new = (translate(state, network, order, pool)["middle.block0.attention.qkv.weight"] for order in (False, True))
    theirs = state["middle_block.1.qkv.weight"][:, :, 0]
    assert torch.equal(new[:, :, 0, 0], theirs)
    query = torch.cat([theirs[48 * head : 48 * head + 16] for head in range(4)])
    assert torch.equal(old[:64, :, 0, 0], query)


def test_cosines_before_sines_are_swapped():
    network, state, pool = case("adm_cond_learned")
    theirs = state["time_embed.0.weight"]
    ours = translate(state, network, False, pool)["time.inner.weight"]
    assert torch.equal(ours, torch.cat([theirs[:, 16:], theirs[:, :16]], dim=1))
