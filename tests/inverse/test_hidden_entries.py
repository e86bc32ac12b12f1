"""The density of hidden entries: that of a mixture given exact measurements, and the views of the whole state."""

import pytest
import torch

import scoresde as ss
from scoresde.inverse import MMPS, Grey, HiddenEntries, Inpainting
from scoresde.inverse.posterior_models import Measured
from tests.conftest import close, f64, normal, seeded

MASK = torch.tensor([[True, False], [False, True]])
SDE = ss.VP()
ORACLE = ss.GaussianMixture(f64([[[-1.0, -0.5], [0.2, 0.4]], [[0.8, 1.0], [-0.5, -0.3]]]), 0.3 + normal(2, 2, 2).abs())
OPERATOR = Inpainting(MASK, 1e-5)
STATES = ORACLE.sample(5, generator=seeded(1)).double()
Y = OPERATOR(STATES)


class Exact(Measured):
    """The exact posterior of the oracle, for each sample its own."""

    def guide(self, x, t, scale):
        y = self.residual(self.operator(torch.zeros_like(x)))
        rows = [ORACLE.posterior(self.operator, row).score_model(SDE) for row in y]
        t = t.expand(len(x))
        noise = torch.cat([model.noise(x[[i]], t[[i]]) for i, model in enumerate(rows)])
        return ss.ScoreModel(lambda *_: noise, SDE, "noise").predict(x, t)


def model(**options):
    return HiddenEntries(Exact(ORACLE.score_model(SDE), OPERATOR, Y), **options)


def hidden_law(i):
    """The mixture of the hidden entries of state i given its measured ones."""
    means, stds = (part.reshape(2, 2, 2)[:, ~MASK] for part in (ORACLE.means, ORACLE.stds))
    return ss.GaussianMixture(means, stds, ORACLE.posterior(OPERATOR, Y[i]).log_weights.exp())


def test_the_score_is_that_of_the_hidden_entries_given_the_measured_ones():
    x, t = normal(5, 2, seed=2), torch.linspace(0.05, 0.9, 5).double()
    expected = torch.cat([hidden_law(i).score(x[[i]], SDE, t[[i]]) for i in range(5)])
    close(model().score(x, t), expected, rtol=1e-6)
    close(model(seed=3).score(x, t), expected, rtol=1e-6)
    rows = torch.tensor([4, 1])
    close(model().rows(rows, 5).score(x[rows], t[rows]), expected[rows], rtol=1e-6)


def test_the_likelihood_is_the_conditional_one():
    """Without the mismatch of the prior, which is that of the noisy mixture."""
    x = STATES[:2][:, ~MASK]
    result = ss.log_prob(model().rows(slice(0, 2), 5), x, trace=ss.ExactTrace())
    for i in range(2):
        law = hidden_law(i)
        exact = law.log_prob(x[[i]], SDE, SDE.t_min) - law.log_prob(result.latent[[i]], SDE, SDE.t_max)
        change = result.value[[i]] - SDE.prior_log_prob(result.latent[[i]])
        close(change, exact, rtol=1e-3)


def test_errors_are_those_of_the_hidden_entries():
    x0, noise, t = normal(5, 2, seed=2), normal(5, 2, seed=3), torch.full((5,), 0.4).double()
    views = model().predict(SDE.perturb(x0, t, noise), t)
    error = views.error(x0, noise)
    close(error.noise, views.noise - noise, rtol=1e-9)
    close(error.denoised, views.denoised - x0, rtol=1e-9)


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match=r"a posterior model with Inpainting, such as .*; got MMPS"):
        HiddenEntries(MMPS(ORACLE.score_model(SDE), Grey(0.1), normal(1, 1, 2)))
    with pytest.raises(ValueError, match="the mask must hide at least one entry"):
        HiddenEntries(MMPS(ORACLE.score_model(SDE), Inpainting(torch.ones(2, 2), 0.1), normal(4)))
    with pytest.raises(ValueError, match=r"states must have 2 entries, those that the mask hides; got \(5, 4\)"):
        model().score(normal(5, 4), 0.3)
