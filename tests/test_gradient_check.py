"""Networks that autograd does not differentiate in x are refused where their derivative is used; others never are."""

import numpy as np
import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde.data import Levels
from scoresde.gradient_check import check_gradient
from tests.conftest import exact_model, normal, oracle, paths_with, seeded

VP = ss.VP()
MIXTURE = oracle((3, 2))
EXACT = exact_model(MIXTURE, VP, "noise").network
REFUSED = "the network must be differentiable in its input by autograd; got a directional derivative"


def no_grad(x, label, cond=None):
    with torch.no_grad():
        return EXACT(x, label)


def inference_mode(x, label, cond=None):
    with torch.inference_mode():
        return EXACT(x, label)


def detached(x, label, cond=None):
    return EXACT(x.detach(), label)


def through_numpy(x, label, cond=None):
    return EXACT(torch.from_numpy(np.asarray(x.detach())), label)


def one_channel(x, label, cond=None):
    return EXACT(torch.cat([x[:, :2], x[:, 2:].detach()], dim=1), label)


def one_branch(x, label, cond=None):
    return 0.5 * EXACT(x, label) + 0.5 * EXACT(x.detach(), label)


BROKEN = [no_grad, inference_mode, detached, through_numpy, one_channel, one_branch]
TRACES = [ss.Hutchinson(), ss.ExactTrace(), ss.ExactTrace(mode="forward")]


@pytest.mark.parametrize("network", BROKEN)
@pytest.mark.parametrize("trace", TRACES, ids=["hutchinson", "exact", "forward"])
def test_likelihoods_refuse_a_network_that_detaches(network, trace):
    if network in (no_grad, inference_mode, through_numpy) and trace == ss.ExactTrace(mode="forward"):
        pytest.skip("forward mode has other rules for these")
    model, count = ss.ScoreModel(network, VP), 5 if network is one_branch else 1
    with pytest.raises(ValueError, match=REFUSED):
        ss.log_prob(model, MIXTURE.sample(count, generator=seeded()), trace=trace, seeds=range(count))


def test_bits_and_samples_with_their_density_refuse_it_too():
    model, levels = ss.ScoreModel(detached, VP), torch.zeros(2, 3, 2, dtype=torch.uint8)
    for call in (
        lambda: ss.bits_per_dim(model, levels, Levels(8)),
        lambda: ss.sample_with_log_prob(model, shape=(2, 3, 2), seeds=[0, 1]),
        lambda: ss.log_prob(model, normal(2, 3, 2), differentiable=True),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            call()
    ss.encode(model, normal(2, 3, 2))  # needs no derivative
    bound, exact = (ss.bounds.continuous(m, levels, Levels(8), draws=2) for m in (model, ss.ScoreModel(EXACT, VP)))
    assert bound.mean == exact.mean


@pytest.mark.parametrize("prediction", ["noise", "data", "v", "velocity", "score", "karras"])
def test_a_detached_network_is_found_whatever_it_predicts(prediction):
    network = exact_model(MIXTURE, VP, prediction).network
    model = ss.ScoreModel(lambda x, label, cond=None: network(x.detach(), label), VP, prediction)
    with pytest.raises(ValueError, match=REFUSED):
        check_gradient(model, MIXTURE.sample(4, generator=seeded()), VP.t_min, VP.t_max)


@paths_with("scale", [1e-3, 1.0, 1e3])
def test_exact_scores_pass_on_every_path_at_every_scale(sde, scale):
    mixture = ss.GaussianMixture(scale * normal(3, 5), scale * torch.tensor([0.3, 0.5, 0.2]))
    for t_from, t_to in ((sde.t_min, sde.t_max), (sde.t_max, sde.t_min)):
        x = mixture.sample(1, sde, t_from, seeded())
        check_gradient(mixture.score_model(sde), x, t_from, t_to, scale)


class Plain(nn.Module):
    """A network whose kinks, rounding or training mode could be mistaken for a wrong derivative."""

    def __init__(self, activation, frequency=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.frequency = frequency
        self.layers = nn.Sequential(nn.Linear(9, 64), activation, nn.Dropout(0.5), nn.Linear(64, 64), activation)
        self.last = nn.Linear(64, 8)

    def forward(self, x, label, cond=None):
        x = torch.sin(self.frequency * x) if self.frequency > 1 else x
        return self.last(self.layers(torch.cat([x, label[:, None].to(x)], dim=1)))


PLAIN = {
    "relu": (nn.ReLU(), 1.0, torch.float32),
    "silu": (nn.SiLU(), 1.0, torch.float32),
    "bfloat16": (nn.ReLU(), 1.0, torch.bfloat16),
    "float16": (nn.SiLU(), 1.0, torch.float16),
    "double": (nn.Tanh(), 1.0, torch.float64),
    "high frequencies": (nn.SiLU(), 400.0, torch.float32),
}


@pytest.mark.parametrize("name", PLAIN)
def test_rough_and_rounded_networks_pass(name):
    activation, frequency, dtype = PLAIN[name]
    network = Plain(activation, frequency).to(dtype)
    for seed in range(20):
        check_gradient(ss.ScoreModel(network, VP), normal(1, 8, seed=seed), VP.t_min, VP.t_max)


def test_a_network_that_does_not_depend_on_x_has_a_likelihood():
    """A constant estimate of the noise has the derivative 0 by both; x(t_max) is then alpha x / alpha(t_min)."""
    model, x = ss.ScoreModel(lambda x, label, cond=None: torch.zeros_like(x), VP), normal(2, 3)
    result = ss.log_prob(model, x, trace=ss.ExactTrace())
    ratio = float(VP.alpha(torch.tensor(1.0).double()) / VP.alpha(torch.tensor(VP.t_min).double()))
    torch.testing.assert_close(result.latent, ratio * x, rtol=1e-2, atol=1e-4)


def test_the_check_draws_nothing_and_leaves_modes_and_statistics():
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    model = ss.ScoreModel(lambda x, label, cond=None: network(x.float()), VP)
    model.network_module, state = network, torch.get_rng_state()
    before = network[0].running_mean.clone()
    network[1].eval()
    check_gradient(model, normal(4, 3), VP.t_min, VP.t_max)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(network[0].running_mean, before)
    assert [module.training for module in network] == [True, False]


LOSSES = [ss.losses.ImplicitScoreMatching, ss.losses.SlicedScoreMatching]


class Growing(nn.Module):
    """A detached network whose last layer is 0 at first."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x, label, cond=None):
        return self.scale * torch.tanh(x.detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_score_matching_by_derivatives_refuses_a_network_that_detaches(loss):
    for network in (detached, one_branch):
        with pytest.raises(ValueError, match=REFUSED):
            loss()(ss.ScoreModel(network, VP), MIXTURE.sample(8, generator=seeded()), generator=seeded())
    objective, model = loss(), ss.ScoreModel(Growing(), VP)
    objective(model, normal(8, 3), generator=seeded())
    model.network.scale.data.fill_(1.0)
    with pytest.raises(ValueError, match=REFUSED):
        objective(model, normal(8, 3), generator=seeded())


@pytest.mark.parametrize("loss", LOSSES)
def test_score_matching_trains_networks_with_dropout(loss):
    objective, model = loss(), ss.ScoreModel(Plain(nn.SiLU()), VP)
    for _ in range(4):
        assert objective(model, normal(8, 8).float(), generator=seeded()).value.isfinite().all()
    assert model.network.training
