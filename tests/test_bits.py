"""Bits per dimension against exact densities and probabilities, in one solve and by multilevel estimates."""

import math
import re
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch.distributions import Normal

import scoresde as ss
from scoresde.data import Affine, Compose, Levels, Logit
from scoresde.dequantization import AboveUniform, DataMap
from scoresde.random_stream import RandomStream
from scoresde.solvers import Adams, AdaptiveAdams
from tests.conftest import close, f64, normal, oracle, seeded, within

VP = ss.VP()
LONG = ss.VP(beta_max=40.0)  # at t_max no mean of these mixtures is left in the marginal

LEVELS = torch.randint(0, 8, (6, 1, 2, 2), generator=seeded())
DENSITY = Normal(4.0, 2.0)  # of the values of LEVELS


def bits_of(transform, **arguments):
    """Bits per dimension of LEVELS under DENSITY, under an affine transform."""
    zero = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    scale = math.exp(float(transform.log_det(zero)) / 4)
    mixture = ss.GaussianMixture(transform(zero) + 4 * scale, torch.tensor([2 * scale]))
    arguments = {"trace": ss.ExactTrace(), "seeds": range(6), **arguments}
    return ss.bits_per_dim(mixture.score_model(LONG), LEVELS, transform, **arguments)


def test_bits_are_the_density_at_the_dequantised_point_on_any_scale():
    u = RandomStream(seeds=range(6)).uniform(LEVELS.double())
    expected = -DENSITY.log_prob(LEVELS + u).flatten(1).sum(dim=1) / (4 * math.log(2))
    for transform in (Levels(8, -1, 1), Levels(8, 0, 1)):
        bits = bits_of(transform)
        close(bits.per_image, expected, atol=2e-4, rtol=0)
        assert bits.mean == pytest.approx(float(bits.per_image.mean()))
        assert bits.stderr == pytest.approx(float(bits.per_image.std()) / math.sqrt(6))
    assert {"dequantization", "start", "trace", "solver", "transform", "prior"} <= set(bits.conventions)


def test_bits_do_not_depend_on_the_batch_size():
    whole, parts = (bits_of(Levels(8), trace=ss.Hutchinson(), batch_size=size).per_image for size in (6, 4))
    close(whole, parts, atol=1e-8, rtol=0)


def test_samples_are_averaged_in_probability():
    """The importance-weighted bound (1509.00519, eq. 8) for the same dequantisations, from the density itself."""
    bits, stream = bits_of(Levels(8, -1, 1), samples=5), RandomStream(seeds=range(6))
    u = torch.stack([stream.uniform(LEVELS.double()) for _ in range(5)], dim=1)
    log_density = DENSITY.log_prob(LEVELS[:, None] + u).flatten(2).sum(dim=2)
    expected = -(log_density.logsumexp(dim=1) - math.log(5)) / (4 * math.log(2))
    close(bits.per_image, expected, atol=3e-4, rtol=0)
    assert (bits.per_image < -log_density.mean(dim=1) / (4 * math.log(2))).all()
    assert "5 per image" in bits.conventions["dequantization"]
    assert bits.conventions["inflation"] == "at most 0.0e+00 bits/dim, from the trace"


MAPPED = [
    pytest.param(ss.Uniform(), Levels(8, -1.0, 1.0), "perturb", id="uniform"),
    pytest.param(ss.Uniform(), Compose([Affine(0.1, 0.1), Logit()]), "data", id="uniform-logit"),
    pytest.param(ss.TruncatedNormal(2.0), Levels(8, -1.0, 1.0), "data", id="normal"),
    pytest.param(ss.Variational((1, 2, 2), 8).requires_grad_(False), Levels(8, -1.0, 1.0), "perturb", id="flow"),
    pytest.param(None, Levels(8, -1.0, 1.0), "data", id="default"),
]


