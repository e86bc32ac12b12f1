"""The learned uncertainty: at the minimum of its loss it is the logarithm of the expected error."""

from types import SimpleNamespace

import pytest
import torch

import scoresde as ss
from scoresde.networks.uncertainty import Uncertainty
from scoresde.training.json_lines import read_lines
from scoresde.training.log import LOG
from tests.conftest import normal


class Wrong(torch.nn.Module):
    """A network that predicts zero, with an uncertainty."""

    def __init__(self):
        super().__init__()
        self.uncertainty, self.bias = Uncertainty(8), torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, c_noise, cond=None):
        return self.bias.expand_as(x)


def test_the_loss_is_least_at_the_logarithm_of_the_error():
    torch.manual_seed(0)
    model = ss.ScoreModel(Wrong().double(), ss.VP(), "noise")
    t, noise, x = torch.linspace(0.1, 1.0, 50), normal(50, 3), normal(50, 3, seed=1)
    plain, learned = (ss.losses.DenoisingScoreMatching(uncertainty=uncertain) for uncertain in (False, True))
    error, u = plain(model, x, t=t, noise=noise).value, model.uncertainty(t)
    torch.testing.assert_close(error, noise.square().mean(dim=1))
    terms = learned(model, x, t=t, noise=noise)
    torch.testing.assert_close(terms.value, error * torch.exp(-u) + u)
    torch.testing.assert_close(terms.error, error)
    constant = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    model.network.uncertainty.forward = lambda label: constant.expand(len(label))
    (slope,) = torch.autograd.grad(learned(model, x, t=t, noise=noise).value.mean(), constant)
    assert float(slope) == pytest.approx(1 - float(error.mean()))  # zero where exp(u) = E[error]


def test_the_log_has_the_error_by_noise_level(tmp_path):
    """It does not depend on the uncertainty, which would make it negative."""
    logs = []
    for uncertain in (False, True):
        torch.manual_seed(0)
        loss, run = ss.losses.DenoisingScoreMatching(uncertainty=uncertain), tmp_path / str(uncertain)
        options = {"batch_size": 20, "accumulate": 2, "log_every": 1, "progress": False, "loss": loss}
        ss.fit(ss.ScoreModel(Wrong(), ss.VP(), "noise"), normal(20, 3).float(), run, steps=1, **options)
        logs.append(read_lines(run / LOG)[0])
    plain, learned = logs
    assert learned["loss"] != plain["loss"]
    assert learned["loss_by_log_snr"] == plain["loss_by_log_snr"]
    assert min(level for level in plain["loss_by_log_snr"] if level is not None) > 0


def test_times_of_any_shape_and_models_around_it():
    model = ss.ScoreModel(Wrong(), ss.VP(), "noise")
    values = model.uncertainty(torch.tensor([0.2, 0.7]))
    torch.testing.assert_close(ss.ModelWrapper(model).uncertainty(0.7), values[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.uncertainty(torch.tensor([0.2, 0.7])), values)
    with pytest.raises(ValueError, match="must have a learned uncertainty; got none"):
        ss.ScoreModel(torch.nn.Identity(), ss.VP(), "noise").uncertainty(0.5)
    foreign = SimpleNamespace(sde=model.sde, predict=model.predict)
    with pytest.raises(ValueError, match="uncertainty=True needs a ScoreModel, whose network has"):
        ss.losses.DenoisingScoreMatching(uncertainty=True)(foreign, normal(2, 3))
