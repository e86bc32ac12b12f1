"""InfoNCE: its minimiser is the pointwise mutual information, for discrete and for Gaussian pairs."""

import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde.losses import InfoNCE
from scoresde.networks import DualEncoder
from tests.conftest import close, f64, normal

COUNTS = torch.tensor([[6, 1, 2, 1], [1, 8, 1, 2], [3, 2, 4, 1]])  # of the pairs (x, c) of a discrete law


class Table(nn.Module):
    """A row of free parameters for each class, the class of a state being its rounded number."""

    def __init__(self, classes, features):
        super().__init__()
        self.rows = nn.Parameter(normal(classes, features, seed=classes))

    def forward(self, x, c_noise=None, cond=None):
        return self.rows[(x["label"] if isinstance(x, dict) else x[:, 0].round()).long()]


def test_the_minimiser_is_the_pointwise_mutual_information():
    """In a batch with the frequencies of a discrete law, the loss is its expectation for infinite batches.

    -sum p(x, c) [s(x, c) - log sum_c' p(c') exp s(x, c')], and likewise with x and c exchanged, up to constants.
    """
    x, c = (COUNTS.nonzero().repeat_interleave(COUNTS.flatten(), dim=0)).unbind(1)
    network = DualEncoder(Table(3, 7), Table(4, 7), 4.0).double()
    model = ss.ContrastiveModel(network, ss.Rectified(), "data")
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=120, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
    )
    loss, options = InfoNCE(), {"t": f64(model.sde.t_min), "noise": torch.zeros(len(x), 1, dtype=torch.float64)}

    def closure():
        optimizer.zero_grad()
        value = loss(model, x[:, None].double(), {"label": c}, **options).value.mean()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        similarity = model(torch.arange(3.0, dtype=torch.float64)[:, None], model.sde.t_min, {"label": torch.arange(4)})
    p = COUNTS.double() / COUNTS.sum()
    information = (p / (p.sum(dim=1, keepdim=True) * p.sum(dim=0))).log()
    difference = similarity - information
    close(difference, difference.mean().expand(3, 4), rtol=0, atol=1e-4)


class Exact(nn.Module):
    """The pointwise mutual information of x_0 = c + noise, both Gaussian, at every noise level; and a wrong one."""

    def __init__(self, sde, factor=1.0):
        super().__init__()
        self.sde, self.factor = sde, nn.Parameter(f64(factor))

    def embed_condition(self, cond):
        return cond["vector"]

    def forward(self, x, t, cond):
        alpha, variance = self.sde.alpha(t), self.sde.sigma(t).square() + 0.25 * self.sde.alpha(t).square()
        own = (x[:, None] - alpha[:, None, None] * cond["vector"][None]).square().sum(dim=2) / variance[:, None]
        marginal = x.square().sum(dim=1) / (variance + alpha.square())
        return self.factor * 0.5 * (marginal[:, None] - own)


def test_the_gradient_vanishes_at_the_information_of_a_gaussian_pair():
    """Also where the batch has all noise levels, so that noisy and clean states are negatives of each other."""
    sde, cond = ss.VP(), normal(4096, 2)
    x0 = cond + 0.5 * normal(4096, 2, seed=1)
    gradients = {}
    for factor in (0.7, 1.0, 1.4):
        model = Exact(sde, factor)
        parts = []
        for rows in torch.arange(4096).split(256):
            t = sde.t_min + torch.linspace(0, 0.5, 256, dtype=torch.float64)
            value = InfoNCE()(
                model, x0[rows], {"vector": cond[rows]}, t=t, noise=normal(256, 2, seed=int(rows[0]))
            ).value
            parts.append(torch.autograd.grad(value.mean(), model.factor)[0])
        parts = torch.stack(parts)
        gradients[factor] = parts.mean() / (parts.std() / len(parts) ** 0.5)
    assert abs(gradients[1.0]) < 4  # standard errors
    assert gradients[0.7] < -5
    assert gradients[1.4] > 5


@pytest.mark.parametrize(
    ("model", "cond", "count", "error", "message"),
    [
        (ss.GaussianMixture([[0.0]], [1.0]).score_model(ss.VP()), 1, 2, TypeError, "trains a ContrastiveModel; got"),
        (Exact(ss.VP()), None, 2, ValueError, "needs conditions; got none: set data.labels"),
        (Exact(ss.VP()), torch.zeros(1, 1), 1, ValueError, "at least 2 pairs; got 1"),
    ],
)
def test_a_batch_without_pairs_is_refused(model, cond, count, error, message):
    with pytest.raises(error, match=message):
        InfoNCE()(model, torch.zeros(count, 1), cond)
