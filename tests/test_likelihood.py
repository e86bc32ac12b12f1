"""Likelihoods against the oracle: the identity without the prior's mismatch, bits per dimension, bounds, seeds."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import scoresde as ss
from scoresde.data import Affine, Compose, Levels, Logit
from scoresde.dequantization import DataMap
from scoresde.random_stream import RandomStream
from scoresde.solvers import Adams, AdaptiveAdams, RungeKutta, SciPy, Status, TorchDiffEq
from tests.conftest import PATHS, oracle, within

SHAPES = [(3,), (2, 5), (1, 4, 4)]
FINE, COARSE = RungeKutta("rk4", 64), RungeKutta("rk4", 24)


def identity_error(mixture, sde, x, result):
    """Difference, in nats per dimension, of the identity that leaves the prior's mismatch out."""
    prior = sde.prior_log_prob(result.latent)
    exact_prior = mixture.log_prob(result.latent, sde, sde.t_max)
    expected = mixture.log_prob(x, sde, sde.t_min)
    return (result.value - prior + exact_prior - expected).abs() / x[0].numel()


@pytest.mark.parametrize("sde", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=["vector", "sequence", "image"])
def test_oracle_identity(sde, shape):
    """To 1e-4 with a fine budget, to 1e-3 with the default."""
    mixture = oracle(shape)
    x = mixture.sample(8, sde, sde.t_min, generator=torch.Generator().manual_seed(0))
    for solver, tolerance in ((FINE, 1e-4), (None, 1e-3)):
        result = ss.log_prob(mixture.score_model(sde), x, trace=ss.ExactTrace(), solver=solver)
        assert identity_error(mixture, sde, x, result).max() < tolerance
        assert result.status.tolist() == [Status.OK] * 8
        assert torch.equal(result.stderr, torch.zeros(8, dtype=torch.float64))
        assert result.time.tolist() == [sde.t_max] * 8


@pytest.mark.parametrize("prediction", ["noise", "data", "score", "velocity", "karras"])
def test_the_identity_holds_for_every_prediction_type(prediction):
    """A network that emits the exact target of another parameterisation, in float64."""
    sde, mixture = ss.VP(), oracle((3,))
    exact = mixture.score_model(sde)

    class Emit(torch.nn.Module):
        def forward(self, x, label, cond=None):
            t = torch.as_tensor(self.t, dtype=torch.float64)
            state = x / model.prediction.c_in(sde, t)
            p, q = model.prediction.target(sde, t)
            return exact.predict(state, t).combine(p, q)

    class Model(ss.ScoreModel):
        def predict(self, x, t):
            self.network.t = t
            return super().predict(x, t)

    model = Model(Emit(), sde, prediction)
    x = mixture.sample(4, sde, sde.t_min, generator=torch.Generator().manual_seed(0))
    result = ss.log_prob(model, x, trace=ss.ExactTrace(), solver=FINE)
    assert identity_error(mixture, sde, x, result).max() < 1e-4


def test_torchdiffeq_agrees_with_the_fixed_grid():
    mixture, sde = oracle((3,)), ss.VP()
    x = mixture.sample(8, sde, sde.t_min, generator=torch.Generator().manual_seed(0))
    model = mixture.score_model(sde)
    adaptive = ss.log_prob(model, x, trace=ss.ExactTrace(), solver=TorchDiffEq(rtol=1e-7, atol=1e-7))
    fixed = ss.log_prob(model, x, trace=ss.ExactTrace(), solver=FINE)
    torch.testing.assert_close(adaptive.value, fixed.value, atol=3e-4, rtol=0)
    torch.testing.assert_close(adaptive.latent, fixed.latent, atol=1e-4, rtol=0)


def test_evaluations_are_counted_and_each_is_one_forward_pass():
    mixture, sde = oracle((3,)), ss.VP()
    model, calls = mixture.score_model(sde), []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    for trace, products in ((ss.Hutchinson(), 1), (ss.Hutchinson(3, resample=False), 3), (ss.ExactTrace(chunk=2), 3)):
        calls.clear()
        result = ss.log_prob(model, torch.zeros(2, 3), trace=trace, solver=RungeKutta("rk4", 5), seeds=[0, 1])
        assert result.nfe.tolist() == [len(calls)] * 2
        assert result.backward.tolist() == [products * len(calls)] * 2


