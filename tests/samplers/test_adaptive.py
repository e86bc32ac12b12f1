"""Error control for each sample: its noise, its laws, its independence of the batch, and how it fails."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.random_stream import RandomStream
from scoresde.samplers import ErrorControlled, adaptive
from scoresde.samplers.adaptive import AngularPath, Bridges
from scoresde.samplers.grids import segments
from tests.conftest import close, f64, normal, oracle, seeded
from tests.samplers.test_samplers import check_sampler, id_of, start

SDES = [ss.SubVP(t_min=1e-3), ss.VE(), ss.ZeroTerminalSNR(ss.VP(t_min=1e-3))]
EVERY_PATH = pytest.mark.parametrize("sde", SDES, ids=id_of)


# The noise


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 2, 0), (2, 0, 3, 1)])
def test_the_noise_has_its_covariance_in_any_order_of_draws(order):
    n, clocks = 20_000, f64(0.1, 0.25, 0.9, 1.0)
    stream, like = RandomStream(seeded(0)), torch.zeros(n, 1, dtype=torch.float64)
    noise = Bridges(torch.full((n,), -math.inf, dtype=torch.float64), like)
    values = torch.empty(4, n, dtype=torch.float64)
    for i in order:
        values[i] = noise.draw(torch.arange(n), clocks[i].expand(n), stream.normal(like))[:, 0]
    expected = torch.exp(-(clocks[:, None] - clocks).abs())
    close(torch.cov(values), expected, rtol=0, atol=4.5 * math.sqrt(2 / n))


def test_known_points_of_the_noise_stay_and_those_behind_are_forgotten():
    noise = Bridges(f64(0.0)[None], torch.zeros(1, 2, dtype=torch.float64))
    row = torch.tensor([0])
    far = noise.draw(row, f64(1.0)[None], normal(1, 2, seed=1))
    near = noise.draw(row, f64(0.4)[None], normal(1, 2, seed=2))
    close(noise.draw(row, f64(1.0)[None], normal(1, 2, seed=3)), far)
    noise.forget(f64(0.4)[None])
    close(noise.draw(row, f64(0.4)[None], normal(1, 2, seed=4)), near)
    assert sorted(c for c in noise.clocks[0].tolist() if math.isfinite(c)) == [0.4, 0.4, 1.0, 1.0]


# The step


@EVERY_PATH
def test_the_variable_goes_from_end_to_end(sde):
    ends = f64(sde.t_max, sde.t_min)
    path = AngularPath(sde, *ends)
    requested = torch.linspace(path.start, path.end, 999, dtype=torch.float64)
    t = path.time(requested)
    assert torch.equal(t[[0, -1]], ends)
    assert (t.diff() < 0).all()
    close(path.nu(t), requested, rtol=0, atol=2e-3)
    signal = sde.alpha(t) / sde.size(t)
    close(path.log_signal(path.nu(t))[1:], signal.log()[1:], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("level", [0.0, 0.6, 1.0])
def test_the_weights_of_a_step(level):
    """p and q by a fine sum. Level 0: p is the change of angle. Level 1: 2 (sin phi_s - sin phi_t) / cos phi_s."""
    path, nu, after = AngularPath(ss.VP(), f64(1.0), f64(1e-3)), f64(1.0, 4.0), f64(1.8, 5.5)
    total, p, q = path.weights(nu, after, level)
    part = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    grid = nu[:, None] + (after - nu)[:, None] * part
    phi, decay = torch.atan(30 / torch.sinh(grid)), path.log_signal(grid) - path.log_signal(after)[:, None]
    integrand = (1 + level**2) * torch.exp(level**2 * decay)
    close(p, torch.trapezoid(integrand, phi), rtol=1e-8)
    close(q, torch.trapezoid(integrand * part, phi), rtol=1e-8)
    close(total, torch.exp(level**2 * decay[:, 0]))
    if level == 1:
        close(p, 2 * (phi[:, -1].sin() - phi[:, 0].sin()) / phi[:, -1].cos(), rtol=1e-10)
    if level == 0:
        close(p, phi[:, -1] - phi[:, 0], rtol=1e-10)


@pytest.mark.parametrize("level", [0.0, 1.0])
@EVERY_PATH
def test_data_of_unit_variance_are_exact_in_a_few_evaluations(sde, level):
    """V = 0: no step is rejected, and the result is the noise itself, or the rotated state."""
    model, n = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(sde), 4000
    size, last = (float(sde.size(f64(t))) for t in (sde.t_max, sde.t_min))
    result = ErrorControlled(l=level)(model, x_T=normal(n, 2, seed=1) * size, generator=seeded(0))
    error = 4.5 * math.sqrt(2 / n)
    close(torch.cov(result.x.T) / last**2, torch.eye(2, dtype=torch.float64), rtol=0, atol=error)
    assert result.nfe <= 24
    if not level:
        close(result.x / last, normal(n, 2, seed=1), rtol=0, atol=1e-9)


# The law


@EVERY_PATH
def test_samples_have_the_law_of_the_oracle(sde):
    check_sampler(ErrorControlled(), None, sde)


def test_another_member_of_the_family_on_images():
    check_sampler(ErrorControlled(l=1.5, segments=3), None, ss.VE(), (1, 2, 2))


def test_without_noise_it_follows_the_probability_flow():
    model, x_T = oracle((3,)).score_model(SDES[0]), normal(20, 3)
    exact = ss.samplers.ProbabilityFlow(ss.solvers.Adams(160))(model, x_T=x_T).x
    for tolerance in (0.05, 0.01):
        x = ErrorControlled(tolerance, tolerance / 5, l=0.0)(model, x_T=x_T).x
        assert (x - exact).abs().max() < 2 * tolerance


def test_a_tighter_tolerance_is_a_smaller_error_of_the_moments():
    """On one anisotropic Gaussian with details much finer than the extent of the data."""
    sde, stds = ss.VP(t_min=1e-3), f64(0.1, 0.3, 2.0, 4.0)[None]
    mixture = ss.GaussianMixture(torch.zeros(1, 4), stds)
    exact = (sde.alpha(f64(sde.t_min)) * stds[0]).square() + sde.sigma(f64(sde.t_min)).square()
    errors, evaluations = [], []
    for rtol in (0.8, 0.2):
        sampler = ErrorControlled(rtol=rtol, atol=rtol / 10, max_step=1.0)
        result = sampler(mixture.score_model(sde), x_T=start(mixture, sde, 10_000).float(), generator=seeded(0))
        errors.append(float((result.x.double().var(dim=0) / exact - 1).abs().max()))
        evaluations.append(result.nfe)
    assert errors[0] > 2 * errors[1]
    assert evaluations[0] < evaluations[1]


def test_noise_drawn_anew_after_a_rejection_would_be_biased(monkeypatch):
    """Without the bridges a small tolerance makes the law worse: five Gaussians with details of 0.05 to 0.3."""
    stds = 0.05 + 0.25 * torch.rand(5, 8, generator=seeded(5), dtype=torch.float64)
    mixture, sde = ss.GaussianMixture(normal(5, 8, seed=5), stds), ss.VP(t_min=1e-3)
    sampler, model, x_T = ErrorControlled(0.02, 0.01), mixture.score_model(sde), start(mixture, sde, 1500)
    draw, exact = Bridges.draw, mixture.covariance()

    def covariance_error():
        """Largest error of an entry of the covariance, in standard deviations."""
        x, scale = sampler(model, x_T=x_T, generator=seeded(0)).x, exact.diagonal().sqrt()
        return float(((torch.cov(x.T) - exact) / scale / scale[:, None]).abs().max())

    def anew(noise, which, clock, z):
        here = noise.clocks.min(dim=1, keepdim=True).values
        noise.clocks = noise.clocks.masked_fill(noise.clocks > here, math.inf)
        return draw(noise, which, clock, z)

    assert covariance_error() < 0.1
    monkeypatch.setattr(adaptive.Bridges, "draw", anew)
    assert covariance_error() > 0.15


# The batch


@pytest.mark.parametrize(("shape", "dtype"), [((3,), torch.float32), ((1, 2, 2), torch.float64)])
def test_a_sample_does_not_depend_on_its_batch(shape, dtype):
    model, sampler, seeds = oracle(shape).score_model(ss.VP()), ErrorControlled(), [11, 5, 8, 3]
    together = sampler(model, shape=(4, *shape), seeds=seeds, dtype=dtype)
    assert together.x.dtype == dtype
    alone = [sampler(model, shape=(1, *shape), seeds=[seed], dtype=dtype) for seed in seeds]
    close(together.x, torch.cat([one.x for one in alone]), rtol=1e-5, atol=1e-5)
    assert len({one.nfe for one in alone}) > 1  # as many steps as each sample needs
    assert together.nfe == max(one.nfe for one in alone)


def test_only_samples_that_have_not_arrived_are_evaluated_each_with_its_own_time_and_condition():
    calls = []

    def network(x, c_noise, cond):
        calls.append((len(x), len(cond), len(c_noise.unique())))
        return 0.1 * x + (x * cond[:, None]).sin()

    model, condition = ss.ScoreModel(network, ss.VP(t_min=1e-3)), torch.linspace(0, 20, 6)
    result = ErrorControlled()(model, shape=(6, 3), seeds=range(6), cond=condition)
    assert result.nfe == len(calls)
    counts, conditions, times = zip(*calls, strict=True)
    assert counts == conditions
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[0] == 6 > counts[-1]
    assert max(times) > 1
    alone = ErrorControlled()(model, shape=(1, 3), seeds=[4], cond=condition[4:5])
    close(alone.x[0], result.x[4], rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_select_samples_is_refused():
    """Samples arrive one after the other, so the sampler needs the model of the others."""

    class Own:
        sde = ss.VP()

        def predict(self, x, t):
            return exact.predict(x, t)

    class Selects(Own):
        def rows(self, rows, count):
            return self

    exact, sampler = oracle((3,)).score_model(ss.VP()), ErrorControlled()
    with pytest.raises(TypeError, match=r"Own has no 'rows'"):
        sampler(Own(), shape=(4, 3), seeds=range(4))
    own, expected = (sampler(model, shape=(4, 3), seeds=range(4)) for model in (Selects(), exact))
    assert torch.equal(own.x, expected.x)
    assert own.nfe == expected.nfe


# How it fails


def test_samples_that_turn_nan_are_named_with_their_times():
    def network(x, c_noise, cond):
        return torch.where((c_noise < 0.5)[:, None] & (cond[:, None] > 0), torch.nan, x)

    model = ss.ScoreModel(network, ss.VP())
    with pytest.raises(RuntimeError, match=r"1 of 3 samples turned NaN or infinite \(first: sample 1 at t=0\.\d+\)"):
        ErrorControlled()(model, shape=(3, 2), seeds=range(3), cond=torch.tensor([0.0, 1.0, 0.0]))


def test_a_budget_that_is_too_small_is_named_and_one_that_is_enough_changes_nothing():
    model, draws = oracle((3,)).score_model(ss.VP()), {"shape": (5, 3), "seeds": range(5)}
    free = ErrorControlled()(model, **draws)
    assert torch.equal(free.x, ErrorControlled(max_evaluations=free.nfe)(model, **draws).x)
    with pytest.raises(RuntimeError, match=r"5 of 5 samples did not arrive .*more than 7 evaluations"):
        ErrorControlled(max_evaluations=7)(model, **draws)


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
    with pytest.raises(ValueError, match="must be"):
        ErrorControlled(**arguments)


def test_segments_are_transitions():
    assert ErrorControlled(segments=4).transitions(ss.VP()) == segments(ss.VP(), 4)


def test_a_path_without_noise_at_its_end_is_refused():
    model = ss.ScoreModel(lambda x, c_noise, cond: x, ss.VP(t_min=0.0), prediction="v")
    with pytest.raises(ValueError, match="raise t_min"):
        ErrorControlled()(model, shape=(2, 3), seeds=[0, 1])