@pytest.mark.parametrize(("dequantization", "transform", "start"), MAPPED)
def test_a_map_of_levels_is_its_transform_and_its_dequantisation(dequantization, transform, start):
    model = oracle((1, 2, 2)).score_model(VP)
    arguments = {"trace": ss.Hutchinson(2), "solver": Adams(8), "seeds": range(6), "start": start}
    parts = ss.bits_per_dim(model, LEVELS, transform, dequantization=dequantization, **arguments)
    dequantization = dequantization or ss.Uniform()
    whole = ss.bits_per_dim(model, LEVELS, DataMap(transform, dequantization), **arguments)
    assert torch.equal(whole.per_image, parts.per_image)
    assert torch.equal(whole.trace_stderr, parts.trace_stderr)
    assert whole.conventions == parts.conventions
    assert str(dequantization) in whole.conventions["dequantization"]
    assert whole.conventions["transform"] == str(transform)


def test_evaluations_and_products_are_those_of_all_dequantisations():
    model = oracle((1, 2, 2)).score_model(VP)
    for start, more in (("data", 0), ("perturb", 1)):
        bits = ss.bits_per_dim(
            model, LEVELS, Levels(8), samples=3, trace=ss.ExactTrace(), solver=Adams(8), start=start, batch_size=4
        )
        assert bits.nfe.tolist() == [3 * (6 + 9 + more)] * 6  # four for the scale of the data, two for the check
        assert bits.backward.tolist() == [3 * (2 + 9 * 4)] * 6


@pytest.mark.parametrize("sde", [ss.Rectified(t_min=0.2), ss.VP(t_min=0.25, beta_max=40.0)], ids=["rectified", "vp"])
@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)], ids=["vector", "image"])
def test_the_perturbed_start_is_its_formula(sde, shape):
    """log p_t(x_t) + log N(x; E[x_0 | x_t], (sigma/alpha)^2) - log N(x_t; alpha x, sigma^2) for each draw.

    Data are N(m, s^2), so each term is a normal density and E[x_0 | x_t] = m + alpha s^2/v (x_t - alpha m), with the
    variance v = alpha^2 s^2 + sigma^2 of x_t; alpha(t_min) is 0.8 and 0.53, so its logarithm counts.
    """
    mean, std, size = 0.3, 0.7, math.prod(shape)
    model = ss.GaussianMixture(torch.full((1, *shape), mean), torch.tensor([std])).score_model(sde)
    levels, transform, seeds = torch.randint(0, 8, (20, *shape), generator=seeded()), Levels(8, -1.5, 2.0), range(20)
    bits = ss.bits_per_dim(model, levels, transform, start="perturb", trace=ss.ExactTrace(), solver=Adams(32))
    assert "bound" in bits.conventions["quantity"]
    scale = 6 if isinstance(sde, ss.VP) else 4  # evaluations at noise inside the path, that measure the scale
    assert bits.nfe.tolist() == [scale + 36] * 20  # one for the decoder, two for the check, 33 for the solve
    stream = RandomStream(seeds=seeds)
    x = transform(levels + stream.uniform(levels.double()))
    alpha, sigma = sde.alpha(f64(sde.t_min)), sde.sigma(f64(sde.t_min))
    state = alpha * x + sigma * stream.normal(x)
    variance = (alpha * std) ** 2 + sigma**2
    denoised = mean + alpha * std**2 / variance * (state - alpha * mean)
    nats = Normal(alpha * mean, variance.sqrt()).log_prob(state)
    nats = nats + Normal(denoised, sigma / alpha).log_prob(x) - Normal(alpha * x, sigma).log_prob(state)
    expected = -(nats.flatten(1).sum(dim=1) + size * math.log(3.5 / 8)) / (size * math.log(2))
    close(bits.per_image, expected, atol=1e-3, rtol=0)


