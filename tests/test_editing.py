"""Interpolation and edits, on one Gaussian in closed form: its flow and every reverse law are affine."""

import math
from itertools import pairwise

import pytest
import torch

import scoresde as ss
from scoresde.editing import From, interpolate, interpolate_noised, lerp, perturb_and_denoise, slerp
from scoresde.random_stream import RandomStream
from scoresde.samplers import (
    DDIM,
    Ancestral,
    DPMSolverPP,
    PredictorCorrector,
    ProbabilityFlow,
    UniPC,
    uniform_log_snr,
    uniform_time,
)
from scoresde.samplers.sampler import as_step
from tests.conftest import close, f64, make_transition, normal, oracle, seeded, within

CASES = pytest.mark.parametrize(("sde", "shape"), [(ss.VP(), (3,)), (ss.Rectified(), (1, 2, 2))], ids=str)
WEIGHTS = [0.3, 1.2]


def gaussian(*shape):
    """One anisotropic, rotated Gaussian over states of this shape."""
    size = math.prod(shape)
    rotation = torch.linalg.qr(normal(size, size, seed=3)).Q
    mean, stds = normal(1, *shape, seed=4), 0.3 + torch.arange(size, dtype=torch.float64).reshape(1, *shape) / size
    return ss.GaussianMixture(mean, stds, rotation=rotation)


def carried(mixture, sde, x, start, end):
    """The flow of one Gaussian from x at `start` to `end`: the deviation along each axis keeps its quantile."""
    (a, s), (b, r) = ((sde.alpha(f64(t)), sde.sigma(f64(t))) for t in (start, end))
    mean, stds, axes = mixture.means[0], mixture.stds[0], mixture.rotation[0]
    growth = torch.hypot(b * stds, r) / torch.hypot(a * stds, s)
    return (b * mean + ((x.flatten(1) - a * mean) @ axes * growth) @ axes.T).reshape(x.shape)


def two_states(shape):
    return normal(3, *shape), 1 + normal(3, *shape, seed=1)


# Spherical interpolation


@pytest.mark.parametrize("shape", [(5, 3), (3, 3), (2, 1, 4, 4)])
def test_slerp_keeps_the_norm_and_divides_the_angle(shape):
    first, second = (
        x / x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1)) for x in (normal(*shape), normal(*shape, seed=1))
    )
    angle = torch.arccos((first * second).flatten(1).sum(dim=1))
    for weight in (0.2, 0.7, -0.5):
        between = slerp(3 * first, 3 * second, weight)
        close(between.flatten(1).norm(dim=1), torch.full_like(angle, 3.0), rtol=1e-12)
        close((between * first).flatten(1).sum(dim=1), 3 * torch.cos(weight * angle), atol=1e-12)
    assert torch.equal(slerp(first.float(), second.float(), 0.0), first.float())
    assert torch.equal(slerp(first, second, 1.0), second)


def test_slerp_of_states_of_unequal_norms():
    """2010.02502: sin((1 - w) theta)/sin(theta) first + sin(w theta)/sin(theta) second."""
    first, second, theta, w = f64(2.0, 0.0)[None], 5 * f64(math.cos(1.1), math.sin(1.1))[None], 1.1, 0.3
    expected = (math.sin(0.7 * theta) * first + math.sin(w * theta) * second) / math.sin(theta)
    close(slerp(first, second, w), expected)


@pytest.mark.parametrize("angle", [0.0, 1e-300, 1e-8, 1e-5])
def test_slerp_of_nearly_parallel_states_is_linear(angle):
    first = f64(1.0, 0.0)[None]
    second = 2 * f64(math.cos(angle), math.sin(angle))[None]
    close(slerp(first, second, 0.4), lerp(first, second, 0.4), rtol=1e-10, atol=1e-320)
    close(slerp(first, torch.zeros_like(first), 0.4), 0.6 * first)


def test_slerp_refuses_opposite_states():
    first = normal(3, 4)
    second = torch.stack([first[0], -2 * first[1], normal(4, seed=1)])
    with pytest.raises(ValueError, match=r"opposite directions .*: 1 of 3 pairs \(first \[1\]\); use mode='linear'"):
        slerp(first, second, 0.5)


# Interpolation of latents


