"""Likelihoods against the oracle: the identity without the prior's mismatch, seeds."""

import math
import re
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import scoresde as ss
from scoresde.data import Affine, Arrays, Levels, Standardize, Table
from scoresde.dequantization import AboveUniform, DataMap
from scoresde.random_stream import RandomStream
from scoresde.solvers import Adams, AdaptiveAdams, RungeKutta, SciPy, Status, TorchDiffEq
from scoresde.tensors import mean_and_error
from tests.conftest import INSTANCES, PATHS, close, exact_model, f64, normal, oracle, seeded, within

VP = ss.VP()
LONG = ss.VP(beta_max=40.0)  # at t_max no mean of these mixtures is left in the marginal
FINE = Adams(80)


def check_identity(mixture, sde, x, result, tolerance):
    """log p(x) - prior_log_prob(latent) + log p_{t_max}(latent) = log p_{t_min}(x), in nats per dimension."""
    exact_prior = mixture.log_prob(result.latent, sde, sde.t_max)
    value = result.value - sde.prior_log_prob(result.latent) + exact_prior
    assert ((value - mixture.log_prob(x, sde, sde.t_min)).abs() / x[0].numel()).max() < tolerance


@pytest.mark.parametrize("sde", PATHS)
def test_likelihood_is_exact_on_every_path(sde):
    mixture = oracle((2, 2))
    x = mixture.sample(8, sde, sde.t_min, seeded())
    result = ss.log_prob(mixture.score_model(sde), x, trace=ss.ExactTrace(), solver=FINE)
    check_identity(mixture, sde, x, result, 5e-4)
    assert result.status.tolist() == [Status.OK] * 8
    assert torch.equal(result.stderr, torch.zeros(8, dtype=torch.float64))
    assert result.time.tolist() == [sde.t_max] * 8


SOLVERS = [(None, 1e-3), (RungeKutta("rk4", 64), 1e-4), (TorchDiffEq(rtol=1e-6, atol=1e-6), 1e-4)]


@pytest.mark.parametrize(("solver", "tolerance"), SOLVERS, ids=["default", "fixed", "adaptive"])
def test_likelihood_is_exact_with_every_kind_of_solver(solver, tolerance):
    mixture = oracle((1, 4, 4) if solver is None else (3,))
    x = mixture.sample(8, VP, VP.t_min, seeded())
    result = ss.log_prob(mixture.score_model(VP), x, trace=ss.ExactTrace(), solver=solver)
    check_identity(mixture, VP, x, result, tolerance)


@pytest.mark.filterwarnings("ignore:the noise at t_max")  # does not hide data of a scale of 1e4
@pytest.mark.parametrize(
    ("path", "scale"), [*product(("vp", "ve"), (1e-4, 1e4)), ("sub-vp", 1e4), ("rectified", 1e4), ("zero-snr-vp", 1e-4)]
)
def test_likelihood_is_exact_at_every_scale_of_the_data(path, scale):
    """Nats per dimension do not depend on the unit of the data, in any variable that a solver integrates."""
    sde, mixture = INSTANCES[path], ss.GaussianMixture(scale * normal(3, 3), scale * f64(0.3, 0.5, 0.2))
    model, x = mixture.score_model(sde), mixture.sample(12, sde, sde.t_min, seeded())
    for solver, tolerance in ((None, 2e-3), (AdaptiveAdams(), 1.5e-2)):
        result = ss.log_prob(model, x, trace=ss.ExactTrace(), solver=solver)
        assert result.status.tolist() == [Status.OK] * 12
        check_identity(mixture, sde, x, result, tolerance)


def test_likelihood_is_exact_for_data_of_two_scales():
    """Clusters of standard deviation 1e-3 and 2e-3 at a distance of 3."""
    mixture = ss.GaussianMixture(torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 1.0]]), f64(1e-3, 2e-3))
    for sde in (VP, ss.SubVP(), ss.Karras()):
        x = mixture.sample(12, sde, sde.t_min, seeded())
        check_identity(mixture, sde, x, ss.log_prob(mixture.score_model(sde), x, trace=ss.ExactTrace()), 1.5e-2)