ESTIMATES = [
    pytest.param(trace, solver, id=f"{trace.probes}-{trace.resample}-{type(solver).__name__}")
    for trace in (ss.Hutchinson(2), ss.Hutchinson(4, "gaussian"), ss.Hutchinson(4, resample=False))
    for solver in (Adams(24), AdaptiveAdams(1e-2, 1 / 16))
]


@pytest.mark.parametrize(("trace", "solver"), ESTIMATES)
def test_hutchinson_is_unbiased_and_its_standard_error_is_calibrated(trace, solver):
    """Pooled over 200 seeds and 16 states."""
    mixture, sde = oracle((1, 4, 4)), ss.VP()
    model, seeds = mixture.score_model(sde), range(200)
    x = mixture.sample(16, generator=torch.Generator().manual_seed(3))
    exact = ss.log_prob(model, x, trace=ss.ExactTrace(), solver=solver).value
    result = ss.log_prob(model, x.repeat_interleave(200, 0), trace=trace, solver=solver, seeds=[*seeds] * 16)
    value, stderr = result.value.reshape(16, 200), result.stderr.reshape(16, 200)
    spread = value.var(dim=1)
    assert ((value.mean(dim=1) - exact).abs() < 4.5 * (spread / 200).sqrt()).all()
    pooled = stderr.square().mean().sqrt() / spread.mean().sqrt()
    assert float(pooled) == pytest.approx(1, abs=0.1)


def test_the_standard_error_of_one_probe_is_an_upper_bound_or_unknown():
    mixture, sde, solver = oracle((1, 4, 4)), ss.VP(), Adams(24)
    x = mixture.sample(1, generator=torch.Generator().manual_seed(3)).expand(300, 1, 4, 4)
    for distribution in ("rademacher", "gaussian"):
        trace = ss.Hutchinson(1, distribution)
        result = ss.log_prob(mixture.score_model(sde), x, trace=trace, solver=solver, seeds=range(300))
        bound, spread = float(result.stderr.square().mean().sqrt()), float(result.value.std())
        assert 0.95 * spread < bound < 3 * spread
    kept = ss.log_prob(mixture.score_model(sde), x[:2], trace=ss.Hutchinson(resample=False), solver=solver)
    adapter = ss.log_prob(mixture.score_model(sde), x[:2], trace=ss.Hutchinson(1), solver=TorchDiffEq(rtol=1e-2))
    assert kept.stderr is None
    assert adapter.stderr is None


def test_fresh_probes_average_along_the_trajectory():
    mixture, sde, solver = oracle((1, 4, 4)), ss.VP(), RungeKutta("rk4", 24)
    model = mixture.score_model(sde)
    x = mixture.sample(1, generator=torch.Generator().manual_seed(3)).expand(200, 1, 4, 4)
    spreads = [
        float(
            ss.log_prob(
                model, x, trace=ss.Hutchinson(1, resample=resample), solver=solver, seeds=range(200)
            ).value.std()
        )
        for resample in (True, False)
    ]
    assert spreads[0] < 0.7 * spreads[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_does_not_depend_on_its_batch(dtype):
    mixture, sde = oracle((1, 4, 4)), ss.VP()
    model = mixture.score_model(sde)
    x = mixture.sample(5, generator=torch.Generator().manual_seed(0)).to(dtype)
    together = ss.log_prob(model, x, seeds=[3, 1, 4, 1, 5], solver=RungeKutta("rk4", 16))
    for i, seed in enumerate([3, 1, 4, 1, 5]):
        alone = ss.log_prob(model, x[i : i + 1], seeds=[seed], solver=RungeKutta("rk4", 16))
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-8, atol=1e-8)


def test_a_prior_that_matches_gives_the_exact_density():
    """Standard normal data under VP stays standard normal: log p is known outright."""
    mixture = ss.GaussianMixture(torch.zeros(1, 3), torch.ones(1))
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = ss.log_prob(mixture.score_model(ss.VP()), x, trace=ss.ExactTrace()).value
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(dim=1)
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE(), ss.Rectified()], ids=str)
def test_encode_and_decode_are_inverse(sde):
    mixture = oracle((1, 4, 4))
    model = mixture.score_model(sde)
    x = mixture.sample(4, sde, sde.t_min, generator=torch.Generator().manual_seed(0))
    latent = ss.encode(model, x, solver=RungeKutta("rk4", 48))
    torch.testing.assert_close(latent, ss.log_prob(model, x, solver=RungeKutta("rk4", 48), seeds=range(4)).latent)
    torch.testing.assert_close(ss.decode(model, latent, solver=RungeKutta("rk4", 48)), x, atol=2e-3, rtol=0)


