"""Contrastive models: with the exact similarity, guidance by a condition gives the conditional score."""

import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde.counting import counting
from scoresde.networks import DualEncoder
from tests.conftest import close, f64, normal

SDE, SCALE = ss.VP(), 100.0
ORACLE = ss.GaussianMixture(normal(3, 2, 2), f64(0.5, 0.7, 0.9))  # equal weights


class ExactState(nn.Module):
    """Vectors whose inner products with the unit vectors e_k are log p(k | x_t) / scale, up to a function of x_t.

    A fourth coordinate makes unit vectors of them.
    """

    def forward(self, x, c_noise, cond=None):
        logs = ORACLE.log_posterior(x, SDE, c_noise)
        first = (logs - logs.mean(dim=1, keepdim=True)) / SCALE
        return torch.cat([first, (1 - first.square().sum(dim=1, keepdim=True)).sqrt()], dim=1)


class Axes(nn.Module):
    """The unit vector e_k for the label k."""

    conditions = ("label",)

    def forward(self, cond):
        return torch.eye(4, dtype=torch.float64)[cond["label"] if isinstance(cond, dict) else cond]


@pytest.fixture(scope="module")
def model():
    network = DualEncoder(ExactState(), Axes(), SCALE).double()
    return ss.ContrastiveModel(network, SDE)


def test_the_classifier_of_conditions_is_the_exact_posterior(model):
    x, t, labels = normal(5, 2, 2), f64(0.1, 0.2, 0.4, 0.7, 1.0), torch.tensor([2, 0, 1])
    found = model.classifier(labels)(x, t)
    close(found.log_softmax(1), ORACLE.log_posterior(x, SDE, t)[:, labels], rtol=0, atol=1e-9)
    close(found, model(x, t, labels), rtol=0, atol=1e-9)


def test_guidance_by_a_condition_is_the_conditional_score(model):
    """At scale 1 (2105.05233, eq. 2), with the similarity as log p(c | x_t): CLIP guidance of 2112.10741."""
    x, t, prior = normal(5, 2, 2), f64(0.1, 0.2, 0.4, 0.7, 1.0), ORACLE.score_model(SDE)
    guided = ss.guidance.Classifier(prior, model.classifier(torch.arange(3)), label=1, scale=1.0)
    close(guided.score(x, t), prior.given(1).score(x, t), rtol=1e-6, atol=1e-7)


def test_clean_data_are_embedded_at_t_min_and_rows_are_independent(model):
    x = normal(4, 2, 2)
    vectors = model.embed(x)
    close(vectors, model.embed(x, SDE.t_min))
    close(vectors.norm(dim=1), torch.ones(4, dtype=torch.float64))
    for i in range(4):
        close(model.embed(x[i : i + 1]), vectors[i : i + 1])
    with counting() as count:
        model(x, 0.5, torch.arange(2))
    assert count.forward == 1


def test_one_number_is_no_list_of_conditions(model):
    with pytest.raises(
        ValueError, match="condition 'label' must have a leading dimension; got one number: pass a list"
    ):
        model.classifier(2)


def test_the_scale_is_learned_up_to_its_limit(model):
    network = DualEncoder(nn.Identity(), nn.Identity(), 50.0)
    assert network.scale.item() == pytest.approx(50.0)
    network.log_scale.data += 10.0
    assert network.scale.item() == 100.0
    assert [name for name, _ in model.named_parameters()] == ["network.log_scale"]
    with pytest.raises(ValueError, match="initial_scale must be at most 100; got 101"):
        DualEncoder(nn.Identity(), nn.Identity(), 101.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(2, 2), SDE), TypeError, "network must be an object with embed_state and embed_condition"),
        ((DualEncoder(nn.Identity(), nn.Identity()), None), TypeError, "sde must be an object with alpha"),
        ((DualEncoder(nn.Identity(), nn.Identity()), SDE, "nothing"), ValueError, "nothing"),
    ],
)
def test_other_parts_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ss.ContrastiveModel(*arguments)
