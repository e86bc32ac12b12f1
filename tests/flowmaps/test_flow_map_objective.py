"""What all objectives of flow maps share: drawn pairs of times, the velocity and divergence of the flow, errors."""

import pytest
import torch

import scoresde as ss
from scoresde.flowmaps import MeanFlow, UniformClock
from scoresde.flowmaps.flow_map_objective import Target
from scoresde.losses import Drawn
from scoresde.random_stream import RandomStream
from tests.conftest import close, f64, normal, seeded
from tests.flowmaps.exact import GaussianMap, small_map


def drawn(sde, n=6, shape=(3,), seed=0):
    t = UniformClock().quantile(sde, torch.linspace(0.05, 0.95, n, dtype=torch.float64))
    return Drawn(normal(n, *shape, seed=seed), t, normal(n, *shape, seed=seed + 1), RandomStream(seeds=range(n)))


@pytest.mark.parametrize("targets", ["all", "down", "data"])
def test_target_times_are_those_that_the_map_is_trained_for(targets):
    sde = ss.VP()
    model, batch = small_map(sde, targets=targets), drawn(sde, n=400)
    s, t = MeanFlow(diagonal=0.3, ends=0.3).draw_targets(model, batch), batch.t
    assert bool((s >= sde.t_min).all() and (s <= sde.t_max).all())
    assert abs(float((s == t).double().mean()) - 0.3) < 0.1
    model._checked(t, s)
    above = float((s > t).double().mean())
    assert above == pytest.approx({"all": 0.35, "down": 0.0, "data": 0.0}[targets], abs=0.1)
    at_data = float((s == sde.t_min).double().mean())
    assert at_data == pytest.approx({"all": 0.15, "down": 0.3, "data": 0.7}[targets], abs=0.07)


def test_the_flow_of_a_teacher_is_its_velocity_and_divergence_in_the_angle():
    sde, shape = ss.VE(), (2, 2)
    mixture = ss.GaussianMixture(normal(1, *shape), 0.4 * torch.ones(1, dtype=torch.float64))
    model, batch = small_map(sde, shape, data_scale=0.7), drawn(sde, shape=shape)
    x = batch.perturbed(sde)
    flow = MeanFlow(mixture.score_model(sde)).flow(model, batch, x, batch.t)
    scale, step = model.path.size(batch.t), 1e-6
    rate = model.path.rate(batch.t)
    velocity = mixture.score_model(sde).velocity(x, batch.t)
    size_dot = (model.path.size(batch.t + step) - model.path.size(batch.t - step)) / (2 * step)
    column = (-1, 1, 1)
    y_dot = velocity / scale.reshape(column) - x * (size_dot / scale**2).reshape(column)
    close(flow.v, y_dot / rate.reshape(column), 1e-5, 1e-5)
    phi, spread = model.path.angle(batch.t), (0.4 / 0.7) ** 2  # of an isotropic Gaussian, one probe gives the trace
    variance = spread * phi.cos() ** 2 + phi.sin() ** 2
    close(flow.divergence, (1 - spread) * phi.sin() * phi.cos() / variance, 1e-6, 1e-6)


def test_the_loss_of_data_has_the_conditional_velocity():
    sde = ss.VP()
    model, batch = small_map(sde), drawn(sde)
    flow = MeanFlow().flow(model, batch, batch.perturbed(sde), batch.t)
    phi = model.path.angle(batch.t)[:, None]
    close(flow.v, phi.cos() * batch.noise - phi.sin() * batch.x0)


def test_errors_are_weighted():
    loss = MeanFlow(adaptive=1.0, divergence_weight=2.0)
    F, h = f64(3.0, 0.1)[:, None], f64(1.0, 1.5)
    value = loss.errors(
        (F, h), Target(torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)), f64(1.0, 2.0)
    )
    close(value, f64(9 / 9.001 + 2, 0.04 / 0.041 + 4.5))


def test_targets_from_a_teacher_have_less_weight_where_errors_of_the_noise_are_multiplied():
    """Near pure noise under VP, v = (eps - sin(phi) y) / cos(phi): the weight is (10 cos(phi))^2, at most 1."""
    sde, x0 = ss.VP(), normal(4, 3)
    teacher, model = (
        ss.GaussianMixture(normal(1, 3), torch.ones(1)).score_model(sde),
        small_map(sde, prediction="noise"),
    )
    t, cosines = f64(0.2, 0.6, 0.9, 1.0), sde.alpha(f64(0.2, 0.6, 0.9, 1.0))
    close(model.trust(t), (10 * cosines).square().clamp(max=1), 1e-9)
    assert bool((model.trust(t)[2:] < 0.05).all())
    close(small_map(sde).trust(t), torch.ones(4, dtype=torch.float64))  # predicts the velocity itself

    def value(objective):
        return objective.value(model, Drawn(x0, t, normal(4, 3, seed=1), RandomStream(seeds=range(4))), torch.ones(4))

    class Unweighted(MeanFlow):
        def teacher(self, like, model):
            return None

        def flow(self, *arguments):
            return MeanFlow(teacher).flow(*arguments)

    close(value(MeanFlow(teacher)), model.trust(t) * value(Unweighted()), 1e-9)


def test_wrong_models_are_refused():
    with pytest.raises(TypeError, match="predict"):
        MeanFlow(teacher=torch.nn.Identity())
    mixture = ss.GaussianMixture(torch.zeros(1, 3), torch.ones(1))
    with pytest.raises(TypeError, match="jumps need a flow map"):
        MeanFlow()(mixture.score_model(ss.VP()), normal(2, 3), generator=seeded())
    with pytest.raises(ValueError, match=r"same SDE; got VE on .* and VP on"):
        MeanFlow(mixture.score_model(ss.VE()))(small_map(ss.VP()), normal(2, 3), generator=seeded())


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_wrong_numbers_are_refused(scale):
    with pytest.raises(ValueError, match="data_scale must be"):
        UniformClock(scale)
    with pytest.raises(ValueError, match=r"diagonal \+ ends must be at most 1; got 1.3"):
        MeanFlow(diagonal=0.5, ends=0.8)


def test_a_state_has_the_same_loss_in_any_batch():
    sde = ss.VP()
    model = small_map(sde)
    teacher = ss.GaussianMixture(normal(1, 3), torch.ones(1)).score_model(sde)
    batch = drawn(sde)
    alone = Drawn(batch.x0[2:3], batch.t[2:3], batch.noise[2:3], RandomStream(seeds=[2]))
    one = torch.ones(6)
    whole = MeanFlow(teacher).value(model, batch, one)
    close(MeanFlow(teacher).value(model, alone, one)[0], whole[2], 1e-9)


def test_gaussian_map_is_consistent():
    """The closed form in `exact` composes: t to u to s is t to s."""
    model = GaussianMap(ss.VP(), normal(3), 0.3)
    x = normal(2, 3)
    close(model.map(model.map(x, 0.8, 0.4), 0.4, 0.1), model.map(x, 0.8, 0.1), 1e-9, 1e-9)