LEVELS = torch.randint(0, 8, (6, 1, 2, 2), generator=torch.Generator().manual_seed(0))


def bits_of(transform, **arguments):
    """Bits per dimension of levels under one and the same density over levels, seen through a transform."""
    density = ss.GaussianMixture(torch.full((1, 1, 2, 2), 4.0), torch.tensor([2.0]))
    scale = math.exp(float(transform.log_det(torch.zeros(1, 1, 2, 2))) / 4)
    shift = float(transform(torch.zeros(1, 1, 2, 2))[0, 0, 0, 0])
    seen = ss.GaussianMixture(density.means.reshape(1, 1, 2, 2) * scale + shift, density.stds[:, 0] * scale)
    arguments = {"trace": ss.ExactTrace(), "solver": RungeKutta("rk4", 48), **arguments}
    # A long path: at the published beta_max = 20 a mean of 0.5 is still seen in the prior, as 1e-3 bits.
    return ss.bits_per_dim(seen.score_model(ss.VP(beta_max=40.0)), LEVELS, transform, **arguments)


def test_bits_do_not_depend_on_the_scale_of_the_data():
    unit, symmetric = bits_of(Levels(8, 0, 1)), bits_of(Levels(8, -1, 1))
    assert unit.mean == pytest.approx(symmetric.mean, abs=2e-4)


def test_bits_are_the_density_at_the_dequantised_point():
    bits = bits_of(Levels(8, -1, 1), seeds=range(6))
    u = RandomStream(seeds=range(6)).uniform(LEVELS.double())
    log_density = torch.distributions.Normal(4.0, 2.0).log_prob(LEVELS + u).flatten(1).sum(dim=1)
    torch.testing.assert_close(bits.per_image, -log_density / (4 * math.log(2)), atol=2e-4, rtol=0)
    assert bits.mean == pytest.approx(float(bits.per_image.mean()))
    assert bits.stderr == pytest.approx(float(bits.per_image.std()) / math.sqrt(6))
    assert {"dequantization", "start", "trace", "solver", "transform", "prior"} <= set(bits.conventions)


def test_bits_do_not_depend_on_the_batch_size():
    trace = ss.Hutchinson()
    whole, parts = (bits_of(Levels(8), trace=trace, solver=COARSE, batch_size=size) for size in (6, 4))
    torch.testing.assert_close(whole.per_image, parts.per_image, atol=1e-8, rtol=0)


def test_samples_are_averaged_in_probability():
    """The importance-weighted bound (1509.00519, eq. 8) of the same dequantisations, from the density itself."""
    bits = bits_of(Levels(8, -1, 1), samples=5, seeds=range(6))
    stream = RandomStream(seeds=range(6))
    u = torch.stack([stream.uniform(LEVELS.double()) for _ in range(5)], dim=1)
    log_density = torch.distributions.Normal(4.0, 2.0).log_prob(LEVELS[:, None] + u).flatten(2).sum(dim=2)
    expected = -(log_density.logsumexp(dim=1) - math.log(5)) / (4 * math.log(2))
    torch.testing.assert_close(bits.per_image, expected, atol=3e-4, rtol=0)
    assert (bits.per_image < -log_density.mean(dim=1) / (4 * math.log(2))).all()
    assert "5 per image" in bits.conventions["dequantization"]


MAPPED = [
    pytest.param(ss.Uniform(), Levels(8, -1.0, 1.0), id="uniform"),
    pytest.param(ss.Uniform(), Compose([Affine(0.1, 0.1), Logit()]), id="uniform-logit"),
    pytest.param(ss.TruncatedNormal(2.0), Levels(8, -1.0, 1.0), id="normal"),
    pytest.param(ss.Variational((1, 2, 2), 8).requires_grad_(False), Levels(8, -1.0, 1.0), id="flow"),
]


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize(("dequantization", "transform"), MAPPED)
def test_a_map_of_levels_is_its_transform_and_its_dequantisation(dequantization, transform, perturbed):
    start = "perturb" if perturbed and not isinstance(dequantization, ss.TruncatedNormal) else "data"
    model = oracle((1, 2, 2)).score_model(ss.VP())
    arguments = {"trace": ss.Hutchinson(2), "solver": Adams(8), "seeds": range(6), "start": start}
    parts = ss.bits_per_dim(model, LEVELS, transform, dequantization=dequantization, **arguments)
    whole = ss.bits_per_dim(model, LEVELS, DataMap(transform, dequantization), **arguments)
    assert torch.equal(whole.per_image, parts.per_image)
    assert torch.equal(whole.trace_stderr, parts.trace_stderr)
    assert whole.conventions == parts.conventions
    assert str(dequantization) in whole.conventions["dequantization"]
    assert whole.conventions["transform"] == str(transform)