NESTED = {  # position of the means along the diagonal, standard deviations, number of dimensions
    "nested": ([0.0, 0.0], [10.0, 1e-2], 2),
    "nested-64": ([0.0, 0.0], [10.0, 1e-2], 64),
    "finer-8": ([0.0, 0.0], [10.0, 1e-3], 8),
    "large-8": ([0.0, 0.0], [100.0, 1.0], 8),
    "three-scales": ([0.0, 0.0, 0.0], [30.0, 0.3, 1e-3], 8),
    "far-clusters": ([0.0, 50.0], [1e-2, 1e-2], 2),
}


# All data on one path, and one of each kind on the others: in its variable u the flow is the same for all of them.
NESTED_CASES = [*product(["vp"], NESTED), ("sub-vp", "finer-8"), ("ve", "three-scales"), ("rectified", "nested")]
NESTED_CASES += [("ve", "far-clusters"), ("rectified", "finer-8")]


@pytest.mark.filterwarnings("ignore:the noise at t_max")
@pytest.mark.parametrize(("path", "data"), NESTED_CASES)
def test_likelihood_is_exact_for_nested_and_far_components(path, data):
    """For the samples of a component far narrower than another, or than the distance of another, in nats per sample.

    A state that one component takes over from another within a small part of a step, such as a sample of the wide
    component close to the narrow one, has a larger error, which falls with the number of steps; none is in these.
    """
    sde, (means, stds, dims) = INSTANCES[path], NESTED[data]
    mixture = ss.GaussianMixture(f64(*means)[:, None].expand(-1, dims), f64(*stds))
    x = mixture.sample(12, sde, sde.t_min, seeded(1))
    result = ss.log_prob(mixture.score_model(sde), x, trace=ss.ExactTrace())
    assert result.status.tolist() == [Status.OK] * 12
    check_identity(mixture, sde, x, result, 0.02 / dims)


@pytest.mark.filterwarnings("ignore:the noise at t_max")
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_samples_and_latents_are_exact_at_every_scale_of_the_data(scale):
    """The flow of N(m, s^2) keeps (x - alpha m) / (alpha^2 s^2 + sigma^2)^(1/2)."""
    sde = ss.Rectified()
    mixture = ss.GaussianMixture(torch.full((1, 2, 2), 0.3 * scale), f64(0.6 * scale)[None])
    model, z = mixture.score_model(sde), mixture.sample(4, sde, sde.t_max, seeded())

    def standardised(x, t):
        alpha, sigma = sde.alpha(f64(t)), sde.sigma(f64(t))
        return (x - alpha * 0.3 * scale) / torch.hypot(0.6 * scale * alpha, sigma)

    x, result = ss.sample_with_log_prob(model, x_T=z, trace=ss.ExactTrace())
    check_identity(mixture, sde, x, result, 2e-3)
    for data in (x, ss.decode(model, z), ss.samplers.ProbabilityFlow()(model, x_T=z).x):
        close(standardised(data, sde.t_min), standardised(z, sde.t_max), atol=2e-3, rtol=0)
    close(standardised(ss.encode(model, x), sde.t_max), standardised(x, sde.t_min), atol=2e-3, rtol=0)


class OfScale(torch.nn.Module):
    """The exact v prediction for data N(0, cond^2 I), whose scale is the condition."""

    def forward(self, x, label, cond=None):
        alpha, sigma, scale = VP.alpha(label)[:, None], VP.sigma(label)[:, None], cond[:, None]
        return alpha * sigma * (1 - scale**2) / ((alpha * scale) ** 2 + sigma**2) * x


