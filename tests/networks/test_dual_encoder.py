"""The encoder of conditions: labels, vectors and texts, alone and together; unit vectors of both encoders."""

import pytest
import torch

from scoresde.networks import AttentionPool, ConditionEncoder, DualEncoder, EncoderUNet, TextStyle
from tests.conftest import close, normal

STYLE = TextStyle(vocabulary=9, length=4, width=8, depth=1, heads=2)
TEXTS = torch.tensor([[3, 1, -1, -1], [8, 2, 5, -1], [0, -1, -1, -1]])
CONDITIONS = {
    "label": torch.tensor([0, 2, 1]),
    "vector": normal(3, 2).float(),
    "text": TEXTS,
}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return ConditionEncoder(6, width=16, depth=2, classes=3, cond_features=2, text=STYLE).eval()


@pytest.mark.parametrize("names", [("label",), ("vector",), ("text",), ("label", "vector", "text")])
def test_every_condition_is_embedded_and_rows_are_independent(encoder, names):
    cond = {name: CONDITIONS[name] for name in names}
    vectors = encoder(cond)
    assert vectors.shape == (3, 6)
    for i in range(3):
        close(encoder({name: part[i : i + 1] for name, part in cond.items()})[0], vectors[i], rtol=1e-4, atol=1e-5)
        for name in names:
            other = {**cond, name: CONDITIONS[name].roll(1, dims=0)}
            assert not torch.allclose(encoder(other)[i], vectors[i], atol=1e-3)


def test_padding_of_a_text_changes_nothing(encoder):
    close(encoder({"text": TEXTS[:, :3]}), encoder({"text": TEXTS}), rtol=1e-4, atol=1e-5)


def test_a_missing_or_unknown_condition_is_refused(encoder):
    with pytest.raises(ValueError, match="needs a condition to embed, of label, vector, text; got none"):
        encoder(None)
    with pytest.raises(ValueError, match="built without a condition 'image'"):
        encoder({"image": torch.zeros(3, 1, 2, 2)})


def test_both_encoders_give_unit_vectors_from_the_first_step_on(encoder):
    state = EncoderUNet(8, 6, channels=1, width=8, multipliers=(1, 2), blocks=1, pool=AttentionPool)
    network = DualEncoder(state, encoder)
    vectors = network.embed_state(normal(3, 1, 8, 8).float(), torch.zeros(3)), network.embed_condition(CONDITIONS)
    for part in vectors:
        close(part.norm(dim=1), torch.ones(3), rtol=1e-5)
    x, label = normal(3, 1, 8, 8).float(), torch.zeros(3)
    close(network(x, label, CONDITIONS), network.scale * vectors[0] @ vectors[1].T, rtol=1e-5, atol=1e-5)
    assert network.conditions == ["label", "vector", "text"]
