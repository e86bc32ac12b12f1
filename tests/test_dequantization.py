"""Dequantisations draw within the level and return their own density; times at which their points are states."""

import math
import re

import pytest
import torch
from scipy.stats import kstest, truncnorm

import scoresde as ss
from scoresde.dequantization import DataMap, TruncatedNormal, Uniform, Variational
from scoresde.random_stream import RandomStream
from tests.conftest import close, f64, normal, seeded, within

SHAPES = [(1,), (5,), (2, 3), (3, 4), (1, 4, 4), (3, 2, 2), (1, 2, 2, 2)]


def levels(*shape):
    return torch.randint(0, 17, shape, generator=seeded())


def stream():
    return RandomStream(seeded(1))


class FixedStream:
    """A stream whose only draw is a given tensor of uniform numbers."""

    def __init__(self, uniform):
        self.draw = uniform

    def uniform(self, like):
        assert (like.shape, like.dtype) == (self.draw.shape, self.draw.dtype)
        return self.draw


def variational(shape, amount=0.1, **options):
    """A flow with random weights of size `amount` instead of its initial zeros."""
    torch.manual_seed(0)
    q, generator = Variational(shape, **{"levels": 17, "layers": 4, "width": 8, **options}), seeded(1)
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return q


def all_of(shape):
    return [Uniform(), TruncatedNormal(), TruncatedNormal(0.7), Variational(shape, 17), variational(shape)]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_within_their_level_and_depend_only_on_their_seed(shape):
    images = levels(6, *shape)
    for q in all_of(shape):
        values, log_q = q.sample(images, RandomStream(seeds=range(6)))
        assert (values.dtype, log_q.dtype) == (torch.float64, torch.float64)
        assert (values.shape, log_q.shape) == (images.shape, (6,))
        assert torch.equal(values.floor(), images.double())
        alone = q.sample(images[3:4], RandomStream(seeds=[3]))
        torch.testing.assert_close((values[3:4], log_q[3:4]), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("place", ["first", "tiny", "last"])
@pytest.mark.parametrize("level", [0, 16, 255])
def test_the_ends_of_the_draws_stay_within_the_level(place, level, dtype):
    images = torch.full((1, 3), level, dtype=dtype)
    result_dtype = torch.float32 if dtype == torch.float32 else torch.float64
    uniform = {"first": 0.0, "tiny": 2**-60, "last": 1 - torch.finfo(result_dtype).eps / 2}[place]
    flow = variational((3,), amount=3.0)
    for q in (TruncatedNormal(3.0), TruncatedNormal(40.0), TruncatedNormal(1e-3), Variational((3,), 256), flow):
        values, log_q = q.sample(images, FixedStream(torch.full((1, 3), uniform, dtype=result_dtype)))
        assert values.dtype == log_q.dtype == result_dtype
        assert torch.equal(values.floor(), images.to(result_dtype))
        assert bool(torch.isfinite(log_q).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_log_q_is_the_density_of_the_draw(shape):
    """Values are a function of uniform numbers, of density 1: log q = -log|det d values / d numbers|."""
    images, numbers = levels(1, *shape), torch.rand(1, *shape, generator=seeded(3), dtype=torch.float64)
    size = numbers.numel()
    for q in all_of(shape):
        double = q.double() if isinstance(q, Variational) else q
        jacobian = torch.autograd.functional.jacobian(lambda u, q=double: q.sample(images, FixedStream(u))[0], numbers)
        _, log_q = double.sample(images, FixedStream(numbers))
        close(log_q.detach(), -torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet[None], rtol=0, atol=1e-8)


def test_log_q_is_the_density_of_each_bin():
    """E[1/q; u in bin] is the width of the bin."""
    images = levels(40_000, 1)
    for q in (Uniform(), TruncatedNormal(1.5), variational((1,), 0.5)):
        values, log_q = (part.detach() for part in q.sample(images, stream()))
        bins = (8 * (values - images)).long()
        for index in range(8):
            within(torch.where(bins == index, torch.exp(-log_q)[:, None], 0.0), 1 / 8)


# --- truncated normal


@pytest.mark.parametrize("tau", [0.01, 1.0, 3.0, 12.0])
def test_truncated_normal_against_scipy(tau):
    images = levels(4000, 3)
    values, log_q = TruncatedNormal(tau).sample(images, stream())
    reference = truncnorm(-tau, tau, scale=1 / (2 * tau))
    offset = (values - images - 0.5).numpy()
    assert kstest(offset.ravel(), reference.cdf).pvalue > 1e-3
    close(log_q, torch.from_numpy(reference.logpdf(offset).sum(axis=1)), rtol=1e-9, atol=1e-9)


def test_a_network_is_trained_on_the_values_it_is_evaluated_on():
    images, flow = levels(5, 2, 2), variational((2, 2))
    for q in (Uniform(), flow):
        close(q.training_values(images, stream()), q.sample(images, stream())[0].detach())
    assert not flow.training_values(images, stream()).requires_grad
    used = stream()
    assert torch.equal(TruncatedNormal().training_values(images, used), images + f64(0.5))
    assert torch.equal(used.uniform(images.double()), stream().uniform(images.double()))  # nothing was drawn


PATHS = [ss.VP(), ss.SubVP(), ss.VE(), ss.Cosine(), ss.Karras(), ss.Rectified(), ss.DDPM()]
AFFINE = [
    (ss.data.Levels(17), 2 / 17),
    (ss.data.Affine(-0.1, 3.0), 0.1),
    (ss.data.Compose([ss.data.Affine(0.5), ss.data.Levels(8, -2, 2)]), 0.25),
]


@pytest.mark.parametrize("sde", PATHS, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize(("transform", "width"), AFFINE, ids=["levels", "affine", "both"])
def test_the_start_is_where_the_noise_is_that_of_the_dequantisation(sde, transform, width):
    for tau in (1.0, 3.0):
        t = TruncatedNormal(tau).start(sde, transform)
        assert sde.t_min < t < sde.t_max
        assert float(sde.sigma(f64(t)) / sde.alpha(f64(t))) == pytest.approx(width / (2 * tau), rel=1e-6)


@pytest.mark.parametrize("sde", [ss.VP(), ss.SubVP(), ss.VE()], ids=lambda sde: type(sde).__name__)
def test_a_state_of_the_centres_within_the_level_is_a_dequantised_point(sde):
    """alpha T(x + u) is distributed as x(t) of a centre, given that it stays within its level."""
    transform, q, images = ss.data.Levels(9), TruncatedNormal(1.2), torch.full((20_000, 1), 4)
    t = f64(q.start(sde, transform))
    diffused = sde.perturb(transform(q.training_values(images, stream())), t, normal(20_000, 1))
    inside = transform.inverse(diffused / sde.alpha(t))
    inside = inside[(inside - 4.5).abs() < 0.5]
    assert len(inside) / 20_000 == pytest.approx(math.erf(1.2 / math.sqrt(2)), abs=0.01)
    assert kstest(inside.numpy(), q.sample(images, stream())[0].flatten().numpy()).pvalue > 1e-3


def test_a_start_may_be_t_min():
    t = TruncatedNormal().start(ss.SubVP(), ss.data.Levels(17))
    assert TruncatedNormal().start(ss.SubVP(t_min=t), ss.data.Levels(17)) == pytest.approx(t, rel=1e-12)
    assert Uniform().start(ss.VP(), ss.data.Levels(17)) is None
    assert Variational(3, 17).start(ss.VP(), ss.data.Levels(17)) is None


@pytest.mark.parametrize(
    ("sde", "transform", "message"),
    [
        (ss.VE(), ss.data.Levels(256, 0, 1), r"0.000651.*VE goes from 0.01 at t_min=1e-05.*lower.*take tau <= (\S+)"),
        (ss.SubVP(t_min=0.05), ss.data.Levels(17), r"SubVP goes from 0.02988 at t_min=0.05.*take tau <= (\S+)"),
        (ss.VE(sigma_max=0.02), ss.data.Levels(2), r"to 0.02 at t_max=1: raise t_max, or take tau >= (\S+)"),
    ],
)
def test_a_path_that_is_too_short_is_refused_and_the_suggested_tau_works(sde, transform, message):
    with pytest.raises(ValueError, match=message) as refused:
        TruncatedNormal().start(sde, transform)
    tau = float(re.search(message, str(refused.value))[1])
    assert sde.t_min < TruncatedNormal(tau).start(sde, transform) < sde.t_max


@pytest.mark.parametrize("transform", [ss.data.Logit(), ss.data.Logit(0, 256)])
def test_levels_of_different_widths_are_refused(transform):
    with pytest.raises(ValueError, match=r"affine transform \(Levels, Affine\).*Logit.*use Uniform or Variational"):
        TruncatedNormal().start(ss.VP(), transform)


# --- variational


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_flow_is_the_uniform_density(shape):
    images = levels(4, *shape)
    values, log_q = Variational(shape, 17).sample(images, stream())
    expected, _ = Uniform().sample(images, stream())
    close(values.detach(), expected, atol=1e-12)
    close(log_q.detach(), torch.zeros(4, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 4, 4)])
def test_every_value_depends_on_the_others_and_on_the_levels(shape):
    """Each half reads the other one: within two layers, and across channels."""
    q, images = variational(shape).double(), levels(1, *shape).double().requires_grad_()
    numbers = torch.rand(1, *shape, generator=seeded(2), dtype=torch.float64).requires_grad_()
    offset = (q.sample(images, FixedStream(numbers))[0] - images).flatten()
    for index in range(len(offset)):
        of_levels, of_numbers = torch.autograd.grad(offset[index], (images, numbers), retain_graph=True)
        assert int((of_numbers != 0).sum()) >= min(len(offset), 6)
        assert int((of_levels.abs() > 1e-12).sum()) >= min(len(offset), 6)


def test_draws_are_reparameterised():
    """The gradient of an expectation is the expectation of the gradient, by central differences at the same draws."""
    q, images = variational((4,)).double(), levels(50, 4)
    weight = q.couplings["coupling1"].network[-1].weight

    def mean():
        values, log_q = q.sample(images, stream())
        return (values.square().sum(dim=1) + log_q).mean()

    (gradient,) = torch.autograd.grad(mean(), weight)
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight[2, 3] += step
        ends.append(float(mean().detach()))
    assert float(gradient[2, 3]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Variational((), 17), r"shape must be that of one state.*got \(\)"),
        (lambda: Variational((1, 0, 2), 17), r"got \(1, 0, 2\)"),
        (lambda: Variational(3, 1), "levels >= 2.*got levels=1, layers=4, width=32"),
        (lambda: Variational(3, 17, 0), "layers >= 1"),
        (lambda: Variational(3, 17, 2, 0), "width >= 1"),
        (
            lambda: Variational((1, 4, 4), 17).sample(levels(2, 4, 4), stream()),
            r"expected grey levels of shape \(B, 1, 4, 4\); got \(2, 4, 4\)",
        ),
        *(
            (lambda tau=tau: TruncatedNormal(tau), "positive and finite; got tau")
            for tau in (0, -1.0, math.inf, math.nan)
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- from data to states


class Flat:
    """States (B, D), twice the data."""

    def __call__(self, x):
        return 2 * x.flatten(1)

    def inverse(self, y):
        return 0.5 * y.reshape(-1, 1, 2, 2)

    def log_det(self, x):
        return torch.full((len(x),), x[0].numel() * math.log(2), dtype=torch.float64)

    def __str__(self):
        return "flat"


MAPS = {
    "levels": ss.data.Levels(17, -2.0, 1.0),
    "affine": ss.data.Affine(-0.1, 3.0),
    "flat": Flat(),
    "logit": ss.data.Compose([ss.data.Affine(1 / 17), ss.data.Logit()]),
}


def log_det_by_autograd(transform, values):
    """log|det dT| per sample (B,), from the Jacobian."""
    size = values[0].numel()
    jacobians = [torch.autograd.functional.jacobian(transform, x[None]).reshape(size, size) for x in values]
    return torch.stack([torch.linalg.slogdet(jacobian).logabsdet for jacobian in jacobians])


NAMES = ["uniform", "normal", "wide normal", "new flow", "flow"]
DRAWN = [
    pytest.param(q, name, id=f"{label}-{name}")
    for label, q in zip(NAMES, all_of((1, 2, 2)), strict=True)
    for name in MAPS
    if name != "logit" or not isinstance(q, TruncatedNormal)  # needs levels of one width
]


@pytest.mark.parametrize(("q", "name"), DRAWN)
@pytest.mark.parametrize("sde", [ss.SubVP(), ss.Rectified()], ids=lambda sde: type(sde).__name__)
def test_a_draw_is_a_state_with_its_change_of_variables(sde, q, name):
    """state = alpha T(x + u), nats = log|det dT| - log q(u | x) + d log alpha; alpha = 1 if states are x(t_min)."""
    images, transform = levels(6, 1, 2, 2), MAPS[name]
    data_map = DataMap(transform, q)
    state, nats = (part.detach() for part in data_map.draw(images, RandomStream(seeds=range(6)), sde))
    values, log_q = (part.detach() for part in q.sample(images, RandomStream(seeds=range(6))))
    start = data_map.start(sde)
    assert (start is None) == (not isinstance(q, TruncatedNormal))
    alpha = f64(1.0) if start is None else sde.alpha(f64(start))
    close(state, alpha * transform(values))
    close(nats, log_det_by_autograd(transform, values) - log_q + 4 * alpha.log(), rtol=1e-9, atol=1e-9)
    assert state.dtype == nats.dtype == torch.float64


@pytest.mark.parametrize("name", list(MAPS))
def test_continuous_data_is_mapped_without_a_draw(name):
    data, transform, unused = 1 + 15 * torch.rand(4, 1, 2, 2, generator=seeded()).double(), MAPS[name], stream()
    data_map = DataMap(transform)
    assert data_map.start(ss.VP()) is None
    state, nats = data_map.draw(data, unused, ss.VP())
    close(state, transform(data), rtol=0)
    close(nats, log_det_by_autograd(transform, data), rtol=1e-9)
    close(data_map.training_states(data, unused), state, rtol=0)
    assert torch.equal(unused.normal(data), stream().normal(data))
    close(data_map.inverse(state), data, rtol=1e-9)
    assert str(data_map) == str(transform)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["levels", "flat"])
@pytest.mark.parametrize("q", all_of((1, 2, 2)), ids=NAMES)
def test_a_network_is_trained_on_clean_states_in_the_dtype_of_the_data(q, name, dtype):
    """T(training values): for TruncatedNormal of the centres, not of the points it draws."""
    images, transform = levels(4, 1, 2, 2).to(dtype), MAPS[name]
    data_map, values = DataMap(transform, q), q.training_values(images, RandomStream(seeds=range(4)))
    trained = data_map.training_states(images, RandomStream(seeds=range(4)))
    assert trained.dtype == values.dtype == dtype
    assert not trained.requires_grad
    close(trained, transform(values), rtol=0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    close(data_map.inverse(trained), values, rtol=tolerance, atol=tolerance)
    state, nats = data_map.draw(images, RandomStream(seeds=range(4)), ss.VP())
    assert (state.dtype, nats.dtype) == (dtype, torch.float64)


@pytest.fixture
def every_warning(recwarn):
    """Make PyTorch repeat warnings that it gives once in a process."""
    torch.set_warn_always(True)
    yield recwarn
    torch.set_warn_always(False)


def test_a_learned_path_gets_no_gradient_from_its_data(every_warning):
    images, sde = levels(3, 4), ss.LearnedVP()
    data_map = DataMap(ss.data.Levels(17), TruncatedNormal())
    every_warning.clear()
    state, nats = data_map.draw(images, RandomStream(seeds=range(3)), sde)
    assert not state.requires_grad
    assert not nats.requires_grad
    assert not [warning for warning in every_warning if "requires_grad" in str(warning.message)]


def test_names_in_the_conventions():
    names = [str(q) for q in (Uniform(), TruncatedNormal(2.5), Variational(3, 17, layers=2))]
    assert names == ["uniform", "truncated normal, tau=2.5", "variational, 2 coupling layers"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (f64(0, 17)[None], r"integers from 0 to 16; got 0 to 17, where 1 of 2 values"),
        (torch.tensor([[3, -1]]), "from 0 to 16; got -1 to 3"),
        (torch.tensor([[0, 255]], dtype=torch.uint8), "from 0 to 16; got 0 to 255"),
        (f64(0.25, 1.0)[None], "got 0.25 to 1, where 1 of 2 .* without scaling .* use log_prob"),
    ],
)
def test_a_network_is_not_trained_on_values_that_are_no_levels(images, message):
    with pytest.raises(ValueError, match=message):
        DataMap(ss.data.Levels(17), Uniform()).training_states(images, stream())


def test_without_a_number_of_levels_any_integers_are_levels():
    images = torch.tensor([[-3.0, 400.0]])
    assert DataMap(ss.data.Affine(), Uniform()).training_states(images, stream()).floor().equal(images)
    with pytest.raises(ValueError, match=r"images must be integers; got 0\.5 to 1"):
        DataMap(ss.data.Affine(), Uniform()).draw(f64(0.5, 1.0)[None], stream(), ss.VP())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16], ids=["uint8", "int64", "bfloat16"])
def test_levels_of_any_dtype_are_dequantised_alike(dtype):
    images, data_map = levels(4, 3), DataMap(ss.data.Levels(17), Uniform())
    of_floats, of_others = (data_map.training_states(x, stream()) for x in (images.float(), images.to(dtype)))
    assert torch.equal(of_others, of_floats)