def test_the_default_map_of_levels_is_uniform():
    model = oracle((1, 2, 2)).score_model(ss.VP())
    arguments = {"solver": Adams(8), "seeds": range(6)}
    default, uniform = (
        ss.bits_per_dim(model, LEVELS, states, **arguments) for states in (Levels(8), DataMap(Levels(8), ss.Uniform()))
    )
    assert torch.equal(default.per_image, uniform.per_image)
    assert default.conventions == uniform.conventions


def test_evaluations_and_products_are_those_of_all_dequantisations():
    model = oracle((1, 2, 2)).score_model(ss.VP())
    for start, more in (("data", 0), ("perturb", 1)):
        bits = ss.bits_per_dim(
            model, LEVELS, Levels(8), samples=3, trace=ss.ExactTrace(), solver=Adams(8), start=start, batch_size=4
        )
        assert bits.nfe.tolist() == [3 * (9 + more)] * 6
        assert bits.backward.tolist() == [3 * 9 * 4] * 6


def test_the_perturbed_start_is_a_bound_close_to_the_density():
    mixture = oracle((1, 4, 4))
    levels = (mixture.sample(24, generator=torch.Generator().manual_seed(0)) * 4 + 8).clamp(0, 15).floor()
    model = mixture.score_model(ss.VP())
    data, perturbed = (
        ss.bits_per_dim(
            model, levels, Affine(0.25, -2), trace=ss.ExactTrace(), solver=RungeKutta("rk4", 48), start=start
        )
        for start in ("data", "perturb")
    )
    assert perturbed.mean == pytest.approx(data.mean, abs=0.02)
    assert "bound" in perturbed.conventions["quantity"]


@pytest.mark.parametrize("sde", [ss.Rectified(t_min=0.2), ss.VP(t_min=0.25, beta_max=40.0)], ids=["rectified", "vp"])
@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)], ids=["vector", "image"])
def test_the_perturbed_start_is_its_formula(sde, shape):
    """log p_t(x_t) + log N(x; E[x_0 | x_t], (sigma/alpha)^2) - log N(x_t; alpha x, sigma^2) of each draw.

    Of data N(m, s^2), where each is a normal density and E[x_0 | x_t] = m + alpha s^2/v (x_t - alpha m), with the
    variance v = alpha^2 s^2 + sigma^2 of x_t; alpha(t_min) is 0.8 and 0.53: its logarithm is no detail.
    """
    mean, std, copies, size = 0.3, 0.7, 400, math.prod(shape)
    model = ss.GaussianMixture(torch.full((1, *shape), mean), torch.tensor([std])).score_model(sde)
    levels = torch.randint(0, 8, (3, *shape), generator=torch.Generator().manual_seed(0)).repeat_interleave(copies, 0)
    transform, seeds = Levels(8, -1.5, 2.0), range(len(levels))
    arguments = {"trace": ss.ExactTrace(), "solver": Adams(32), "seeds": seeds}
    bits = ss.bits_per_dim(model, levels, transform, start="perturb", batch_size=len(levels), **arguments)
    stream = RandomStream(seeds=seeds)
    x = transform(levels + stream.uniform(levels.double()))
    t = torch.tensor(sde.t_min, dtype=torch.float64)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    state = alpha * x + sigma * stream.normal(x)
    variance = (alpha * std) ** 2 + sigma**2
    denoised = mean + alpha * std**2 / variance * (state - alpha * mean)
    nats = Normal(alpha * mean, variance.sqrt()).log_prob(state)
    nats = nats + Normal(denoised, sigma / alpha).log_prob(x) - Normal(alpha * x, sigma).log_prob(state)
    expected = -(nats.flatten(1).sum(dim=1) + size * math.log(3.5 / 8)) / (size * math.log(2))
    torch.testing.assert_close(bits.per_image, expected, atol=1e-3, rtol=0)
    assert bits.nfe.tolist() == [34] * len(levels)  # that of the decoder beside those of the solve
    # On average over draws: the entropies of the two kernels differ by log alpha alone. |x - E[x_0 | x_t]|^2 is
    # w^2 (x - m)^2 + ((1 - w) sigma/alpha)^2 on average, with w = sigma^2/v.
    w, square = sigma**2 / variance, (x - mean) ** 2
    left = w**2 * square + ((1 - w) * sigma / alpha) ** 2
    around = (alpha**2 * square + sigma**2) / variance
    average = (
        -0.5 * (2 * math.pi * variance).log() - 0.5 * around - 0.5 * (alpha / sigma) ** 2 * left + 0.5 + alpha.log()
    )
    average = -(average.flatten(1).sum(dim=1) + size * math.log(3.5 / 8)) / (size * math.log(2))
    for part in (bits.per_image - average).split(copies):
        within(part, 0.0)
    whole = bits.per_image.reshape(3, copies).mean(dim=1) - average.reshape(3, copies).mean(dim=1)
    assert float(whole.abs().max()) < 0.1 * abs(float(alpha.log2()))


