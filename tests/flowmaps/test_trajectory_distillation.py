"""Distillation from solved trajectories: exact for a Gaussian, cubic quadrature, pairs that the map may learn."""

import pytest
import torch

import scoresde as ss
from scoresde.flowmaps import TrajectoryDistillation
from scoresde.flowmaps.trajectory_distillation import cumulative
from scoresde.losses import Drawn
from scoresde.random_stream import RandomStream
from tests.conftest import close, some
from tests.flowmaps.exact import small_map
from tests.flowmaps.test_flow_map_objective import drawn
from tests.flowmaps.test_mean_flow import exact


def test_the_quadrature_is_exact_for_cubics():
    u = torch.linspace(0, 1, 8, dtype=torch.float64)
    coefficients = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    powers = torch.arange(4)
    g = u[:, None] ** powers @ coefficients
    integrals = (u[:, None] ** (powers + 1) / (powers + 1)) @ coefficients
    close(cumulative(g, 1 / 7), integrals, 1e-12, 1e-12)


@pytest.mark.parametrize("sde", some("vp", "ve", "zero-snr-vp"))
def test_the_exact_map_is_the_target(sde):
    model, teacher = exact(sde, data_scale=0.8)
    loss, batch = TrajectoryDistillation(teacher, steps=64), drawn(sde, n=8)
    solved = loss.solve(model, batch)
    assert bool(solved.is_solved.all())
    assert {bool(solved.t[0, k] < solved.t[-1, k]) for k in range(8)} == {True, False}
    rows = torch.arange(8).repeat(3)
    i, j = torch.tensor([[0] * 8, [20] * 8, [64] * 8]).flatten(), torch.tensor([[64] * 8, [50] * 8, [64] * 8]).flatten()
    target = loss.target_of(model.path, solved, i, j, rows)
    F, h = model.average(solved.x[i, rows], solved.t[i, rows], solved.t[j, rows])
    close(target.F, F.detach(), 2e-3, 2e-3)
    close(target.h, h.detach(), 2e-3, 2e-3)


def test_the_error_of_the_targets_falls_with_the_third_power_of_the_step():
    model, teacher = exact(ss.VP())
    errors = []
    for steps in (24, 48):
        value = TrajectoryDistillation(teacher, steps=steps, ends=1.0, diagonal=0.0).value(
            model, drawn(model.sde, n=16), torch.ones(16)
        )
        errors.append(float(value.detach().mean()) ** 0.5)
    assert errors[0] / errors[1] > 5


def test_a_wrong_map_has_a_gradient_towards_the_exact_one():
    model, teacher = exact(ss.VP(), amount=0.1)
    TrajectoryDistillation(teacher).value(model, drawn(model.sde, n=8), torch.ones(8)).mean().backward()
    assert float(model.amount.grad) > 0


@pytest.mark.parametrize("targets", ["all", "down", "data"])
def test_pairs_are_jumps_that_the_map_may_learn(targets):
    sde = ss.VP()
    model = small_map(sde, targets=targets)
    _, teacher = exact(sde)
    batch = drawn(sde, n=40)
    loss = TrajectoryDistillation(teacher, steps=5, pairs=10, diagonal=0.2)
    t = loss.solve(model, batch).t
    i, j = loss.draw_pairs(model, t, batch)
    model._checked(t.gather(0, i).flatten(), t.gather(0, j).flatten())
    assert float((i == j).double().mean()) > 0.15
    if targets == "all":
        assert float((t.gather(0, i) < t.gather(0, j)).double().mean()) > 0.3


def test_a_state_has_the_same_loss_in_any_batch():
    sde = ss.VP()
    model, (_, teacher), batch = small_map(sde), exact(sde), drawn(sde)
    alone = Drawn(batch.x0[2:3], batch.t[2:3], batch.noise[2:3], RandomStream(seeds=[2]))
    loss = TrajectoryDistillation(teacher, steps=4)
    close(loss.value(model, alone, torch.ones(1))[0], loss.value(model, batch, torch.ones(6))[2], 1e-9)
