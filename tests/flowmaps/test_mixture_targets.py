"""The accurate flow map of a mixture is the target of every objective, in both directions."""

import pytest
import torch

import scoresde as ss
from scoresde.flowmaps import Consistency, MeanFlow, ProgressiveDistillation, TrajectoryDistillation
from scoresde.losses import Drawn
from tests.conftest import close, f64
from tests.flowmaps.exact import MixtureMap
from tests.flowmaps.test_flow_map_objective import drawn

MIXTURE = ss.GaussianMixture(f64(1.0, -0.5, -1.0, 0.2, 0.3, 0.8).reshape(3, 2), f64(0.3, 0.5, 0.4), f64(0.5, 0.2, 0.3))
SDE = ss.VP()


def exact_divergence(loss, model):
    """Make the objective use the exact divergence of the mixture's flow."""
    estimate = loss.flow

    def flow(model, drawn, x, t):
        found = estimate(model, drawn, x, t)
        y = x / model.path.size(t)[:, None]
        return found._replace(divergence=model.velocity_of(y, model.path.angle(t).expand(len(y)))[1])

    loss.flow = flow
    return loss


@pytest.fixture(scope="module")
def model():
    return MixtureMap(SDE, MIXTURE)


def test_the_map_of_the_tests_is_the_accurate_flow(model):
    x = MIXTURE.sample(4, generator=torch.Generator().manual_seed(0))
    latent = model.encode(x, steps=1)
    close(latent, ss.encode(MIXTURE.score_model(SDE), x, solver=ss.solvers.Adams(100, data_scale=1.0)), 1e-3, 1e-3)
    exact = MIXTURE.log_prob(x, SDE, SDE.t_min) - MIXTURE.log_prob(latent, SDE, SDE.t_max)
    close(model.log_prob(x, steps=1).value - SDE.prior_log_prob(latent), exact, 1e-3, 1e-3)


@pytest.mark.parametrize(
    "loss",
    [MeanFlow, Consistency, lambda teacher: ProgressiveDistillation(teacher, finest=1e-4)],
    ids=["mean_flow", "consistency", "progressive"],
)
def test_the_accurate_map_is_the_target(model, loss):
    loss = exact_divergence(loss(MIXTURE.score_model(SDE)), model)
    batch = drawn(SDE, n=4, shape=(2,))
    x, s = batch.perturbed(SDE), batch.t.flip(0)
    target = loss.target(model, batch, x, s)
    F, h = model.average(x, batch.t, s)
    close(target.F, F, 1e-3, 1e-3)
    close(target.h, h, 1e-3, 1e-3)


def test_the_accurate_map_is_the_target_of_solved_trajectories(model):
    loss = exact_divergence(TrajectoryDistillation(MIXTURE.score_model(SDE), steps=64, pairs=3), model)
    batch = drawn(SDE, n=4, shape=(2,))
    batch = Drawn(0.8 * batch.x0, batch.t, batch.noise, batch.stream)
    solved = loss.solve(model, batch)
    t, s, node = (values.flatten() for values in loss.draw_pairs(model, solved.t, batch))
    x, target = loss.samples(model.path, solved, t, s, node, torch.arange(4).repeat(3))
    F, h = model.average(x, t, s)
    close(target.F, F, 5e-3, 5e-3)
    close(target.h, h, 5e-3, 5e-3)