def quantised_oracle():
    """A mixture wider than the levels, with the probability of each level by quadrature."""
    mixture = ss.GaussianMixture(torch.tensor([[-0.5], [0.6]]), torch.tensor([0.15, 0.2]))
    transform, levels = Affine(0.1, -1.0), torch.arange(2, 19)[:, None]
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    density = mixture.log_prob(transform(levels + u[:, None, None].double()).reshape(-1, 1)).exp()
    probability = 0.1 * density.reshape(4000, -1).mean(dim=0)
    return mixture.score_model(LONG), transform, levels, probability


def test_many_samples_approach_the_probability_of_the_levels():
    model, transform, levels, probability = quantised_oracle()
    exact = -probability.log2()
    arguments = {"trace": ss.ExactTrace(), "solver": Adams(16)}
    one, many = (ss.bits_per_dim(model, levels, transform, samples=k, **arguments).per_image for k in (1, 25))
    assert (many - exact).abs().mean() < 0.35 * (one - exact).abs().mean()
    within(many - exact, 0.0)


def oracle_levels(count):
    """Levels of a mixture of images, and the transform to its space."""
    mixture = oracle((1, 4, 4))
    levels = (mixture.sample(count, generator=seeded()) * 4 + 8).clamp(0, 15).floor()
    return mixture.score_model(VP), levels, Affine(0.25, -2)


def test_the_trace_error_of_an_importance_weighted_bound_is_calibrated():
    """Over probes, at fixed dequantisations; the likelihoods have unequal shares in their sum."""
    model, levels, transform = oracle_levels(3)

    class FixedPoints(ss.Uniform):
        """The same points for each copy of an image, for any seed."""

        drawn = 0

        def sample(self, images, stream):
            self.drawn += 1
            seeds = range(100 * self.drawn, 100 * self.drawn + 3)
            return super().sample(images, RandomStream(seeds=[*seeds] * (len(images) // 3)))

    arguments = {"trace": ss.Hutchinson(4), "solver": Adams(16), "samples": 4, "inflation": math.inf}
    copies = levels.repeat(60, 1, 1, 1)
    bits = ss.bits_per_dim(model, copies, transform, None, FixedPoints(), seeds=range(180), **arguments)
    spread, stated = bits.per_image.reshape(60, 3).var(dim=0), bits.trace_stderr.square().mean()
    assert float((stated / spread.mean()).sqrt()) == pytest.approx(1, abs=0.2)


def test_an_importance_weighted_bound_of_a_noisy_trace_is_refused_or_declared():
    arguments = {"samples": 2, "solver": Adams(16), "trace": ss.Hutchinson(2)}
    with pytest.raises(ValueError, match=r"inflates .* by [0-9.e-]+ bits/dim, and inflation=0.001 is allowed"):
        ss.bits_per_dim(*oracle_levels(4), **arguments)
    allowed = ss.bits_per_dim(*oracle_levels(4), inflation=1.0, **arguments)
    # Half the variance in nats^2, in bits per dimension; about that of a single dequantisation.
    single = ss.bits_per_dim(*oracle_levels(4), **{**arguments, "samples": 1}).trace_stderr
    declared = float(re.fullmatch(r"at most (\S+) bits/dim, from the trace", allowed.conventions["inflation"])[1])
    assert declared == pytest.approx(float(single.square().mean()) * 16 * math.log(2) / 2, rel=0.3)


def test_a_truncated_normal_starts_where_its_points_are_states():
    """alpha T(values) at t, with the determinant of alpha."""
    model, transform, levels, _ = quantised_oracle()
    dequantization, seeds = ss.TruncatedNormal(), range(len(levels))
    t = dequantization.start(model.sde, transform)
    alpha, arguments = float(model.sde.alpha(f64(t))), {"trace": ss.ExactTrace(), "solver": Adams(24)}
    bits = ss.bits_per_dim(model, levels, transform, dequantization=dequantization, seeds=seeds, **arguments)
    values, log_q = dequantization.sample(levels, RandomStream(seeds=seeds))
    solved = ss.log_prob(model, alpha * transform(values), t_start=t, **arguments)
    close(bits.per_image, -(solved.value + math.log(alpha) + math.log(0.1) - log_q) / math.log(2))
    assert f"t={t:.4g}" in bits.conventions["start"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.rand(2, 1, 2, 2)}, "use log_prob"),
        ({"samples": 0}, "samples=0"),
        ({"start": "noise"}, "'data' or 'perturb'"),
        ({"samples": 2, "solver": Adams(8), "trace": ss.Hutchinson(resample=False)}, "unknown amount .* ExactTrace"),
        ({"start": "perturb", "dequantization": ss.TruncatedNormal()}, "must be 'data' for .* got 'perturb'"),
        ({"seeds": [1]}, "one seed per sample"),
        ({"seeds": [1, 2, 3], "batch_size": 1}, "one seed per sample"),
        ({"images": torch.zeros(0, 1, 2, 2)}, "at least one"),
        ({"transform": DataMap(Affine())}, r"exactly one dequantisation.* got DataMap\(dequantization=None\)"),
        (
            {"transform": DataMap(Affine(), ss.Uniform()), "dequantization": ss.TruncatedNormal()},
            "exactly one dequantisation, in the DataMap; got .*uniform.*truncated normal",
        ),
    ],
)
def test_bad_arguments_of_bits_per_dim(arguments, message):
    model = ss.GaussianMixture(torch.zeros(1, 1, 2, 2), torch.ones(1)).score_model(VP)
    with pytest.raises(ValueError, match=message):
        ss.bits_per_dim(model, **{"images": torch.zeros(2, 1, 2, 2), "transform": Affine(), **arguments})