@pytest.mark.filterwarnings("ignore:the noise at t_max")
@pytest.mark.parametrize(
    "solver", [Adams(40), AdaptiveAdams(), TorchDiffEq()], ids=["adams", "adaptive", "torchdiffeq"]
)
def test_samples_of_different_scales_do_not_depend_on_their_batch(solver):
    model, cond = ss.ScoreModel(OfScale(), VP, "v"), f64(1e-3, 1.0, 1e2, 1.0)
    ends = [torch.hypot(VP.alpha(f64(t)) * cond, VP.sigma(f64(t)))[:, None] for t in (VP.t_min, VP.t_max)]
    x = ends[0] * normal(4, 3)
    trace = ss.Hutchinson(2)
    together = ss.log_prob(model, x, cond, trace, solver, seeds=range(4))
    exact = ss.log_prob(model, x, cond, ss.ExactTrace(), solver)
    value = exact.value - VP.prior_log_prob(exact.latent) + Normal(0, ends[1]).log_prob(exact.latent).sum(dim=1)
    close(value, Normal(0, ends[0]).log_prob(x).sum(dim=1), atol=5e-3, rtol=0)
    for i in range(4) if not isinstance(solver, TorchDiffEq) else ():  # its steps are those of a batch
        alone = ss.log_prob(model, x[i : i + 1], cond[i : i + 1], trace, solver, seeds=[i])
        close(alone.value[0], together.value[i], rtol=1e-9)
        assert alone.nfe[0] == together.nfe[i]


@pytest.mark.parametrize("prediction", ["noise", "data", "score", "velocity", "karras"])
def test_likelihood_is_exact_for_every_prediction_type(prediction):
    mixture = oracle((3,))
    x = mixture.sample(4, VP, VP.t_min, seeded())
    result = ss.log_prob(exact_model(mixture, VP, prediction), x, trace=ss.ExactTrace(), solver=FINE)
    check_identity(mixture, VP, x, result, 5e-4)


def test_a_prior_that_matches_gives_the_exact_density():
    """Standard normal data stay standard normal under VP."""
    x, model = normal(6, 3), ss.GaussianMixture(torch.zeros(1, 3), torch.ones(1)).score_model(VP)
    value = ss.log_prob(model, x, trace=ss.ExactTrace()).value
    close(value, Normal(0.0, 1.0).log_prob(x).sum(dim=1), atol=1e-6, rtol=0)


def test_evaluations_are_counted_and_each_is_one_forward_pass():
    model, calls = oracle((3,)).score_model(VP), []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    for trace, products in ((ss.Hutchinson(), 1), (ss.Hutchinson(3, resample=False), 3), (ss.ExactTrace(chunk=2), 3)):
        calls.clear()
        result = ss.log_prob(model, torch.zeros(2, 3), trace=trace, solver=RungeKutta("rk4", 5), seeds=[0, 1])
        assert result.nfe.tolist() == [len(calls)] * 2
        assert len(calls) == 4 + 2 + 20  # four measure the scale of the data, two check the derivative
        assert result.backward.tolist() == [2 + products * 20] * 2


# --- random traces


ESTIMATES = [
    (ss.Hutchinson(2), Adams(24)),
    (ss.Hutchinson(4, "gaussian"), Adams(24)),
    (ss.Hutchinson(4, resample=False), Adams(24)),
    (ss.Hutchinson(2), AdaptiveAdams(1e-2, 1 / 16)),
]


@pytest.mark.parametrize(("trace", "solver"), ESTIMATES, ids=["fresh", "gaussian", "fixed", "adaptive"])
def test_hutchinson_is_unbiased_and_its_standard_error_is_calibrated(trace, solver):
    """Pooled over 100 seeds and 12 states."""
    mixture = oracle((1, 4, 4))
    model, x = mixture.score_model(VP), mixture.sample(12, generator=seeded(3))
    exact = ss.log_prob(model, x, trace=ss.ExactTrace(), solver=solver).value
    result = ss.log_prob(model, x.repeat_interleave(100, 0), trace=trace, solver=solver, seeds=[*range(100)] * 12)
    value, stderr = result.value.reshape(12, 100), result.stderr.reshape(12, 100)
    within(value.T, exact)
    ratio = stderr.square().mean().sqrt() / value.var(dim=1).mean().sqrt()
    assert float(ratio) == pytest.approx(1, abs=0.1)


