"""Error control for each sample: its noise, its laws, its independence of the batch, and how it fails."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.random_stream import RandomStream
from scoresde.samplers import adaptive
from scoresde.samplers.adaptive import AngularPath, Bridges
from scoresde.samplers.grids import transitions
from tests.conftest import close, f64, normal, oracle, seeded
from tests.samplers.test_samplers import check_against_oracle, start

SDES = [
    ss.VP(t_min=1e-3),
    ss.SubVP(t_min=1e-3),
    ss.VE(),
    ss.Rectified(t_max=0.999),
    ss.ZeroTerminalSNR(ss.VP(t_min=1e-3)),
]


def name(value):
    return type(value).__name__


def sharp(seed=5):
    """Five Gaussians in 8 dimensions with details of 0.05 to 0.3: many steps are rejected."""
    stds = 0.05 + 0.25 * torch.rand(5, 8, generator=seeded(seed), dtype=torch.float64)
    return ss.GaussianMixture(normal(5, 8, seed=seed), stds)


def covariance_error(x, mixture):
    """Largest error of an entry of the covariance, in standard deviations."""
    exact = mixture.covariance()
    scale = exact.diagonal().sqrt()
    return float(((torch.cov(x.flatten(1).double().T) - exact) / scale / scale[:, None]).abs().max())


class Counting(ss.ModelWrapper):
    """A model that keeps the times it is asked about."""

    def __init__(self, model):
        super().__init__(model)
        self.times = []

    def predict(self, x, t):
        self.times.append(t)
        return super().predict(x, t)


# The noise


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 2, 0), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_the_noise_has_its_covariance_in_whatever_order_it_is_asked(order):
    n, clocks = 40_000, f64(0.1, 0.25, 0.9, 1.0)
    stream, like = RandomStream(seeded(0)), torch.zeros(n, 1, dtype=torch.float64)
    paths = Bridges(torch.full((n,), -math.inf, dtype=torch.float64), like)
    values = torch.empty(4, n, dtype=torch.float64)
    for i in order:
        values[i] = paths.draw(torch.arange(n), clocks[i].expand(n), stream.normal(like))[:, 0]
    expected = torch.exp(-(clocks[:, None] - clocks).abs())
    close(torch.cov(values), expected, rtol=0, atol=4.5 * math.sqrt(2 / n))


def test_known_points_of_the_noise_stay_and_those_behind_are_forgotten():
    paths = Bridges(f64(0.0)[None], torch.zeros(1, 2, dtype=torch.float64))
    row = torch.tensor([0])
    far = paths.draw(row, f64(1.0)[None], normal(1, 2, seed=1))
    near = paths.draw(row, f64(0.4)[None], normal(1, 2, seed=2))
    close(paths.draw(row, f64(1.0)[None], normal(1, 2, seed=3)), far)
    paths.forget(f64(0.4)[None])
    close(paths.draw(row, f64(0.4)[None], normal(1, 2, seed=4)), near)
    assert sorted(c for c in paths.clocks[0].tolist() if math.isfinite(c)) == [0.4, 0.4, 1.0, 1.0]


# The step


@pytest.mark.parametrize("sde", SDES, ids=name)
def test_the_variable_goes_from_end_to_end(sde):
    ends = f64(sde.t_max, sde.t_min)
    angle = AngularPath(sde, *ends)
    asked = torch.linspace(angle.start, angle.end, 999, dtype=torch.float64)
    t = angle.time(asked)
    assert torch.equal(t[[0, -1]], ends)
    assert (t.diff() < 0).all()
    nu = angle.of_time(t)
    close(nu, asked, rtol=0, atol=2e-3)
    close(
        angle.log_signal(nu)[1:],
        (sde.alpha(t) / torch.hypot(sde.alpha(t), sde.sigma(t))).log()[1:],
        rtol=1e-6,
        atol=1e-12,
    )


@pytest.mark.parametrize("level", [0.0, 0.6, 1.0, 1.7])
def test_the_weights_of_a_step(level):
    """Level 0: p is the change of angle. Level 1: 2 (sin phi_s - sin phi_t) / cos phi_s. Any: p by a fine sum."""
    angle = AngularPath(ss.VP(), f64(1.0), f64(1e-3))
    nu, after = f64(1.0, 4.0), f64(1.8, 5.5)
    kept, p, q = angle.weights(nu, after, level)
    grid = nu[:, None] + (after - nu)[:, None] * torch.linspace(0, 1, 200_001, dtype=torch.float64)
    phi, decay = torch.atan(30 / torch.sinh(grid)), angle.log_signal(grid) - angle.log_signal(after)[:, None]
    integrand = (1 + level**2) * torch.exp(level**2 * decay)
    part = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    close(p, torch.trapezoid(integrand, phi), rtol=1e-8)
    close(q, torch.trapezoid(integrand * part, phi), rtol=1e-8)
    close(kept, torch.exp(level**2 * decay[:, 0]))
    if level == 1:
        close(p, 2 * (phi[:, -1].sin() - phi[:, 0].sin()) / phi[:, -1].cos(), rtol=1e-10)
    if level == 0:
        close(p, phi[:, -1] - phi[:, 0], rtol=1e-10)


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("sde", SDES, ids=name)
def test_data_of_unit_variance_are_exact_in_a_few_evaluations(sde, level):
    """V = 0: nothing is rejected, and what is returned is the noise itself, or the state turned."""
    model = Counting(ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(sde))
    x_T = normal(20_000, 2, seed=1) * float(torch.hypot(sde.alpha(f64(sde.t_max)), sde.sigma(f64(sde.t_max))))
    result = ss.samplers.ErrorControlled(l=level)(model, x_T=x_T, generator=seeded(0))
    variance = float(sde.alpha(f64(sde.t_min)) ** 2 + sde.sigma(f64(sde.t_min)) ** 2)
    close(torch.cov(result.x.T), variance * torch.eye(2, dtype=torch.float64), rtol=0, atol=4.5 * variance * 1e-2)
    assert len(model.times) == result.nfe <= 24


# The law


@pytest.mark.parametrize("sde", SDES, ids=name)
def test_samples_have_the_law_of_the_oracle(sde):
    mixture = oracle((3,))
    result = ss.samplers.ErrorControlled()(mixture.score_model(sde), x_T=start(mixture, sde), generator=seeded(0))
    check_against_oracle(result.x, mixture, sde)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.5])
def test_every_member_of_the_family_on_images(level):
    mixture, sde = oracle((1, 2, 2)), ss.VE()
    sampler = ss.samplers.ErrorControlled(l=level, segments=3)
    check_against_oracle(
        sampler(mixture.score_model(sde), x_T=start(mixture, sde), generator=seeded(1)).x, mixture, sde
    )


@pytest.mark.slow
def test_a_tighter_tolerance_is_a_smaller_error_of_the_moments():
    """On one anisotropic Gaussian in the family's hardest place, details much finer than the data's extent."""
    sde, stds = ss.VP(t_min=1e-3), f64(0.1, 0.3, 2.0, 4.0)[None]
    mixture = ss.GaussianMixture(torch.zeros(1, 4), stds)
    errors, evaluations = [], []
    for rtol in (0.8, 0.2, 0.05):
        sampler = ss.samplers.ErrorControlled(rtol=rtol, atol=rtol / 10, max_step=1.0)
        result = sampler(mixture.score_model(sde), x_T=start(mixture, sde, 10_000).float(), generator=seeded(0))
        exact = (sde.alpha(f64(sde.t_min)) * stds[0]).square() + sde.sigma(f64(sde.t_min)).square()
        errors.append(float((result.x.double().var(dim=0) / exact - 1).abs().max()))
        evaluations.append(result.nfe)
    assert errors[0] > 2 * errors[1]
    assert errors[1] > 1.5 * errors[2]
    assert errors[2] < 0.06
    assert evaluations[0] < evaluations[1] < evaluations[2]


def test_noise_drawn_anew_after_a_rejection_would_be_biased(monkeypatch):
    """What the bridges are for: without them a small tolerance makes the law worse."""
    mixture, sde = sharp(), ss.VP(t_min=1e-3)
    sampler, model = ss.samplers.ErrorControlled(rtol=0.02, atol=0.01), mixture.score_model(sde)
    x_T = start(mixture, sde, 1500)
    bridged = sampler(model, x_T=x_T, generator=seeded(0)).x
    draw = Bridges.draw

    def anew(paths, which, clock, z):
        here = paths.clocks.min(dim=1, keepdim=True).values
        paths.clocks = paths.clocks.masked_fill(paths.clocks > here, math.inf)
        return draw(paths, which, clock, z)

    monkeypatch.setattr(adaptive.Bridges, "draw", anew)
    redrawn = sampler(model, x_T=x_T, generator=seeded(0)).x
    assert covariance_error(bridged, mixture) < 0.1
    assert covariance_error(redrawn, mixture) > 0.15


# The batch


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_does_not_depend_on_its_batch(shape, dtype):
    mixture, sde, seeds = oracle(shape), ss.VP(), [11, 5, 8, 3]
    model, sampler = mixture.score_model(sde), ss.samplers.ErrorControlled()
    together = sampler(model, shape=(4, *shape), seeds=seeds, dtype=dtype)
    assert together.x.dtype == dtype
    alone = [sampler(model, shape=(1, *shape), seeds=[seed], dtype=dtype) for seed in seeds]
    close(together.x, torch.cat([one.x for one in alone]), rtol=1e-5, atol=1e-5)
    assert len({one.nfe for one in alone}) > 1  # as many steps as each sample needs
    assert together.nfe == max(one.nfe for one in alone)


def test_only_samples_on_the_way_are_evaluated_each_at_its_own_time_with_its_own_condition():
    sde, seen = ss.VP(t_min=1e-3), []

    def network(x, c_noise, cond):
        seen.append((len(x), len(cond), len(c_noise.unique())))
        return 0.1 * x + (x * cond[:, None]).sin()

    sampler = ss.samplers.ErrorControlled()
    condition = torch.linspace(0, 20, 6)
    result = sampler(ss.ScoreModel(network, sde), shape=(6, 3), seeds=range(6), cond=condition)
    assert all(n == m for n, m, _ in seen)
    assert result.nfe == len(seen)
    counts = [n for n, _, _ in seen]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 6 > counts[-1]
    assert max(times for _, _, times in seen) > 1
    alone = sampler(ss.ScoreModel(network, sde), shape=(1, 3), seeds=[4], cond=condition[4:5])
    close(alone.x[0], result.x[4], rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_choose_samples_is_told_what_it_lacks():
    """Samples arrive one after the other: a class of one's own has to say what its model of the others is."""

    class Own:
        sde = ss.VP()

        def predict(self, x, t):
            return exact.predict(x, t)

    class Chooses(Own):
        def rows(self, rows, count):
            return self

    exact, sampler = oracle((3,)).score_model(ss.VP()), ss.samplers.ErrorControlled()
    with pytest.raises(TypeError, match=r"Own has no 'rows' .* make the class a subclass of scoresde.ModelWrapper"):
        sampler(Own(), shape=(4, 3), seeds=range(4))
    found, expected = (sampler(model, shape=(4, 3), seeds=range(4)) for model in (Chooses(), exact))
    assert torch.equal(found.x, expected.x)
    assert found.nfe == expected.nfe