# --- levels out of range, values far from zero


@pytest.mark.parametrize("transform", [Levels(17), Compose([Levels(17, 0.0, 1.0), Logit()])], ids=["levels", "logit"])
@pytest.mark.parametrize("images", [f64(0, 17)[None], f64(-1, 3)[None], torch.tensor([[0, 255]], dtype=torch.uint8)])
def test_levels_out_of_range_are_refused(images, transform):
    model = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(VP)
    with pytest.raises(
        ValueError, match=r"images must be integers from 0 to 16; got -?\d+ to \d+, where 1 of 2 values"
    ):
        ss.bits_per_dim(model, images, transform)
    with pytest.raises(ValueError, match=r"images must be integers from 0 to 16"):
        DataMap(transform, ss.Uniform()).draw(images, RandomStream(seeds=[0]), VP)


def test_bits_above_those_of_uniform_levels_are_warned_about():
    """The levels 0 and 16 under N(0, 1/2^2) in model space, where they are near -1 and 1."""
    model, images = ss.GaussianMixture(torch.zeros(1, 2), torch.tensor([0.25])).score_model(VP), f64(0, 16)[None]
    with pytest.warns(AboveUniform, match=r"bits/dim are more than log2\(17\) = 4.087"):
        assert ss.bits_per_dim(model, images, Levels(17), solver=Adams(24)).mean > math.log2(17)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ss.bits_per_dim(model, f64(8, 8)[None], Levels(17), solver=Adams(24)).mean < math.log2(17)


def test_levels_that_another_transform_declares_are_checked_too():
    """Levels 100 .. 115 of 16, which gave 2,535 bits/dim."""
    model, images = (
        ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(VP),
        100 + torch.arange(16).view(8, 2),
    )
    for transform in (Compose([Affine(), Levels(16)]), Compose([Affine(0.5), Levels(8)])):
        with pytest.raises(ValueError, match="images must be integers from 0 to 15; got 100 to 115, where 16 of 16"):
            ss.bits_per_dim(model, images, transform, solver=Adams(24))
        with pytest.raises(ValueError, match="images must be integers from 0 to 15; got 100 to 115"):
            ss.bounds.continuous(model, images, transform)