def test_a_composed_transform_enters_with_its_determinant():
    """log p_data = log p_model(T(x)) + log|det T'|, for a transform that is not affine."""
    transform = Compose([Affine(0.1, 0.5), Logit()])
    mixture, x = (
        ss.GaussianMixture(torch.zeros(1, 3), torch.ones(1)),
        torch.tensor([[0.3, -0.2, 1.0]], dtype=torch.float64),
    )
    value = ss.log_prob(mixture.score_model(ss.VP()), transform(x), trace=ss.ExactTrace()).value + transform.log_det(x)
    jacobian = torch.func.jacrev(lambda y: transform(y[None])[0])(x[0])
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(transform(x)).sum() + jacobian.slogdet()[1]
    assert float(value) == pytest.approx(float(expected), abs=1e-6)


class Breaks(torch.nn.Module):
    """NaN far from the origin."""

    def forward(self, x, label, cond=None):
        return torch.where(x[:, :1] > 5, torch.nan, 0.0) + 0 * x


class Stiff(torch.nn.Module):
    """A thousand times the force of any data, at every noise level."""

    def forward(self, x, label, cond=None):
        return 1e3 * x


@pytest.mark.parametrize("solver", [None, RungeKutta(steps=8), AdaptiveAdams()], ids=str)
def test_a_network_that_turns_nan_returns_a_status(solver):
    x = torch.tensor([[0.0, 0.0], [9.0, 0.0]], dtype=torch.float64)
    result = ss.log_prob(ss.ScoreModel(Breaks(), ss.VP(), "v"), x, seeds=[0, 1], solver=solver)
    assert result.status.tolist() == [Status.OK, Status.NONFINITE]
    assert torch.isfinite(result.value[0])
    assert torch.isnan(result.value[1])
    assert torch.isnan(result.stderr[1])
    assert torch.isfinite(result.latent).all()
    assert float(result.time[1]) < 1
    with pytest.raises(RuntimeError, match=r"1 of 2 images, \[1\] first \(NONFINITE\)"):
        ss.bits_per_dim(ss.ScoreModel(Breaks(), ss.VP(), "v"), x, Affine(), solver=solver)


@pytest.mark.parametrize(
    ("solver", "status"),
    [
        (None, Status.FAILED),
        (AdaptiveAdams(max_evaluations=100), Status.BUDGET),
        (TorchDiffEq(max_steps=20), Status.FAILED),
        (SciPy(max_evaluations=100), Status.BUDGET),
    ],
    ids=str,
)
def test_a_stiff_network_and_a_budget_that_is_too_small_return_a_status(solver, status):
    x = torch.ones(2, 3, dtype=torch.float64)
    result = ss.log_prob(ss.ScoreModel(Stiff(), ss.VP(), "noise"), x, seeds=[0, 1], solver=solver)
    assert result.status.tolist() == [status] * 2
    assert torch.isnan(result.value).all()
    assert torch.isfinite(result.latent).all()
    assert (result.time < 1).all()
    assert (result.nfe > 0).all()


