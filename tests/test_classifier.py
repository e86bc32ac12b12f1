"""Noise-conditional classifiers: how the network is called, and agreement with Bayes' rule for a mixture."""

import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde.classifier import NoisyClassifier
from scoresde.counting import counting
from scoresde.predictions import KarrasPreconditioning
from tests.conftest import f64, normal, some, times

MEANS, STD = f64(-1.0, 0.5, 2.0), 0.3


class Bayes(nn.Module):
    """The exact logits of three components N(m_k, STD^2) per dimension, as a function of (c_in x, log-SNR)."""

    classes = 3

    def forward(self, scaled, c_noise, cond=None):
        snr = c_noise.exp()[:, None]  # at alpha = 1: x = x_0 + snr^(-1/2) eps
        distances = (scaled.flatten(1)[:, :, None] - MEANS).square().sum(dim=1)
        return -0.5 * distances / (STD**2 + 1 / snr)


class ByLogSNR(ss.predictions.Data):
    """The state in units of the signal, and the log-SNR as the label."""

    def c_in(self, sde, t):
        return 1 / sde.alpha(t)

    def c_noise(self, sde, t):
        return sde.log_snr(t)


@pytest.mark.parametrize("sde", some("vp", "sub-vp", "ve", "cosine", "karras", "rectified"))
@pytest.mark.parametrize("shape", [(2, 2), (3, 1, 2, 2)], ids=["rank2", "rank4"])
def test_logits_are_those_of_bayes_rule_under_every_sde(sde, shape):
    """log p(x_t | y) of the noised component N(alpha m, alpha^2 s^2 + sigma^2), up to a constant in y."""
    classifier, x, t = NoisyClassifier(Bayes(), sde, ByLogSNR()), normal(*shape), times(sde)[: shape[0]]
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    noised = torch.distributions.Normal(alpha[:, None] * MEANS, torch.hypot(alpha * STD, sigma)[:, None])
    joint = sum(noised.log_prob(x.flatten(1)[:, i, None]) for i in range(x[0].numel()))
    torch.testing.assert_close(classifier(x, t).log_softmax(1), joint.log_softmax(1), rtol=1e-9, atol=1e-9)


def test_rows_are_independent_and_one_evaluation_is_counted():
    classifier, x, t = NoisyClassifier(Bayes(), ss.VP(), ByLogSNR()), normal(4, 3), f64(0.1, 0.4, 0.7, 1.0)
    with counting() as count:
        logits = classifier(x, t)
    assert count.forward == 1
    for i in range(4):
        torch.testing.assert_close(classifier(x[i : i + 1], t[i]), logits[i : i + 1], rtol=1e-12, atol=1e-12)


def test_the_network_runs_in_its_own_dtype_and_receives_the_scaled_state():
    class Records(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))

        def forward(self, x, c_noise, cond=None):
            self.inputs = x, c_noise
            return self.weight.expand(len(x), 5)

    network, sde = Records(), ss.Karras()
    x = normal(2, 3).float()
    logits = NoisyClassifier(network, sde, KarrasPreconditioning(0.5), classes=5)(x, 2.0)
    scaled, label = network.inputs
    assert (scaled.dtype, label.dtype, logits.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(scaled.float(), x / (4 + 0.25) ** 0.5, rtol=2**-7, atol=0)
    torch.testing.assert_close(label, torch.full((2,), 2.0).log() / 4)


def function(x, c_noise, cond=None):
    return x[:, :2]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: NoisyClassifier(function, ss.VP()),
            ValueError,
            r"classes must be the number of classes.*pass classes=K",
        ),
        (
            lambda: NoisyClassifier(Bayes(), ss.VP(), classes=4),
            ValueError,
            "classes must be 3, as the network has; got 4",
        ),
        (lambda: NoisyClassifier(Bayes(), ss.VP(), classes=0), ValueError, "classes must be at least 1; got 0"),
        (lambda: NoisyClassifier(3, ss.VP()), TypeError, "network"),
        (lambda: NoisyClassifier(Bayes(), "vp"), TypeError, "sde"),
        (lambda: NoisyClassifier(Bayes(), ss.VP(), "nois"), ValueError, "prediction must be one of"),
        (lambda: NoisyClassifier(Bayes(), ss.ZeroTerminalSNR(ss.VP()), "karras"), ValueError, "must be finite.*t_max"),
        (
            lambda: NoisyClassifier(function, ss.VP(), classes=3)(normal(4, 5), 0.5),
            ValueError,
            r"\(4, 3\); got \(4, 2\)",
        ),
        (lambda: NoisyClassifier(Bayes(), ss.VP())(normal(4, 5), 2.0), ValueError, "t must lie in"),
        (lambda: NoisyClassifier(Bayes(), ss.VP())(normal(4, 5), f64(0.1, 0.2)), ValueError, "one value per sample"),
        (lambda: NoisyClassifier(Bayes(), ss.VP())([1.0], 0.5), TypeError, "states must be a tensor"),
    ],
    ids=["none", "other", "zero", "network", "sde", "prediction", "infinite", "output", "time", "times", "state"],
)
def test_wrong_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