def test_the_standard_error_of_one_probe_is_an_upper_bound_or_unknown():
    mixture, solver = oracle((1, 4, 4)), Adams(24)
    model, x = mixture.score_model(VP), mixture.sample(1, generator=seeded(3)).expand(300, 1, 4, 4)
    for distribution in ("rademacher", "gaussian"):
        fresh = ss.log_prob(model, x, trace=ss.Hutchinson(1, distribution), solver=solver, seeds=range(300))
        bound, spread = float(fresh.stderr.square().mean().sqrt()), float(fresh.value.std())
        assert 0.95 * spread < bound < 3 * spread
    fixed = ss.log_prob(model, x, trace=ss.Hutchinson(resample=False), solver=solver, seeds=range(300))
    assert fixed.stderr is None
    assert ss.log_prob(model, x[:2], trace=ss.Hutchinson(1), solver=TorchDiffEq(rtol=1e-2)).stderr is None
    fresh = ss.log_prob(model, x, trace=ss.Hutchinson(), solver=solver, seeds=range(300))
    assert fresh.value.std() < 0.7 * fixed.value.std()  # the errors of fresh probes average out along the trajectory


def unet():
    """A float32 network with attention and weights of a trained one's size."""
    torch.manual_seed(0)
    network = ss.networks.UNet(4, 1, out_channels=1, width=8, multipliers=(1, 2), blocks=1, attention=(2,))
    for parameter in network.parameters():
        parameter.data.add_(0.03 * torch.randn_like(parameter))
    return ss.ScoreModel(network, VP, "karras").eval()


ADAPTIVE = AdaptiveAdams(1e-2, max_step=0.5)  # samples take different steps
BATCHED = [
    (Adams(24), ss.Hutchinson(2)),
    (ADAPTIVE, ss.Hutchinson(2)),
    (ADAPTIVE, ss.Hutchinson(resample=False)),
    (ADAPTIVE, ss.ExactTrace()),
    (RungeKutta("rk4", 8), ss.Hutchinson()),
]


@pytest.mark.parametrize(
    ("solver", "trace", "dtype"),
    [(*case, torch.float64) for case in BATCHED[1:]] + [(*BATCHED[0], torch.float32)],
    ids=lambda value: type(value).__name__ if isinstance(value, (Adams, AdaptiveAdams, RungeKutta)) else str(value),
)
def test_a_sample_has_the_same_value_in_any_batch(solver, trace, dtype):
    model, x, rtol = unet().to(dtype), normal(4, 1, 4, 4).to(dtype), 1e-4 if dtype == torch.float32 else 1e-8
    together = ss.log_prob(model, x, trace=trace, solver=solver, seeds=[7, 8, 9, 8])
    alone = ss.log_prob(model, x[2:3], trace=trace, solver=solver, seeds=[9])
    close(alone.value[0], together.value[2], rtol=rtol)
    assert (len(together.nfe.unique()) > 1) == (solver is ADAPTIVE)


# --- bits per dimension


LEVELS = torch.randint(0, 8, (6, 1, 2, 2), generator=seeded())
X_T = normal(3, 1, 2, 2, seed=4)


@pytest.mark.parametrize(("offset", "std", "entropy"), [(5.4e6, 0.2, 0.6142), (1.7e9, 50.0, 3.3750)])
def test_nats_of_values_far_from_zero_are_their_entropy(offset, std, entropy, tmp_path):
    """Data of N(offset, std^2) x N(0, 1) under the exact model of its standardisation, N(0, I) at all times of VP."""
    z = normal(400, 2)
    values = torch.stack([offset + std * z[:, 0], z[:, 1]], dim=1)
    np.save(tmp_path / "x.npy", values.numpy())
    np.savetxt(tmp_path / "x.csv", values.numpy(), delimiter=",", fmt="%.17g")
    model = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(VP)
    for dataset in (Arrays(tmp_path / "x.npy"), Table(tmp_path / "x.csv")):
        transform = Standardize(**Standardize().fit(dataset))
        data = torch.stack([dataset[i] for i in range(400)])
        state, nats = DataMap(transform).draw(data, RandomStream(), VP)
        result = ss.log_prob(model, state, trace=ss.ExactTrace(), solver=Adams(24))
        mean, error = mean_and_error(-(result.value + nats) / 2)
        assert abs(mean - entropy) < 4 * error
        fitted = Normal(z.mean(dim=0), z.std(dim=0, correction=0))  # the very numbers, not only on average
        close(result.value + nats, fitted.log_prob(z).sum(dim=1) - math.log(std), rtol=0, atol=1e-4)


