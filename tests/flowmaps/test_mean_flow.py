"""MeanFlow: its target at the exact map of a Gaussian is that map, and its derivatives are those of the map."""

import pytest
import torch

import scoresde as ss
from scoresde.flowmaps import MeanFlow
from scoresde.flowmaps.mean_flow import moving
from tests.conftest import close, normal, some
from tests.flowmaps.exact import GaussianMap, small_map
from tests.flowmaps.test_flow_map_objective import drawn

MEAN, STD = normal(3, seed=4), 0.5


def exact(sde, **options):
    mixture = ss.GaussianMixture(MEAN[None], torch.tensor([STD]).double())
    return GaussianMap(sde, MEAN, STD, **options), mixture.score_model(sde)


@pytest.mark.parametrize("sde", some("vp", "sub-vp", "ve", "karras", "rectified", "zero-snr-vp"))
def test_the_exact_map_is_its_own_target(sde):
    model, teacher = exact(sde, data_scale=0.8)
    batch, loss = drawn(sde), MeanFlow(teacher)
    x = batch.perturbed(sde)
    for s in (batch.t, batch.t.flip(0), torch.full_like(batch.t, sde.t_min), torch.full_like(batch.t, sde.t_max)):
        target = loss.target(model, batch, x, s)
        F, h = model.average(x, batch.t, s)
        close(target.F, F.detach(), 1e-6, 1e-6)
        close(target.h, h.detach(), 1e-5, 1e-5)


def test_a_wrong_map_has_a_loss_and_a_gradient_towards_the_exact_one():
    model, teacher = exact(ss.VP(), amount=0.1)
    value = MeanFlow(teacher).value(model, drawn(model.sde, n=64), torch.ones(64)).mean()
    value.backward()
    assert float(value.detach()) > 1e-3
    assert float(model.amount.grad) > 0


def test_the_derivatives_along_the_flow_are_those_of_the_map():
    model, step = small_map(ss.VP()), 1e-5
    batch = drawn(model.sde)
    x, s, v, path = batch.perturbed(model.sde), batch.t.flip(0), normal(6, 3, seed=9), model.path

    def at(shift):
        t = path.time_of_angle(path.angle(batch.t) + shift)
        y = x / path.size(batch.t)[:, None] + shift * v
        moved = model.map(path.to_state(y, t), t, s) / path.size(s)[:, None]
        return moved, model.average(path.to_state(y, t), t, s)[1]

    (after, h_after), (before, h_before) = at(step), at(-step)
    jump = moving(model, x, batch.t, s, v)
    close(jump.X, (after - before).detach() / (2 * step), 1e-5, 1e-5)
    close(jump.h_dot, (h_after - h_before).detach() / (2 * step), 1e-5, 1e-5)


def test_on_the_diagonal_the_target_is_the_velocity():
    model, batch = small_map(ss.VP()), drawn(ss.VP())
    target = MeanFlow().target(model, batch, batch.perturbed(model.sde), batch.t)
    phi = model.path.angle(batch.t)[:, None]
    close(target.F, phi.cos() * batch.noise - phi.sin() * batch.x0, 1e-9, 1e-9)