def test_active_dropout_is_refused():
    model = ss.ScoreModel(ss.networks.MLP(3, width=16, dropout=0.5), ss.VP())
    with pytest.raises(ValueError, match=r"eval\(\)"):
        ss.log_prob(model, torch.zeros(1, 3))
    assert ss.log_prob(model.eval(), torch.zeros(1, 3), solver=RungeKutta("euler", 2)).value.shape == (1,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"images": torch.rand(2, 1, 2, 2)}, "use log_prob"),
        ({"samples": 0}, "samples=0"),
        ({"start": "noise"}, "'data' or 'perturb'"),
        ({"samples": 2, "trace": ss.Hutchinson(resample=False)}, "ExactTrace.*unknown of a single kept probe"),
        ({"start": "perturb", "dequantization": ss.TruncatedNormal()}, "says at which time"),
        ({"seeds": [1]}, "one seed per sample"),
        ({"seeds": [1, 2, 3], "batch_size": 1}, "one seed per sample"),
        ({"images": torch.zeros(0, 1, 2, 2)}, "one image or more"),
        ({"transform": DataMap(Affine())}, r"DataMap with a dequantisation.* got DataMap\(dequantization=None\)"),
        (
            {"transform": DataMap(Affine(), ss.Uniform()), "dequantization": ss.TruncatedNormal()},
            "no other beside it, expected for bits; got .*uniform.*truncated normal",
        ),
    ],
)
def test_bad_arguments_of_bits_per_dim(arguments, words):
    model = ss.GaussianMixture(torch.zeros(1, 1, 2, 2), torch.ones(1)).score_model(ss.VP())
    with pytest.raises(ValueError, match=words):
        ss.bits_per_dim(model, **{"images": torch.zeros(2, 1, 2, 2), "transform": Affine(), **arguments})


class Learned(ss.VP):
    """A path with a parameter."""

    def __init__(self):
        super().__init__()
        self.speed = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def integrated_beta(self, t):
        return self.speed * super().integrated_beta(t)


def test_a_path_with_parameters_leaves_no_graph_and_refuses_a_gradient():
    model, x = ss.ScoreModel(ss.networks.MLP(2, width=8), Learned(), "v").eval(), torch.zeros(2, 2)
    result = ss.log_prob(model, x, solver=Adams(8))
    assert not result.value.requires_grad
    assert not result.latent.requires_grad
    assert not ss.encode(model, x, solver=Adams(8)).requires_grad
    with pytest.raises(ValueError, match=r"freeze them with sde.requires_grad_\(False\)"):
        ss.log_prob(model, x, differentiable=True)


def test_the_dtype_of_a_latent_is_that_of_the_state_if_it_has_one():
    mixture = oracle((3,))
    model, x = mixture.score_model(ss.VP()), torch.tensor([[1, 0, -1]])
    exact = ss.encode(model, x.double())
    torch.testing.assert_close(ss.encode(model, x), exact)
    torch.testing.assert_close(ss.log_prob(model, x).latent, exact)
    assert ss.encode(model, x.half()).dtype == torch.float16
    torch.testing.assert_close(ss.encode(model, x.half()).double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "call",
    [lambda m: ss.encode(m, torch.zeros(1, 2), t_start=2.0), lambda m: ss.decode(m, torch.zeros(1, 2), t_end=-5.0)],
)
def test_times_outside_of_the_range_are_refused(call):
    model = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(ss.VP())
    with pytest.raises(ValueError, match="t_from and t_to must differ and lie in"):
        call(model)


@pytest.mark.parametrize(
    ("x", "t_start", "words"), [(torch.nan, None, "finite"), (0.0, 1.0, "t_start"), (0.0, 0.0, "t_start")]
)
def test_bad_arguments_of_log_prob(x, t_start, words):
    model = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(ss.VP())
    with pytest.raises(ValueError, match=words):
        ss.log_prob(model, torch.full((1, 2), x), t_start=t_start)


@pytest.mark.parametrize("solver", [Adams(24), AdaptiveAdams(1e-2)], ids=str)
@pytest.mark.parametrize("trace", [ss.Hutchinson(2), ss.Hutchinson(resample=False), ss.ExactTrace()], ids=str)
def test_a_network_of_float32_gives_a_sample_the_same_value_in_any_batch(solver, trace):
    torch.manual_seed(0)
    network = ss.networks.UNet(8, 1, out_channels=1, width=16, multipliers=(1, 2), blocks=1, attention=(4,))
    for parameter in network.parameters():
        parameter.data.add_(0.03 * torch.randn_like(parameter))
    model = ss.ScoreModel(network, ss.VP(), "karras").eval()
    x = torch.randn(4, 1, 8, 8)
    together = ss.log_prob(model, x, trace=trace, solver=solver, seeds=[7, 8, 9, 10])
    alone = ss.log_prob(model, x[2:3], trace=trace, solver=solver, seeds=[9])
    torch.testing.assert_close(alone.value[0], together.value[2], rtol=1e-4, atol=0)