# --- failures


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
    result = ss.log_prob(ss.ScoreModel(Breaks(), VP, "v"), x, seeds=[0, 1], solver=solver)
    assert result.status.tolist() == [Status.OK, Status.NONFINITE]
    assert result.value.isfinite().tolist() == [True, False]
    assert torch.isnan(result.stderr[1])
    assert torch.isfinite(result.latent).all()
    assert float(result.time[1]) < 1
    with pytest.raises(RuntimeError, match=r"1 of 2 samples, at \[1\] \(NONFINITE\)"):
        ss.bits_per_dim(ss.ScoreModel(Breaks(), VP, "v"), x, Affine(), solver=solver)


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
    result = ss.log_prob(ss.ScoreModel(Stiff(), VP, "noise"), x, seeds=[0, 1], solver=solver)
    assert result.status.tolist() == [status] * 2
    assert torch.isnan(result.value).all()
    assert torch.isfinite(result.latent).all()
    assert (result.time < 1).all()
    assert (result.nfe > 0).all()


# --- modes, batches, priors


QUICK = {
    "adams": Adams(4),
    "adaptive": AdaptiveAdams(1e-2, 1 / 8),
    "runge-kutta": RungeKutta("heun2", 4),
    "torchdiffeq": TorchDiffEq(rtol=1e-2, atol=1e-2),
    "scipy": SciPy(rtol=1e-2, atol=1e-2),
}
EVERY_SOLVER = pytest.mark.parametrize("solver", QUICK.values(), ids=QUICK)
IN_INFERENCE_MODE = [(solver, ss.Hutchinson()) for solver in QUICK.values()]
IN_INFERENCE_MODE += [(QUICK["adams"], ss.ExactTrace()), (QUICK["adams"], ss.ExactTrace(mode="forward"))]


@pytest.mark.parametrize(("solver", "trace"), IN_INFERENCE_MODE, ids=str)
def test_inference_mode_changes_nothing(solver, trace):
    model = ss.ScoreModel(ss.networks.MLP(2, width=8, depth=1, cond_features=1), VP, "v").eval()
    x, cond = normal(3, 2), normal(3, 1)
    outside = ss.log_prob(model, x, cond, trace, solver, seeds=range(3))
    with torch.inference_mode():
        inside = ss.log_prob(model, x.clone(), cond.clone(), trace, solver, seeds=range(3))
    assert torch.equal(inside.value, outside.value)
    assert bool(torch.isfinite(inside.value).all())


def test_bits_and_samples_in_inference_mode():
    model = oracle((1, 2, 2)).score_model(VP)
    outside = ss.bits_per_dim(model, LEVELS, Levels(8), start="perturb"), ss.sample_with_log_prob(model, x_T=X_T)[0]
    with torch.inference_mode():
        levels, z = LEVELS.clone(), X_T.clone()
        inside = ss.bits_per_dim(model, levels, Levels(8), start="perturb"), ss.sample_with_log_prob(model, x_T=z)[0]
    assert torch.equal(inside[0].per_image, outside[0].per_image)
    assert torch.equal(inside[1], outside[1])