@CASES
def test_interpolation_of_latents_on_gaussian_data(sde, shape):
    """Linear: the flow is affine, and the weights add up to one. Spherical: between the exact latents."""
    (x, y), mixture = two_states(shape), gaussian(*shape)
    model, solver = mixture.score_model(sde), ss.solvers.Adams(40)
    linear = torch.stack([lerp(x, y, w) for w in WEIGHTS])
    close(interpolate(model, x, y, WEIGHTS, "linear", solver=solver), linear, atol=1e-3, rtol=0)
    first, second = (carried(mixture, sde, state, sde.t_min, sde.t_max) for state in (x, y))
    expected = torch.stack([carried(mixture, sde, slerp(first, second, w), sde.t_max, sde.t_min) for w in WEIGHTS])
    together = interpolate(model, x, y, WEIGHTS, solver=solver)
    close(together, expected, atol=1e-3, rtol=0)
    assert (expected - linear).abs().max() > 0.01
    close(interpolate(model, x[1:2], y[1:2], WEIGHTS, solver=solver)[:, 0], together[:, 1], rtol=1e-10)


@pytest.mark.parametrize(("mode", "dtype"), [("spherical", torch.float32), ("linear", torch.float64)])
def test_the_ends_are_round_trips(mode, dtype):
    model, solver = oracle((3,)).score_model(ss.VP()), ss.solvers.Adams(steps=10)
    x, y = (state.to(dtype) for state in two_states((3,)))
    ends = interpolate(model, x, y, torch.tensor([0.0, 1.0]), mode, solver=solver)
    assert ends.dtype == dtype
    assert torch.equal(ends[0], ss.round_trip(model, x, solver=solver).x)
    assert torch.equal(ends[1], ss.round_trip(model, y, solver=solver).x)


def test_condition_and_solver_are_used():
    conditions, cond = [], normal(3, 1)

    def network(x, label, cond):
        conditions.append(cond)
        return cond * x

    model = ss.ScoreModel(network, ss.VP(), "v")
    interpolate(model, *two_states((2,)), [0.2, 0.8], cond=cond, solver=ss.solvers.RungeKutta("heun2", 5))
    # Two latents and two weights, and evaluations that measure the scale; samples of unequal scale are solved apart.
    used = torch.cat(conditions)
    assert all(int((used == c).sum()) >= 4 * 10 for c in cond)
    assert bool(torch.isin(used, cond).all())


# A sampler from t


def levels(sampler, t, sde):
    """The times of a sampler from t."""
    pairs = From(sampler, t).transitions(sde)
    assert all(bool(b == a) for (_, b), (a, _) in pairwise(pairs))
    return [float(pairs[0][0]), *(float(b) for _, b in pairs)]


def test_the_first_transition_is_cut():
    sampler = PredictorCorrector(DDIM(), grid=[1.0, 0.8, 0.6, 0.4, 0.2])
    assert levels(sampler, 1.0, ss.VP()) == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert levels(sampler, 0.7, ss.VP()) == [0.7, 0.6, 0.4, 0.2]
    assert levels(sampler, 0.6, ss.VP()) == [0.6, 0.4, 0.2]
    assert levels(sampler, 0.25, ss.VP()) == [0.25, 0.2]
    assert levels(ProbabilityFlow(), 0.25, ss.VP()) == [0.25, 1e-5]
    for grid in (uniform_time, uniform_log_snr):
        assert levels(PredictorCorrector(DDIM(), steps=5, grid=grid), 0.33, ss.VP())[-1] == 1e-5


@pytest.mark.parametrize("beyond", [0.0, 1e-17, 1e-12, 0.019])
def test_a_remnant_is_joined_to_the_next_transition(beyond):
    sampler = PredictorCorrector(DDIM(), grid=[1.0, 0.8, 0.6, 0.4, 0.2])
    assert levels(sampler, 0.4 + beyond, ss.VP()) == [0.4 + beyond, 0.2]
    assert levels(sampler, 0.8 + beyond, ss.VP()) == [0.8 + beyond, 0.6, 0.4, 0.2]
    if beyond:  # the last one has no next
        assert levels(sampler, 0.2 + 10 * beyond, ss.VP())[-1] == 0.2