@pytest.mark.parametrize(
    ("transform", "images", "levels"),
    [
        (Affine(1e-3), [[0, 15_000], [7, 9]], 15_001),
        (Compose([Affine(1.0, -100.0), Levels(16)]), [[0, 15], [7, 9]], 16),  # made for levels 100 .. 115
        (Affine(0.1), [[-60, 60], [0, 9]], 121),
    ],
)
def test_without_a_number_of_levels_bits_above_those_of_the_largest_level_are_warned_about(transform, images, levels):
    model, images = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(VP), torch.tensor(images)
    message = rf"bits/dim are more than log2\({levels}\) = {math.log2(levels):.4g}"
    with pytest.warns(AboveUniform, match=message):
        assert ss.bits_per_dim(model, images, transform, solver=Adams(24)).mean > math.log2(levels)
    with pytest.warns(AboveUniform, match=message):
        ss.bounds.continuous(model, images, transform)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AboveUniform)
        ss.bits_per_dim(model, torch.tensor([[8, 15], [7, 8], [8, 7]]), Affine(0.25, -2.0), solver=Adams(24))


@pytest.fixture(scope="module")
def grey_images():
    """A mixture over (1, 2, 2), its transform, and 24 images of its levels."""
    mixture, transform = ss.GaussianMixture(normal(2, 1, 2, 2), torch.tensor([0.5, 0.3])), Levels(8, -3.0, 3.0)
    values = transform.inverse(mixture.sample(24, generator=seeded()))
    return mixture.score_model(LONG), transform, values.floor().clamp(0, 7)


@pytest.mark.filterwarnings("ignore:the last level")
def test_a_multilevel_mean_is_that_of_accurate_solves_with_exact_traces(grey_images):
    model, transform, images = grey_images
    found = ss.bits_per_dim(model, images, transform, tolerance=0.08, levels=(8, 16))
    many = images.repeat(4, 1, 1, 1)
    exact = ss.bits_per_dim(model, many, transform, trace=ss.ExactTrace(), solver=Adams(16))
    means = exact.per_image.reshape(4, -1).mean(dim=1)
    difference = found.mean - float(means.mean())
    assert abs(difference) < 4.5 * math.hypot(found.multilevel.error, float(means.std()) / math.sqrt(4))
    close(f64(found.stderr), f64(math.hypot(found.multilevel.population, found.multilevel.error)))
    close(found.per_image.mean(), f64(found.mean))
    assert found.conventions["levels"] == "8 steps, 8 to 16 steps"
    assert int(found.nfe.min()) >= 8 + 1
    again = ss.bits_per_dim(model, images, transform, tolerance=0.08, levels=(8, 16), batch_size=7)
    close(again.per_image, found.per_image, rtol=1e-9)


def test_bad_arguments_of_multilevel_bits(grey_images):
    model, transform, images = grey_images
    images = images[:16]
    for message, arguments in {
        "tolerance must be .* more than 0": {"tolerance": -1.0},
        "levels must be at least two increasing": {"tolerance": 0.1, "levels": (12, 12)},
        "levels need a tolerance": {"levels": (6, 12)},
        "samples must be 1": {"tolerance": 0.1, "samples": 2},
        "number of steps": {"tolerance": 0.1, "solver": AdaptiveAdams()},
        "3 steps must have finite values": {"tolerance": 0.1, "levels": (3, 6), "solver": Broken()},
    }.items():
        with pytest.raises(ValueError, match=message):
            ss.bits_per_dim(model, images, transform, **arguments)
    with pytest.raises(ValueError, match="at least 16 samples for its pilot; got 5"):
        ss.bits_per_dim(model, images[:5], transform, tolerance=0.1)


@dataclass(frozen=True)
class Broken(Adams):
    """A solver whose integral is NaN."""

    def __call__(self, field, x, start, end):
        solution = super().__call__(field, x, start, end)
        return replace(solution, integral=solution.integral * math.nan)