@EVERY_SOLVER
def test_an_empty_batch_has_empty_results(solver):
    model, empty = oracle((3,)).score_model(VP), torch.zeros(0, 3)
    for trace in (ss.Hutchinson(2), ss.Hutchinson(resample=False), ss.ExactTrace()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = ss.log_prob(model, empty, trace=trace, solver=solver, seeds=[])
        assert [len(part) for part in vars(result).values() if part is not None] in ([0] * 8, [0] * 7, [0] * 6)
    assert ss.round_trip(model, empty, solver=solver).x.shape == (0, 3)
    assert ss.sample_with_log_prob(model, shape=(0, 3), solver=solver)[0].shape == (0, 3)


def test_scipy_keeps_the_probes_of_a_random_trace():
    """Fresh ones would cost steps without end: its error control includes the divergence."""
    model, x = oracle((3,)).score_model(VP), normal(3, 3)
    default = ss.log_prob(model, x, solver=SciPy(), seeds=range(3))
    kept = ss.log_prob(model, x, trace=ss.Hutchinson(resample=False), solver=SciPy(), seeds=range(3))
    assert torch.equal(default.value, kept.value)
    assert default.status.tolist() == [Status.OK] * 3
    assert int(default.nfe.max()) < 2000
    assert default.stderr is None
    bits = ss.bits_per_dim(oracle((1, 2, 2)).score_model(VP), LEVELS, Levels(8), solver=SciPy())
    assert "resample=False" in bits.conventions["trace"]


NARROW = [ss.VE(sigma_max=1.0), ss.VP(beta_max=2.0), ss.Rectified(t_max=0.5), ss.Karras(t_max=2.0)]


@pytest.mark.parametrize("sde", NARROW, ids=["ve", "vp", "rectified", "karras"])
def test_noise_that_does_not_hide_the_data_is_reported(sde):
    """Two clusters at +-3 sqrt(2): the bound is |alpha x|^2 / (2 d) plus the mismatch of the variance."""
    mixture = ss.GaussianMixture(torch.tensor([[3.0, 3.0], [-3.0, -3.0]]), torch.tensor([0.3, 0.3]))
    x = mixture.sample(40, generator=seeded())
    terms = sde.prior_divergence(x / sde.alpha(f64(sde.t_min))) / 2
    bound, largest = float(terms.mean()), float(terms.max())
    with pytest.warns(UserWarning, match=rf"does not hide the data: .* up to {largest:.2g} nats/dim") as caught:
        result = ss.log_prob(mixture.score_model(sde), x, trace=ss.ExactTrace())
    assert caught[0].filename == __file__
    # It bounds the loss against the density of the data, which has no prior.
    assert 0.1 < float((mixture.log_prob(x, sde, sde.t_min) - result.value).mean()) / 2 < bound
    levels = torch.where(x > 0, 6, 1)
    with pytest.warns(UserWarning, match="does not hide the data"):
        bits = ss.bits_per_dim(mixture.score_model(sde), levels, Levels(8, -4.0, 4.0), trace=ss.ExactTrace())
    assert re.search(r"up to [\d.]+ nats/dim from the distribution of the noisy data", bits.conventions["prior"])


def test_noise_that_hides_the_data_is_not_reported():
    mixture = oracle((1, 2, 2))
    for sde in (VP, ss.SubVP(), ss.VE(), ss.Karras(), ss.Rectified(), ss.Cosine()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", AboveUniform)  # the images are not of the mixture
            ss.log_prob(mixture.score_model(sde), mixture.sample(8, generator=seeded()), solver=Adams(4))
            bits = ss.bits_per_dim(mixture.score_model(sde), LEVELS, Levels(8, -1, 1), solver=Adams(24))
        assert bits.conventions["prior"] == f"N(0, {sde.prior_std:g}^2) at t_max={sde.t_max:g}"


def test_active_dropout_is_refused():
    model = ss.ScoreModel(ss.networks.MLP(3, width=16, dropout=0.5), VP)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        ss.log_prob(model, torch.zeros(1, 3))
    ss.log_prob(model.eval(), torch.zeros(1, 3), solver=RungeKutta("euler", 2))


ORIGIN = torch.zeros(1, 2)
CALLS = {
    "x must be finite; got NaN": lambda m: ss.log_prob(m, ORIGIN * torch.nan),
    "got t_from=1 and t_to=1": lambda m: ss.log_prob(m, ORIGIN, t_start=1.0),
    "got t_from=0 and": lambda m: ss.log_prob(m, ORIGIN, t_start=0.0),
    "differ and lie in .* t_from=2": lambda m: ss.encode(m, ORIGIN, t_start=2.0),
    "differ and lie in .* t_to=-5": lambda m: ss.decode(m, ORIGIN, t_end=-5.0),
    "exactly one": ss.sample_with_log_prob,
}


@pytest.mark.parametrize("message", CALLS)
def test_bad_states_and_times_are_refused(message):
    with pytest.raises(ValueError, match=message):
        CALLS[message](ss.GaussianMixture(ORIGIN, torch.ones(1)).score_model(VP))


def test_with_a_transform_the_density_is_that_of_the_data():
    """Data N(30, 4^2) are N(0, 1) in model space."""
    transform, exact = Affine(scale=0.25, shift=-7.5), Normal(f64(30.0), f64(4.0))
    model = ss.GaussianMixture(torch.zeros(1, 1), torch.ones(1)).score_model(VP)
    x = f64([[22.0], [31.0], [38.0]]).requires_grad_()
    options = {"trace": ss.ExactTrace(), "differentiable": True}
    result = ss.log_prob(model, x, transform=transform, **options)
    close(result.value.detach(), exact.log_prob(x.detach())[:, 0], atol=1e-3)
    close(result.per_probe[:, 0], result.value.detach())
    (gradient,) = torch.autograd.grad(result.value.sum(), x)
    close(gradient, (30 - x.detach()) / 16, rtol=0.01, atol=1e-3)
    assert torch.equal(ss.log_prob(model, x, transform=DataMap(transform), **options).value, result.value)
    with pytest.raises(ValueError, match="t_start must be None with transform"):
        ss.log_prob(model, x, transform=transform, t_start=0.5)


def test_with_dequantisation_the_value_is_the_bound_of_bits_per_dim():
    model, data_map = oracle((2,)).score_model(VP), DataMap(Levels(4), ss.Uniform())
    x, options = torch.tensor([[0, 3], [2, 1]]), {"trace": ss.ExactTrace(), "seeds": [4, 5]}
    bits = ss.bits_per_dim(model, x, data_map, **options).per_image
    close(ss.log_prob(model, x, transform=data_map, **options).value, -2 * math.log(2) * bits, rtol=1e-6)


# --- encoding, sampling, gradients


@pytest.mark.parametrize("sde", [VP, ss.VE(), ss.Rectified()], ids=str)
def test_encode_and_decode_are_inverse(sde):
    mixture = oracle((1, 4, 4))
    model, x = mixture.score_model(sde), mixture.sample(4, sde, sde.t_min, seeded())
    latent = ss.encode(model, x)
    close(latent, ss.log_prob(model, x, seeds=range(4)).latent)
    close(ss.decode(model, latent), x, atol=2e-3, rtol=0)


def test_the_error_of_a_round_trip_is_reported_and_falls_with_the_steps():
    mixture, sde = oracle((1, 4, 4)), ss.SubVP()
    model, x = mixture.score_model(sde), mixture.sample(4, generator=seeded(1))
    coarse, fine = (ss.round_trip(model, x, solver=RungeKutta("rk4", steps)) for steps in (8, 32))
    close(coarse.error, (coarse.x - x).square().flatten(1).mean(1).sqrt())
    assert float(fine.error.mean()) < 0.3 * float(coarse.error.mean())
    close(fine.latent, ss.encode(model, x, solver=RungeKutta("rk4", 32)))


def test_the_dtype_of_a_latent_is_that_of_the_state_if_it_has_one():
    model, x = oracle((3,)).score_model(VP), torch.tensor([[1, 0, -1]])
    exact = ss.encode(model, x.double())
    close(ss.encode(model, x), exact)
    close(ss.log_prob(model, x).latent, exact)
    assert ss.encode(model, x.half()).dtype == torch.float16
    close(ss.encode(model, x.half()).double(), exact, rtol=1e-3, atol=1e-3)


def test_samples_and_their_log_probability_in_one_solve():
    mixture = oracle((1, 2, 2))
    model, arguments = mixture.score_model(LONG), {"trace": ss.ExactTrace(), "solver": FINE}
    x, drawn = ss.sample_with_log_prob(model, (6, 1, 2, 2), seeds=range(6), **arguments)
    again = ss.log_prob(model, x, **arguments)
    close(drawn.value, again.value, atol=2e-3, rtol=0)
    close(drawn.latent, again.latent, atol=1e-3, rtol=0)
    close(drawn.value, mixture.log_prob(x, LONG, LONG.t_min), atol=0.1, rtol=0)
    from_latent, _ = ss.sample_with_log_prob(model, x_T=drawn.latent[:2], **arguments)
    close(from_latent, x[:2], atol=1e-5, rtol=0)
    wide = ss.sample_with_log_prob(mixture.score_model(ss.VE()), x.shape, seeds=range(6), solver=Adams(8))[1].latent
    close(wide, (50 * RandomStream(seeds=range(6)).normal(x.double())).float(), rtol=1e-6)


def test_the_value_is_differentiable_in_x():
    """Against the score of the mixture at t_min, for a path whose prior is the marginal."""
    mixture = oracle((3,))
    model, x = mixture.score_model(LONG), mixture.sample(5, generator=seeded(2)).requires_grad_()
    result = ss.log_prob(model, x, trace=ss.ExactTrace(), differentiable=True)
    (gradient,) = torch.autograd.grad(result.value.sum(), x)
    close(gradient, mixture.score(x.detach(), LONG, LONG.t_min), rtol=0.02, atol=0.02)
    assert not ss.log_prob(model, x, solver=Adams(8)).value.requires_grad


@pytest.mark.parametrize("trace", [ss.ExactTrace(), ss.Hutchinson(2)], ids=str)
def test_the_value_is_differentiable_in_the_parameters(trace):
    """Against finite differences, with the same probes."""
    torch.manual_seed(0)
    model = ss.ScoreModel(ss.networks.MLP(2, width=8, depth=1), VP, "v").double().eval()
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


class SpeedVP(ss.VP):
    """A path with a parameter."""

    def __init__(self):
        super().__init__()
        self.speed = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def integrated_beta(self, t):
        return self.speed * super().integrated_beta(t)


def test_a_path_with_parameters_leaves_no_graph_and_refuses_a_gradient():
    model, x = ss.ScoreModel(ss.networks.MLP(2, width=8), SpeedVP(), "v").eval(), torch.zeros(2, 2)
    result = ss.log_prob(model, x, solver=Adams(8))
    sampled = ss.sample_with_log_prob(model, x_T=x, solver=Adams(8))[1]
    for value in (result.value, result.latent, ss.encode(model, x, solver=Adams(8)), sampled.value):
        assert not value.requires_grad
    with pytest.raises(ValueError, match=r"freeze them with sde.requires_grad_\(False\)"):
        ss.log_prob(model, x, differentiable=True)


TRAINED = Path(__file__).parents[1] / "notebooks" / "checkpoints"


@pytest.mark.slow
def test_the_converged_values_of_a_trained_network_are_reproduced():
    """The reference has the exact trace in float64; 40 steps have an error of about 1e-3 bits/dim."""
    model = ss.convert.score_sde(TRAINED / "digits_vp.pth").model
    reference = np.load(TRAINED / "digits_vp.reference.npz")
    x, expected = (torch.from_numpy(reference[key])[:1] for key in ("dequantised", "log_prob"))
    result = ss.log_prob(model, x.float(), trace=ss.ExactTrace(), solver=Adams(40))
    assert ((result.value - expected) / (64 * math.log(2))).abs().max() < 3e-3


@pytest.mark.parametrize(
    "trace", [ss.ExactTrace(), ss.Hutchinson(3), ss.Hutchinson(3).kept()], ids=["exact", "new", "kept"]
)
def test_the_likelihood_is_the_mean_over_its_probes(trace):
    mixture = oracle((2, 2))
    x, model, solver = mixture.sample(3, generator=seeded()), mixture.score_model(VP), Adams(8)
    result = ss.log_prob(model, x, trace=trace, solver=solver, seeds=range(3))
    assert result.per_probe.shape == (3, 1 if isinstance(trace, ss.ExactTrace) else 3)
    close(result.per_probe.mean(dim=1), result.value)
    if trace == ss.Hutchinson(3).kept():
        close(result.per_probe.std(dim=1) / 3**0.5, result.stderr)
