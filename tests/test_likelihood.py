"""Likelihoods against the oracle: the identity without the prior's mismatch, bits per dimension, bounds, seeds."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.data import Affine, Compose, Levels, Logit
from scoresde.solvers import RungeKutta, Status, TorchDiffEq
from tests.conftest import FINITE, oracle

SHAPES = [(3,), (1, 4, 4)]
FINE, COARSE = RungeKutta("rk4", 96), RungeKutta("rk4", 24)


def identity_error(mixture, sde, x, result):
    """Difference, in nats per dimension, of the identity that leaves the prior's mismatch out."""
    prior = sde.prior_log_prob(result.latent)
    exact_prior = mixture.log_prob(result.latent, sde, sde.t_max)
    expected = mixture.log_prob(x, sde, sde.t_min)
    return (result.value - prior + exact_prior - expected).abs() / x[0].numel()


@pytest.mark.parametrize("sde", FINITE)
@pytest.mark.parametrize("shape", SHAPES)
def test_oracle_identity(sde, shape):
    mixture = oracle(shape)
    x = mixture.sample(8, sde, sde.t_min, generator=torch.Generator().manual_seed(0))
    result = ss.log_prob(mixture.score_model(sde), x, trace=ss.ExactTrace(), solver=FINE)
    assert identity_error(mixture, sde, x, result).max() < 1e-4
    assert result.status.tolist() == [Status.OK] * 8
    assert torch.equal(result.stderr, torch.zeros(8, dtype=torch.float64))


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
        def predict(self, x, t, cond=None):
            self.network.t = t
            return super().predict(x, t, cond)

    model = Model(Emit(), sde, prediction)
    x = mixture.sample(4, sde, sde.t_min, generator=torch.Generator().manual_seed(0))
    result = ss.log_prob(model, x, trace=ss.ExactTrace(), solver=FINE)
    assert identity_error(mixture, sde, x, result).max() < 1e-4


def test_the_default_solver_is_within_a_thousandth():
    mixture = oracle((1, 4, 4))
    for sde in (ss.VP(), ss.SubVP(), ss.VE()):
        x = mixture.sample(16, sde, sde.t_min, generator=torch.Generator().manual_seed(0))
        result = ss.log_prob(mixture.score_model(sde), x, trace=ss.ExactTrace())
        assert identity_error(mixture, sde, x, result).max() < 1e-3


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
    result = ss.log_prob(model, torch.zeros(2, 3), solver=RungeKutta("rk4", 5), seeds=[0, 1])
    assert result.nfe.tolist() == [len(calls)] * 2


@pytest.mark.parametrize("resample", [True, False])
def test_hutchinson_is_unbiased_and_its_standard_error_is_calibrated(resample):
    mixture, sde, solver = oracle((1, 4, 4)), ss.VP(), RungeKutta("rk4", 24)
    model = mixture.score_model(sde)
    x = mixture.sample(1, generator=torch.Generator().manual_seed(3)).expand(400, 1, 4, 4)
    exact = ss.log_prob(model, x[:1], trace=ss.ExactTrace(), solver=solver).value
    result = ss.log_prob(model, x, trace=ss.Hutchinson(4, resample=resample), solver=solver, seeds=range(400))
    spread = result.value.std()
    assert abs(float(result.value.mean() - exact)) < 4 * float(spread) / 20
    assert float(result.stderr.square().mean().sqrt()) == pytest.approx(float(spread), rel=0.12)


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
    assert ss.log_prob(model, x, seeds=range(5), solver=RungeKutta("rk4", 4)).stderr is None


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
    u = torch.stack(
        [torch.rand(1, 2, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(6)]
    )
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
    generators = [torch.Generator().manual_seed(i) for i in range(6)]
    u = torch.stack([torch.rand(5, 1, 2, 2, generator=g, dtype=torch.float64) for g in generators])
    log_density = torch.distributions.Normal(4.0, 2.0).log_prob(LEVELS[:, None] + u).flatten(2).sum(dim=2)
    expected = -(log_density.logsumexp(dim=1) - math.log(5)) / (4 * math.log(2))
    torch.testing.assert_close(bits.per_image, expected, atol=3e-4, rtol=0)
    assert (bits.per_image < -log_density.mean(dim=1) / (4 * math.log(2))).all()
    assert "5 per image" in bits.conventions["dequantization"]


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


def test_a_network_that_turns_nan_returns_a_status():
    class Breaks(torch.nn.Module):
        def forward(self, x, label, cond=None):
            return torch.where(x[:, :1] > 5, torch.nan, 0.0) + 0 * x

    x = torch.tensor([[0.0, 0.0], [9.0, 0.0]], dtype=torch.float64)
    result = ss.log_prob(ss.ScoreModel(Breaks(), ss.VP(), "v"), x, seeds=[0, 1])
    assert result.status.tolist() == [Status.OK, Status.NONFINITE]
    assert torch.isfinite(result.value[0])
    assert torch.isnan(result.value[1])
    assert torch.isfinite(result.latent).all()
    with pytest.raises(RuntimeError, match=r"1 of 2 images, \[1\]"):
        ss.bits_per_dim(ss.ScoreModel(Breaks(), ss.VP(), "v"), x, Affine())


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
        ({"samples": 2, "trace": ss.Hutchinson()}, "ExactTrace"),
        ({"seeds": [1]}, "one seed per sample"),
    ],
)
def test_bad_arguments_of_bits_per_dim(arguments, words):
    model = ss.GaussianMixture(torch.zeros(1, 1, 2, 2), torch.ones(1)).score_model(ss.VP())
    with pytest.raises(ValueError, match=words):
        ss.bits_per_dim(model, **{"images": torch.zeros(2, 1, 2, 2), "transform": Affine(), **arguments})


@pytest.mark.parametrize(
    ("x", "t_start", "words"), [(torch.nan, None, "finite"), (0.0, 1.0, "t_start"), (0.0, 0.0, "t_start")]
)
def test_bad_arguments_of_log_prob(x, t_start, words):
    model = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(ss.VP())
    with pytest.raises(ValueError, match=words):
        ss.log_prob(model, torch.full((1, 2), x), t_start=t_start)