# How it fails


def test_samples_that_turn_nan_are_named_with_their_times():
    def network(x, c_noise, cond):
        return torch.where((c_noise < 0.5)[:, None] & (cond[:, None] > 0), torch.nan, x)

    model = ss.ScoreModel(network, ss.VP())
    with pytest.raises(RuntimeError, match=r"1 of 3 samples turned NaN or infinite \(1 at t=0\.\d+ first\)"):
        ss.samplers.ErrorControlled()(model, shape=(3, 2), seeds=range(3), cond=torch.tensor([0.0, 1.0, 0.0]))


def test_a_budget_that_is_too_small_is_named():
    model = oracle((3,)).score_model(ss.VP())
    with pytest.raises(RuntimeError, match=r"5 of 5 samples did not arrive .*more than 7 evaluations"):
        ss.samplers.ErrorControlled(max_evaluations=7)(model, shape=(5, 3), seeds=range(5))


def test_a_smaller_budget_is_enough_where_it_is_enough():
    model = oracle((3,)).score_model(ss.VP())
    free = ss.samplers.ErrorControlled()(model, shape=(5, 3), seeds=range(5))
    tight = ss.samplers.ErrorControlled(max_evaluations=free.nfe)(model, shape=(5, 3), seeds=range(5))
    assert torch.equal(free.x, tight.x)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rtol": 0.0},
        {"atol": -1.0},
        {"exponent": 0},
        {"safety": 1.0},
        {"max_step": 1.5},
        {"max_step": 0.0},
        {"max_evaluations": 1},
        {"segments": 0},
        {"l": -1.0},
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="expected"):
        ss.samplers.ErrorControlled(**arguments)


def test_transitions_of_segments():
    sde = ss.VP()
    assert len(ss.samplers.ErrorControlled().transitions(sde)) == 1
    expected = transitions(ss.samplers.uniform_log_snr(sde, 4), sde)
    assert ss.samplers.ErrorControlled(segments=4).transitions(sde) == expected


def test_a_path_without_noise_at_its_end_is_refused():
    sde = ss.VP(t_min=0.0)
    model = ss.ScoreModel(lambda x, c_noise, cond: x, sde, prediction="v")
    with pytest.raises(ValueError, match="raise t_min"):
        ss.samplers.ErrorControlled()(model, shape=(2, 3), seeds=[0, 1])
