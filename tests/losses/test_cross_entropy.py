"""The cross entropy of noise-conditional classifiers against the exact posterior of a mixture of Gaussians."""

import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde.losses import CrossEntropy
from tests.conftest import PATHS, close

MIXTURE = ss.GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]]), torch.ones(3))


class Exact(nn.Module):
    """log p(k | x_t) of the mixture, plus an error."""

    def __init__(self, sde, error=0.0):
        super().__init__()
        self.sde, self.error = sde, nn.Parameter(torch.full((), error, dtype=torch.float64))

    def forward(self, x, t):
        return MIXTURE.log_posterior(x, self.sde, t) * (1 + self.error)


def draws(n=4000):
    label = torch.arange(n) % 3
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return MIXTURE.means[label] + noise, label


@pytest.mark.parametrize("sde", PATHS)
def test_it_is_minus_log_p_of_the_label_at_the_drawn_state(sde):
    x0, label = draws(6)
    t = torch.linspace(sde.t_min, sde.t_max, 6, dtype=torch.float64)
    noise = torch.ones_like(x0)
    terms = CrossEntropy()(Exact(sde), x0, label, t=t, noise=noise)
    expected = -MIXTURE.log_posterior(sde.perturb(x0, t, noise), sde, t)[torch.arange(6), label]
    close(terms.value, expected, atol=1e-12)
    assert bool((terms.weight == 1).all())


def test_the_exact_posterior_is_stationary_and_others_are_worse():
    x0, label = draws()
    model = Exact(ss.VP())
    losses = {}
    for error in (-0.3, 0.0, 0.3):
        model.error.data.fill_(error)
        model.error.grad = None
        terms = CrossEntropy()(model, x0, label, generator=torch.Generator().manual_seed(1)).value
        terms.mean().backward()
        losses[error] = float(terms.detach().mean())
        if error == 0.0:  # the gradient's mean is zero, within four standard errors
            spread = (MIXTURE.log_posterior(x0).max(dim=1).values).std()
            assert abs(float(model.error.grad)) < 4 * float(spread + 1) / len(x0) ** 0.5
    assert losses[0.0] < min(losses[-0.3], losses[0.3])


def test_a_label_may_be_one_of_several_conditions():
    x0, label = draws(6)
    parts = {"tone": label, "label": torch.zeros(6, dtype=torch.int64)}
    options = {"t": torch.full((6,), 0.5), "noise": torch.zeros_like(x0)}
    by_name = CrossEntropy(condition="tone")(Exact(ss.VP()), x0, parts, **options).value
    assert torch.equal(by_name, CrossEntropy()(Exact(ss.VP()), x0, label, **options).value)


@pytest.mark.parametrize(
    ("model", "cond", "error", "message"),
    [
        (MIXTURE.score_model(ss.VP()), torch.zeros(2).long(), TypeError, "trains a noise-conditional classifier"),
        (Exact(ss.VP()), None, ValueError, "needs the condition 'label' for every sample.*data.labels"),
        (Exact(ss.VP()), torch.tensor([0, -1]), ValueError, "needs the condition 'label' for every sample"),
        (Exact(ss.VP()), torch.zeros(2, 3), ValueError, "needs the condition 'label'"),
    ],
)
def test_what_is_not_a_labelled_classifier_is_refused(model, cond, error, message):
    with pytest.raises(error, match=message):
        CrossEntropy()(model, torch.zeros(2, 2), cond)
