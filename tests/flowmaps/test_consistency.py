"""Consistency: the exact map of a Gaussian is the target, to the order of the step for the discrete objective."""

import pytest
import torch

import scoresde as ss
from scoresde.flowmaps import Consistency, MeanFlow
from tests.conftest import close, some
from tests.flowmaps.exact import small_map
from tests.flowmaps.test_flow_map_objective import drawn
from tests.flowmaps.test_mean_flow import exact


def target_times(batch):
    return torch.where(torch.arange(len(batch.t)) % 3 == 0, batch.t, batch.t.flip(0))


@pytest.mark.parametrize("sde", some("vp", "ve", "zero-snr-vp"))
def test_the_exact_map_is_the_target_of_the_continuous_objective(sde):
    model, teacher = exact(sde)
    batch = drawn(sde)
    x, s = batch.perturbed(sde), target_times(batch)
    target = Consistency(teacher).target(model, batch, x, s)
    F, h = model.average(x, batch.t, s)
    close(target.F, F.detach(), 1e-5, 1e-5)
    close(target.h, h.detach(), 1e-5, 1e-5)


def test_the_error_of_the_discrete_target_is_that_of_a_ddim_step():
    """At the exact map the error of the end of the jump is that of one step of the teacher: second order."""
    model, teacher = exact(ss.VP())
    batch = drawn(model.sde, n=12)
    x, s = batch.perturbed(model.sde), target_times(batch)
    F, h = model.average(x, batch.t, s)
    errors = []
    for steps in (100, 200):
        loss = Consistency(teacher, steps)
        target = loss.target(model, batch, x, s)
        scaled = loss.scale(model, batch.t, s)[:, None] * (F - target.F)
        errors.append([float(e.detach().abs().max()) for e in (scaled, h - target.h)])
    close(errors[0][0] / errors[1][0] > 3, True)
    assert errors[0][1] / errors[1][1] > 1.8


def test_the_continuous_objective_normalises_the_derivative_of_mean_flow():
    model, batch = small_map(ss.VP()), drawn(ss.VP())
    x, s = batch.perturbed(model.sde), target_times(batch)
    F = model.average(x, batch.t, s)[0].detach()
    ours, theirs = (loss.target(model, batch, x, s).F - F for loss in (Consistency(), MeanFlow()))
    d = model.path.angle(s) - model.path.angle(batch.t)
    g = theirs * torch.sinc(d / torch.pi)[:, None]
    expected = g / (g.square().mean(dim=1, keepdim=True).sqrt() + 0.1)
    close(ours, torch.where((s == batch.t)[:, None], theirs, expected), 1e-8, 1e-8)  # on the diagonal, F* = v


@pytest.mark.parametrize("steps", [None, 20])
def test_a_wrong_map_has_a_gradient_towards_the_exact_one(steps):
    model, teacher = exact(ss.VP(), amount=0.3)
    Consistency(teacher, steps).value(model, drawn(model.sde, n=64), torch.ones(64)).mean().backward()
    assert float(model.amount.grad) > 0


def test_training_from_data_moves_along_the_pair():
    """Without a teacher the neighbouring state has the same data and noise (2303.01469, eq. 9)."""
    model, batch = small_map(ss.VP(), targets="data"), drawn(ss.VP())
    loss, x = Consistency(steps=10), batch.perturbed(model.sde)
    s = torch.full_like(batch.t, model.sde.t_min)
    path = model.path
    step = (path.angle(path.ends())[1] - path.angle(path.ends())[0]) / 10
    u = path.time_of_angle((path.angle(batch.t) - step).clamp(min=0)).clamp(min=model.sde.t_min)
    end = model.map(batch.x0 * model.sde.alpha(u)[:, None] + batch.noise * model.sde.sigma(u)[:, None], u, s)
    target = loss.target(model, batch, x, s)
    close(model.moved(x, target.F, batch.t, s), end.detach(), 1e-5, 1e-5)
