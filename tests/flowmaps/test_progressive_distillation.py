"""Progressive distillation: two jumps make one, and short jumps are two DDIM steps of the teacher."""

import torch

import scoresde as ss
from scoresde.flowmaps import ProgressiveDistillation
from scoresde.samplers import DDIM, PredictorCorrector
from tests.conftest import close, f64
from tests.flowmaps.exact import small_map
from tests.flowmaps.test_consistency import target_times
from tests.flowmaps.test_flow_map_objective import drawn
from tests.flowmaps.test_mean_flow import exact


def test_the_exact_map_is_the_target():
    model, teacher = exact(ss.SubVP())
    batch = drawn(model.sde)
    x, s = batch.perturbed(model.sde), target_times(batch)
    target = ProgressiveDistillation(teacher, finest=1e-4).target(model, batch, x, s)
    F, h = model.average(x, batch.t, s)
    close(target.F, F.detach(), 1e-6, 1e-6)
    close(target.h, h.detach(), 1e-6, 1e-6)


def test_a_short_jump_is_two_steps_of_the_teacher():
    """Whatever the map is, the target of a jump within 2 `finest` is DDIM with two steps (2202.00512, algorithm 2)."""
    model, (_, teacher) = small_map(ss.VP()), exact(ss.VP())
    batch, path = drawn(model.sde, n=1), model.path
    t = f64(0.6)
    s = path.time_of_angle(path.angle(t) - 0.3)
    u = path.time_of_angle(path.angle(t) - 0.15)
    batch = batch.__class__(batch.x0, t[None], batch.noise, batch.stream)
    x = batch.perturbed(model.sde)
    target = ProgressiveDistillation(teacher, finest=0.1).target(model, batch, x, s[None])
    ddim = PredictorCorrector(DDIM(), grid=torch.stack([t, u, s]))(teacher, x_T=x).x
    close(model.moved(x, target.F, t, s), ddim, 1e-8, 1e-8)


def test_a_long_jump_is_two_jumps_of_the_map():
    model, (_, teacher) = small_map(ss.VP()), exact(ss.VP())
    batch, path = drawn(model.sde), model.path
    x, t, s = batch.perturbed(model.sde), batch.t, batch.t.flip(0)
    target = ProgressiveDistillation(teacher, finest=1e-4).target(model, batch, x, s)
    u = path.time_of_angle((path.angle(t) + path.angle(s)) / 2)
    between, first = model.jump(x, t, u)
    end, second = model.jump(between, u, s)
    close(model.moved(x, target.F, t, s), end.detach(), 1e-8, 1e-8)
    log_det = 3 * (target.h * (path.clock(s) - path.clock(t)) + (path.size(s) / path.size(t)).log())
    close(log_det, (first + second).detach(), 1e-8, 1e-8)


def test_a_wrong_map_has_a_gradient_towards_the_exact_one():
    model, teacher = exact(ss.VP(), amount=0.1)
    ProgressiveDistillation(teacher).value(model, drawn(model.sde, n=64), torch.ones(64)).mean().backward()
    assert float(model.amount.grad) > 0