def test_samples_and_their_log_probability_in_one_pass():
    mixture, sde = oracle((1, 4, 4)), ss.VP(beta_max=40.0)
    model, trace = mixture.score_model(sde), ss.ExactTrace()
    x, drawn = ss.sample_with_log_prob(model, (6, 1, 4, 4), trace=trace, solver=FINE, seeds=range(6))
    again = ss.log_prob(model, x, trace=trace, solver=FINE)
    torch.testing.assert_close(drawn.value, again.value, atol=2e-3, rtol=0)
    torch.testing.assert_close(drawn.latent, again.latent, atol=1e-3, rtol=0)
    torch.testing.assert_close(drawn.value, mixture.log_prob(x, sde, sde.t_min), atol=0.1, rtol=0)
    given, _ = ss.sample_with_log_prob(model, x_T=drawn.latent[:2], trace=trace, solver=FINE)
    torch.testing.assert_close(given, x[:2], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="exactly one"):
        ss.sample_with_log_prob(model)


def test_the_error_of_a_round_trip_is_reported_and_falls_with_the_steps():
    mixture, sde = oracle((1, 4, 4)), ss.SubVP()
    model, x = mixture.score_model(sde), mixture.sample(4, generator=torch.Generator().manual_seed(1))
    coarse, fine = (ss.round_trip(model, x, solver=RungeKutta("rk4", steps)) for steps in (8, 32))
    torch.testing.assert_close(coarse.error, (coarse.x - x).square().flatten(1).mean(1).sqrt())
    assert float(fine.error.mean()) < 0.3 * float(coarse.error.mean())
    torch.testing.assert_close(fine.latent, ss.encode(model, x, solver=RungeKutta("rk4", 32)))


def test_the_value_is_differentiable_in_x():
    """Against the score of the mixture at t_min, for a path whose prior is the marginal."""
    mixture, sde = oracle((3,)), ss.VP(beta_max=40.0)
    x = mixture.sample(5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    result = ss.log_prob(mixture.score_model(sde), x, trace=ss.ExactTrace(), solver=FINE, differentiable=True)
    (gradient,) = torch.autograd.grad(result.value.sum(), x)
    torch.testing.assert_close(gradient, mixture.score(x.detach(), sde, sde.t_min), rtol=0.02, atol=0.02)
    assert not ss.log_prob(mixture.score_model(sde), x, solver=COARSE).value.requires_grad


@pytest.mark.parametrize("trace", [ss.ExactTrace(), ss.Hutchinson(2)], ids=str)
def test_the_value_is_differentiable_in_the_parameters(trace):
    """Against finite differences, at the same probes."""
    torch.manual_seed(0)
    model = ss.ScoreModel(ss.networks.MLP(2, width=8, depth=1), ss.VP(), "v").double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    x, weight = torch.randn(3, 2, dtype=torch.float64), next(p for p in model.parameters() if p.ndim == 2)

    def value(differentiable):
        return ss.log_prob(model, x, trace=trace, solver=Adams(12), seeds=range(3), differentiable=differentiable).value

    (gradient,) = torch.autograd.grad(value(True).sum(), weight)
    direction, h = torch.randn_like(weight), 1e-5
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            weight.add_(sign * h * direction)
        ends.append(float(value(False).sum()))
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-4)


def quantised_oracle():
    """A mixture wide beside the levels, on which the probability of a level is known by quadrature."""
    mixture = ss.GaussianMixture(torch.tensor([[-0.5], [0.6]]), torch.tensor([0.15, 0.2]))
    transform, levels = Affine(0.1, -1.0), torch.arange(2, 19)[:, None]
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    density = mixture.log_prob(transform(levels + u[:, None, None].double()).reshape(-1, 1)).exp()
    probability = 0.1 * density.reshape(4000, -1).mean(dim=0)
    return mixture.score_model(ss.VP(beta_max=40.0)), transform, levels, probability


