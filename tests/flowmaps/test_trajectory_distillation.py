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
def test_the_exact_map_is_the_target_also_between_nodes(sde):
    model, teacher = exact(sde, data_scale=0.8)
    loss, batch = TrajectoryDistillation(teacher, steps=48, pairs=6), drawn(sde, n=8)
    solved = loss.solve(model, batch)
    assert bool(solved.is_solved.all())
    assert {bool(solved.t[0, k] < solved.t[-1, k]) for k in range(8)} == {True, False}
    t, s, node = (values.flatten() for values in loss.draw_pairs(model, solved.t, batch))
    x, target = loss.samples(model.path, solved, t, s, node, torch.arange(8).repeat(6))
    F, h = model.average(x, t, s)
    close(target.F, F.detach(), 5e-3, 5e-3)
    close(target.h, h.detach(), 5e-3, 5e-3)


def test_the_error_of_the_targets_falls_with_the_third_power_of_the_step():
    model, teacher = exact(ss.VP())
    batch, one = drawn(model.sde, n=16), torch.ones(16)
    errors = [
        float(TrajectoryDistillation(teacher, steps, diagonal=0.0).value(model, batch, one).detach().mean()) ** 0.5
        for steps in (24, 48)
    ]
    assert errors[0] / errors[1] > 5


def test_a_wrong_map_has_a_gradient_towards_the_exact_one():
    model, teacher = exact(ss.VP(), amount=0.1)
    TrajectoryDistillation(teacher).value(model, drawn(model.sde, n=8), torch.ones(8)).mean().backward()
    assert float(model.amount.grad) > 0


@pytest.mark.parametrize("targets", ["all", "down", "data"])
def test_pairs_are_jumps_that_the_map_may_learn(targets):
    sde = ss.VP()
    model, (_, teacher) = small_map(sde, targets=targets), exact(sde)
    batch = drawn(sde, n=40)
    loss = TrajectoryDistillation(teacher, steps=5, pairs=10, jumps=(1, 2), few=0.5, diagonal=0.2)
    nodes = loss.solve(model, batch).t
    t, s, node = loss.draw_pairs(model, nodes, batch)
    is_node = node >= 0
    assert float(is_node.double().mean()) == pytest.approx(0.2, abs=0.1)
    close(t[is_node], nodes.gather(0, node.clamp(min=0))[is_node])
    close(s[is_node], t[is_node])
    model._checked(t[~is_node], s[~is_node])
    if targets == "all":
        assert float((t < s).double().mean()) > 0.25
    if targets != "data":  # the jumps of samples in one and two steps
        path = model.path
        middle = path.time_of_angle(path.angle(path.ends()).mean())
        few = {(round(float(a), 9), round(float(b), 9)) for a, b in ((sde.t_max, sde.t_min), (sde.t_max, middle))}
        assert few <= {(round(float(a), 9), round(float(b), 9)) for a, b in zip(t.flatten(), s.flatten(), strict=True)}


def test_a_failed_solution_leaves_no_trace_in_the_gradient():
    model, (_, teacher), batch = small_map(ss.VP()), exact(ss.VP()), drawn(ss.VP())
    batch.x0[2], batch.noise[2] = torch.nan, torch.nan
    value = TrajectoryDistillation(teacher, steps=16).value(model, batch, torch.ones(6))
    value.sum().backward()
    assert float(value.detach()[2]) == 0
    assert bool((value[torch.arange(6) != 2] > 0).all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_shares_of_the_pairs_add_up_to_one_at_most():
    _, teacher = exact(ss.VP())
    with pytest.raises(ValueError, match=r"few \+ diagonal must be at most 1; got 1.2"):
        TrajectoryDistillation(teacher, few=0.8, diagonal=0.4)


def test_a_state_has_the_same_loss_in_any_batch():
    sde = ss.VP()
    model, (_, teacher), batch = small_map(sde), exact(sde), drawn(sde)
    alone = Drawn(batch.x0[2:3], batch.t[2:3], batch.noise[2:3], RandomStream(seeds=[2]))
    loss = TrajectoryDistillation(teacher, steps=16)  # enough that every solution succeeds
    close(loss.value(model, alone, torch.ones(1))[0], loss.value(model, batch, torch.ones(6))[2], 1e-9)
