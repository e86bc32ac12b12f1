"""Fine-tuning: the model at step 0 is the other model, for any new conditions."""

import pytest
import torch

import scoresde as ss
from scoresde.networks import MLP, Conditions, UNet, edm2
from scoresde.training.fine_tuning import start_from
from tests.conftest import normal, seeded


def perceptron(**options):
    return ss.ScoreModel(MLP((1, 4, 4), width=8, depth=1, **options), ss.VP(), "karras").eval()


def unet(**conditions):
    options = {"width": 4, "multipliers": [1, 2], "blocks": 1, "attention": [2]}
    network = UNet(4, 1, **options, conditions=Conditions(**conditions))
    return ss.ScoreModel(network, ss.VP(), "karras").eval()


def trained(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=seeded(1)))
    return model


@pytest.mark.parametrize("make", [perceptron, unet])
def test_a_model_with_more_conditions_starts_as_the_other_bit_for_bit(make):
    other, model = trained(make(classes=3)), make(classes={"label": 3, "tone": 2}, cond_features=3, cond_channels=2)
    new = start_from(model, other)
    names = ["network.image.layer.weight", "network.time.cond.tone.weight"]
    assert sorted(new) == sorted([*names, "network.time.cond.vector.weight", "network.time.cond.vector.bias"])
    x, label = normal(3, 1, 4, 4).float(), torch.tensor([2, 0, -1])
    cond = {"label": label, "tone": torch.tensor([1, 0, 0]), "vector": normal(3, 3).float()}
    cond |= {"image": normal(3, 2, 4, 4).float()}
    assert torch.equal(model.given(cond).score(x, 0.4), other.given(label).score(x, 0.4))
    assert torch.equal(model.score(x, 0.4), other.score(x, 0.4))
    model.given(cond).score(x, 0.4).square().sum().backward()
    learned = [name for name, p in model.named_parameters() if name in new and float(p.grad.abs().max()) > 0]
    assert sorted(learned) == sorted(new)


def test_magnitude_preserving_embeddings_cannot_start_at_zero():
    """A condition image can; with it the model starts as the other one."""

    def preserving(**conditions):
        torch.manual_seed(0)
        network = edm2(4, 8, channels=1, multipliers=(1, 2), blocks=1, attention=(), head_channels=4, **conditions)
        return ss.ScoreModel(network, ss.VP(), "karras").eval()

    other, model = trained(preserving()), preserving(cond_channels=2)
    assert start_from(model, other) == ["network.image.layer.weight"]
    x, image = normal(2, 1, 4, 4).float(), normal(2, 2, 4, 4).float()
    with torch.no_grad():
        assert torch.equal(model.given({"image": image}).score(x, 0.4), other.score(x, 0.4))
    with pytest.raises(ValueError, match=r"cannot start at zero; got network.time.cond.label.weight, which is new"):
        start_from(preserving(classes=3), other)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (perceptron(classes=3), "expected no network.time.cond.label.weight"),
        (perceptron().double(), "of dtype torch.float32; got torch.float64"),
        (ss.ScoreModel(MLP((1, 4, 4), width=8, depth=0), ss.VP(), "karras"), "expected network.layers.layer0"),
    ],
)
def test_another_network_is_refused_and_nothing_changes(other, message):
    model = perceptron(cond_channels=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"differs in its conditions only: .*{message}"):
        start_from(model, other)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