def test_transitions_that_rise_again_stay_below():
    sampler = PredictorCorrector(Ancestral(), grid=f64(1.0, 0.5, 0.9, 0.5, 0.1, 0.4, 0.1))
    assert levels(sampler, 0.7, ss.VP()) == [0.7, 0.5, 0.7, 0.5, 0.1, 0.4, 0.1]
    assert levels(sampler, 0.3, ss.VP()) == [0.3, 0.1, 0.3, 0.1]


@pytest.mark.parametrize("predictor", [DDIM(), Ancestral()])
def test_from_a_node_it_is_the_rest_of_the_sampler(predictor):
    model, x_T = oracle((3,)).score_model(ss.VP()), normal(4, 3)
    sampler = PredictorCorrector(predictor, steps=9, grid="uniform_log_snr", denoise_final=True)
    t, states = float(uniform_log_snr(model.sde, 9)[4]), []

    def replayed(model, x, t_from, t_to, stream):
        """A step that draws the same noise from the same time on."""
        return make_transition(predictor, model, x, t_from, t_to, RandomStream(seeded(int(1e6 * t_from))))

    sampler.predictor = as_step(replayed)
    whole = sampler(model, x_T=x_T, callback=lambda i, t, x: states.append(x))
    rest = From(sampler, t)(model, x_T=states[3])
    assert torch.equal(rest.x, whole.x)
    assert (whole.nfe, rest.nfe) == (10, 6)


@pytest.mark.parametrize("above", [1e-15, 0.05, 0.5])
@pytest.mark.parametrize("predictor", [DPMSolverPP(3), UniPC(3)], ids=["DPMSolverPP", "UniPC"])
def test_multistep_methods_keep_their_accuracy_from_any_time(predictor, above):
    """On one Gaussian, from t just above a node or within a transition: no worse than from the node."""
    sde, mixture, x_t, errors = ss.VP(t_min=1e-3), gaussian(3), normal(4, 3), []
    sampler, grid = PredictorCorrector(predictor, steps=60, grid="uniform_log_snr"), uniform_log_snr(sde, 60)
    for t in (float(grid[30] + part * (grid[29] - grid[30])) for part in (0.0, above)):
        x = From(sampler, t)(mixture.score_model(sde), x_T=x_t).x
        errors.append(float((x - carried(mixture, sde, x_t, t, sde.t_min)).abs().max()))
    assert errors[1] < 1.2 * errors[0] < 0.01


# SDEdit


def test_from_the_end_it_is_plain_sampling():
    """Where no signal is left, the result does not depend on x."""
    model, sampler = oracle((3,)).score_model(ss.ZeroTerminalSNR(ss.VP())), PredictorCorrector(DDIM(), steps=8)
    of_x, of_y = (
        perturb_and_denoise(model, state, 1.0, sampler, seeds=[5, 6, 7], trajectory=True) for state in two_states((3,))
    )
    assert torch.equal(of_x.x, of_y.x)
    close(of_x.x, sampler(model, x_T=of_x.trajectory[0]).x, rtol=0)
    assert of_x.nfe == 8


def law(mixture, sde, x, t, stochastic):
    """Mean (2,) and covariance (2, 2) of an edit of x (2,) on one Gaussian, at t_min.

    Along each axis the state u at t_min has variance V, and x_t = r u + v^(1/2) eps. The reverse process gives u as
    q(u | x_t), with gain V r / V_t and variance V v / V_t; the flow has the gain (V / V_t)^(1/2) and no variance.
    """
    mean, stds, axes = mixture.means[0], mixture.stds[0], mixture.rotation[0]
    start, end = f64(sde.t_min), f64(t)
    (a, s), (b, r) = ((sde.alpha(time), sde.sigma(time)) for time in (start, end))
    ratio, added = sde.transition(start, end)
    before, after = (a * stds).square() + s.square(), (b * stds).square() + r.square()
    gain = ratio * before / after if stochastic else (before / after).sqrt()
    variance = (gain * r).square() + (before * added / after if stochastic else 0.0)
    return a * mean + (b * (x - mean) @ axes * gain) @ axes.T, axes @ variance.diag() @ axes.T