def test_fifty_samples_are_the_importance_weighted_bound():
    """Close to the exact probability of each level, and to that of the same points under the density itself."""
    model, transform, levels, probability = quantised_oracle()
    exact = -probability.log2()
    arguments = {"trace": ss.ExactTrace(), "solver": Adams(32)}
    one, fifty = (ss.bits_per_dim(model, levels, transform, samples=k, **arguments) for k in (1, 50))
    errors = [(bits.per_image - exact).abs().mean() for bits in (one, fifty)]
    assert errors[1] < 0.35 * errors[0]
    assert float(fifty.per_image.mean()) == pytest.approx(float(exact.mean()), abs=0.03)
    assert fifty.conventions["inflation"] == "at most 0.0e+00 bits/dim, from the trace"
    assert fifty.nfe.tolist() == [50 * 33] * len(levels)


def test_the_trace_error_of_an_importance_weighted_bound_is_calibrated():
    """Over probes, for given dequantisations: the likelihoods have unequal shares in their sum."""
    mixture = oracle((1, 4, 4))
    model, transform = mixture.score_model(ss.VP()), Affine(0.25, -2)
    levels = (mixture.sample(3, generator=torch.Generator().manual_seed(0)) * 4 + 8).clamp(0, 15).floor()

    class Given(ss.Uniform):
        """The same points of an image in each of its copies, whatever their seeds."""

        drawn = 0

        def sample(self, images, noise):
            self.drawn += 1
            seeds = range(100 * self.drawn, 100 * self.drawn + 3)
            return super().sample(images, RandomStream(seeds=[*seeds] * (len(images) // 3)))

    arguments = {"trace": ss.Hutchinson(4), "solver": Adams(16), "samples": 4, "inflation": math.inf}
    copies = levels.repeat(60, 1, 1, 1)
    bits = ss.bits_per_dim(model, copies, transform, None, Given(), seeds=range(180), **arguments)
    spread = bits.per_image.reshape(60, 3).var(dim=0)
    stated = bits.trace_stderr.square().mean()
    assert float((stated / spread.mean()).sqrt()) == pytest.approx(1, abs=0.2)


def test_an_importance_weighted_bound_of_a_noisy_trace_is_refused_or_declared():
    mixture = oracle((1, 4, 4))
    levels = (mixture.sample(4, generator=torch.Generator().manual_seed(0)) * 4 + 8).clamp(0, 15).floor()
    arguments = {"samples": 2, "solver": Adams(16), "trace": ss.Hutchinson(2)}
    with pytest.raises(ValueError, match=r"here by an amount [0-9.e-]+ bits/dim"):
        ss.bits_per_dim(mixture.score_model(ss.VP()), levels, Affine(0.25, -2), **arguments)
    allowed = ss.bits_per_dim(mixture.score_model(ss.VP()), levels, Affine(0.25, -2), inflation=1.0, **arguments)
    assert allowed.conventions["inflation"].startswith("at most ")
    assert (allowed.trace_stderr > 0).all()


def test_a_truncated_normal_starts_where_its_points_are_states():
    """Levels of a mixture seen only at their centres: alpha T(values) at t, with the determinant of alpha."""
    model, transform, levels, _ = quantised_oracle()
    dequantization, seeds = ss.TruncatedNormal(), range(len(levels))
    t = dequantization.start(model.sde, transform)
    alpha = float(model.sde.alpha(torch.tensor(t, dtype=torch.float64)))
    bits = ss.bits_per_dim(
        model, levels, transform, dequantization=dequantization, trace=ss.ExactTrace(), solver=FINE, seeds=seeds
    )
    values, log_q = dequantization.sample(levels, RandomStream(seeds=seeds))
    x = alpha * transform(values)
    solve = ss.log_prob(model, x, trace=ss.ExactTrace(), solver=FINE, t_start=t)
    expected = -(solve.value + math.log(alpha) + math.log(0.1) - log_q) / math.log(2)
    torch.testing.assert_close(bits.per_image, expected)
    assert f"t={t:.4g}" in bits.conventions["start"]


TRAINED = Path(__file__).parents[1] / "notebooks" / "checkpoints"


@pytest.mark.slow
def test_the_converged_values_of_a_trained_network_are_reproduced():
    """Exact trace in float64: 1e-3 bits/dim in the mean, 5e-3 for each image."""
    model = ss.convert.score_sde(TRAINED / "digits_vp.pth").model.double()
    reference = np.load(TRAINED / "digits_vp.reference.npz")
    x, expected = (torch.from_numpy(reference[key])[:3] for key in ("dequantised", "log_prob"))
    result = ss.log_prob(model, x, trace=ss.ExactTrace(), solver=Adams(40))
    error = (result.value - expected) / (64 * math.log(2))
    assert error.abs().max() < 5e-3
    assert float(error.mean().abs()) < 1e-3