@pytest.mark.parametrize("signal", [0.5, 2.0, 50.0])
@pytest.mark.parametrize("sde", [ss.VP(), ss.VE()], ids=str)
@pytest.mark.parametrize(
    ("sampler", "stochastic"),
    [
        (PredictorCorrector(DPMSolverPP(2, l=1.0), steps=50, grid="uniform_log_snr"), True),
        (ProbabilityFlow(ss.solvers.Adams(steps=20)), False),
    ],
    ids=["reverse", "flow"],
)
def test_an_edit_of_a_gaussian_has_the_exact_law(sde, signal, sampler, stochastic):
    """x is noised and x_0 drawn from its posterior given x_t: neither x again, nor a sample of the data."""
    mixture, x, n = gaussian(2), f64(1.5, -0.5), 3000
    t = float(sde.time(f64(2 * math.log(signal))))
    edited = perturb_and_denoise(mixture.score_model(sde), x.expand(n, 2), t, sampler, generator=seeded(1)).x
    mean, covariance = law(mixture, sde, x, t, stochastic)
    within(edited, mean)
    centred = edited - mean
    within(centred[:, :, None] * centred[:, None, :], covariance)


@pytest.mark.parametrize("randomness", [{"seeds": range(4000)}, {"generator": seeded()}], ids=["seeds", "generator"])
def test_the_sampler_draws_anew(randomness):
    """The noise of x_t and the first draw of the sampler are independent."""
    sde, x, drawn = ss.VP(), normal(4000, 2), []

    def step(model, x, t_from, t_to, stream):
        drawn.extend((x, stream.normal(x)))
        return x

    sampler = PredictorCorrector(step, grid=[1.0, 0.1])
    perturb_and_denoise(oracle((2,)).score_model(sde), x, 0.5, sampler, **randomness)
    eps = (drawn[0] - sde.alpha(f64(0.5)) * x) / sde.sigma(f64(0.5))
    within(eps.square(), torch.ones(2, dtype=torch.float64))
    within(eps * drawn[1], torch.zeros(2, dtype=torch.float64))


def test_an_edit_depends_on_its_seed_alone():
    model, x = oracle((1, 2, 2)).score_model(ss.VP()), normal(3, 1, 2, 2).float()
    sampler = PredictorCorrector(Ancestral(), ss.samplers.Langevin(), steps=10)
    together = perturb_and_denoise(model, x, 0.5, sampler, seeds=[3, 1, 4]).x
    assert together.dtype == torch.float32
    for i, seed in enumerate([3, 1, 4]):
        alone = perturb_and_denoise(model, x[i : i + 1], 0.5, sampler, seeds=[seed]).x
        close(alone[0], together[i], rtol=1e-5, atol=1e-5)
    first, second, other = (perturb_and_denoise(model, x, 0.5, sampler, generator=seeded(s)).x for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_options_reach_the_sampler():
    model, stops = oracle((2,)).score_model(ss.VP()), []
    sampler = PredictorCorrector(Ancestral(), grid=[1.0, 0.5, 0.2], denoise_final=True)
    options = {"trajectory": True, "callback": lambda i, t, x: stops.append(float(t))}
    result = perturb_and_denoise(model, normal(2, 2), 0.6, sampler, seeds=[0, 1], **options)
    assert stops == [0.5, 0.2]
    assert result.trajectory.shape == (3, 2, 2)
    assert result.nfe == 3


# Interpolation of noised data


@pytest.mark.parametrize("noise", ["same", "independent"])
def test_the_states_between_two_noised_states(noise):
    """With a sampler that returns the state that it starts from."""
    sde, n, t, weights = ss.VP(), 4000, 0.4, [0.0, 0.25, 0.5, 1.0]
    x, y = normal(1, 2).expand(n, 2), normal(1, 2, seed=1).expand(n, 2)
    still = PredictorCorrector(lambda model, x, t_from, t_to, stream: x, grid=[1.0, 0.1])
    states = interpolate_noised(oracle((2,)).score_model(sde), x, y, weights, t, still, noise, seeds=range(n))
    alpha, sigma = sde.alpha(f64(t)), sde.sigma(f64(t))
    eps = torch.stack([(state - alpha * lerp(x, y, w)) / sigma for state, w in zip(states, weights, strict=True)])
    for value, w in zip(eps, weights, strict=True):
        within(value, torch.zeros(2, dtype=torch.float64))
        within(value.square(), f64(1.0 if noise == "same" else (1 - w) ** 2 + w**2).expand(2))
        close(value, lerp(eps[0], eps[-1], w), atol=1e-12)
    assert torch.allclose(eps[0], eps[-1]) == (noise == "same")


@pytest.mark.parametrize("randomness", [{"seeds": [1, 2, 3]}, {"generator": 5}, {}], ids=["seeds", "generator", "none"])
@pytest.mark.parametrize("noise", ["same", "independent"])
def test_on_a_gaussian_the_path_is_a_line_that_begins_with_an_edit(noise, randomness):
    """A stochastic sampler whose draws are the same for all weights is an affine function of its start."""
    model, (x, y) = gaussian(3).score_model(ss.VP()), two_states((3,))
    sampler = PredictorCorrector(Ancestral(), steps=20, grid="uniform_log_snr")

    def draws():
        return {"generator": seeded(5)} if "generator" in randomness else randomness

    path = interpolate_noised(model, x, y, [0.0, 0.2, 0.7, 1.0], 0.5, sampler, noise, **draws())
    close(path[1], lerp(path[0], path[-1], 0.2), atol=1e-10)
    close(path[2], lerp(path[0], path[-1], 0.7), atol=1e-10)
    assert (path[0] - path[-1]).abs().max() > 0.1
    if randomness:
        of_x, of_y = (perturb_and_denoise(model, state, 0.5, sampler, **draws()).x for state in (x, y))
        assert torch.equal(path[0], of_x)
        assert torch.equal(path[-1], of_y) == (noise == "same")


# Bad input


DDIM_10 = PredictorCorrector(DDIM(), steps=10)
X = normal(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: interpolate(m, X, X[:1], [0.5]), r"same shape \(B, \*\); got \(2, 3\) and \(1, 3"),
        (lambda m: slerp(X, X[:1], 0.5), r"same shape \(B, \*\); got \(2, 3\) and \(1, 3"),
        (lambda m: lerp(X, X[:, :1], 0.5), r"same shape \(B, \*\); got \(2, 3\) and \(2, 1"),
        (lambda m: interpolate(m, X, X, []), r"finite numbers \(K,\), at least one"),
        (lambda m: interpolate(m, X, X, [math.nan]), "finite numbers"),
        (lambda m: interpolate(m, X, X, torch.zeros(2, 2)), "finite numbers"),
        (lambda m: interpolate(m, X, X, [0.5], "cubic"), "mode must be one of spherical, linear; got 'cubic'"),
        (lambda m: interpolate(ss.thresholding.Clipped(m), X, X, [0.5]), r"its \.model"),
        (lambda m: perturb_and_denoise(m, X, 1.5, DDIM_10), r"t must lie in \[1e-05, 1\], .* got t=1.5"),
        (lambda m: perturb_and_denoise(m, X, 1e-5, DDIM_10), "got t=1e-05"),
        (lambda m: perturb_and_denoise(m, X, math.nan, DDIM_10), "got t=nan"),
        (lambda m: perturb_and_denoise(m, X.byte(), 0.5, DDIM_10), "must be floating-point .* got torch.uint8"),
        (lambda m: perturb_and_denoise(m, X, 0.5, DDIM_10, seeds=[1]), "expected one seed per sample"),
        (
            lambda m: perturb_and_denoise(m, X, 0.1, PredictorCorrector(DDIM(), grid=[1.0, 0.5])),
            "got t=0.1, but the sampler goes from 1 to 0.5",
        ),
        (lambda m: interpolate_noised(m, X, X, [0.5], 0.5, DDIM_10, "none"), "noise must be 'same' or 'independent'"),
        (lambda m: interpolate_noised(m, X, X[:1], [0.5], 0.5, DDIM_10), "same shape"),
        (lambda m: interpolate_noised(m, X, X, [0.5], 2.0, DDIM_10), "t must lie in"),
        (lambda m: interpolate_noised(m, X, X.int(), [0.5], 0.5, DDIM_10), "must be floating-point"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(gaussian(3).score_model(ss.VP()))


def test_a_step_is_not_a_sampler():
    with pytest.raises(TypeError, match="sampler must be a Sampler; got DDIM"):
        From(DDIM(), 0.5)
