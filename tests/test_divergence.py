"""Exact and Hutchinson traces against explicit Jacobians."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from scoresde.divergence import ExactTrace, Hutchinson, quadratic_forms
from scoresde.networks import UNet
from scoresde.random_stream import RandomStream
from tests.conftest import close, normal, seeded


def linear_field(shape, seed=0):
    """A linear field over states of that shape, and its matrix."""
    matrix = normal(math.prod(shape), math.prod(shape), seed=seed)
    return (lambda x: (x.flatten(1) @ matrix.T).reshape(x.shape)), matrix


def stream(seed=0):
    return RandomStream(seeded(seed))


@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)])
@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_exact_trace_of_a_nonlinear_field(shape, chunk, mode):
    x = normal(2, *shape, seed=1)
    inner, _ = linear_field(shape)
    value, trace, variance = ExactTrace(chunk, mode).bind(stream(), x)(lambda y: torch.sin(inner(y)), x)
    jacobians = [torch.func.jacrev(lambda y: torch.sin(inner(y[None]))[0])(row) for row in x]
    expected = torch.stack([j.reshape(math.prod(shape), -1).trace() for j in jacobians])
    torch.testing.assert_close(trace[:, 0], expected)
    torch.testing.assert_close(value, torch.sin(inner(x)))
    assert torch.equal(variance, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_its_error_falls_with_the_root_of_the_probes(distribution):
    field, matrix = linear_field((1, 2, 3))
    x = torch.zeros(4000, 1, 2, 3, dtype=torch.float64)
    deviations = []
    for probes in (1, 4, 16):
        _, traces, _ = Hutchinson(probes, distribution).bind(stream(probes), x)(field, x)
        estimate = traces.mean(dim=1)
        deviations.append(float(estimate.std()))
        assert abs(float(estimate.mean() - matrix.trace())) < 4 * deviations[-1] / math.sqrt(len(x))
    symmetric = (matrix + matrix.T) / 2
    off_diagonal = symmetric.square().sum() - symmetric.diagonal().square().sum()
    variance = 2 * (off_diagonal if distribution == "rademacher" else symmetric.square().sum())
    assert deviations[0] == pytest.approx(math.sqrt(variance), rel=0.1)
    assert deviations[0] / deviations[1] == pytest.approx(2, rel=0.1)
    assert deviations[1] / deviations[2] == pytest.approx(2, rel=0.1)


def test_probes_are_fixed_or_fresh():
    field, _ = linear_field((3,))
    x = torch.zeros(5, 3, dtype=torch.float64)
    for resample in (False, True):
        estimate = Hutchinson(resample=resample).bind(stream(), x)
        assert torch.equal(estimate(field, x).estimates, estimate(field, x).estimates) != resample


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_memory_of_an_exact_trace_is_bounded_by_its_chunk(mode):
    """The widest tensor in the field or in the products with its Jacobian has `chunk` rows."""
    widths = []

    class Double(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(x):
            return 2 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def vmap(info, dims, x):
            widths.append(x.shape[dims[0]])
            return Double.apply(x), dims[0]

        @staticmethod
        def backward(ctx, g):
            return Double.apply(g)

        @staticmethod
        def jvp(ctx, tangent):
            return Double.apply(tangent)

    x = torch.randn(2, 10, dtype=torch.float64)
    trace = ExactTrace(4, mode).bind(stream(), x)(Double.apply, x).estimates
    torch.testing.assert_close(trace, torch.full((2, 1), 20.0, dtype=torch.float64))
    assert max(widths) == 4


def test_forward_and_reverse_mode_agree_on_a_network_with_attention():
    torch.manual_seed(0)
    network = UNet(8, 1, out_channels=1, width=16, multipliers=(1, 2), blocks=1, attention=(4,)).double().eval()
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    x, label = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    exact = [ExactTrace(16, mode).bind(stream(), x) for mode in ("reverse", "forward")]
    close(*(trace(lambda y: network(y, label), x).estimates for trace in exact), 1e-7)


def jacobian(kind, size):
    matrix = normal(size, size, seed=3)
    symmetric = (matrix + matrix.T) / 2
    constant = symmetric - torch.diag(symmetric.diagonal()) + 3 * torch.eye(size, dtype=torch.float64)
    return {"any": matrix, "symmetric": symmetric, "constant diagonal": constant}[kind]


@pytest.mark.parametrize("kind", ["any", "symmetric", "constant diagonal"])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("size", [2, 7])
def test_the_variance_of_one_probe_is_bounded_in_expectation(kind, distribution, size):
    matrix, x = jacobian(kind, size), torch.zeros(20_000, size, dtype=torch.float64)
    result = Hutchinson(1, distribution).bind(stream(), x)(lambda y: y @ matrix.T, x)
    ratio = float(result.variance.mean() / result.estimates.var())
    assert ratio > 0.97
    if kind == "constant diagonal" and distribution == "rademacher" and size > 2:
        assert ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("probes", [2, 5])
def test_the_variance_of_several_probes_is_estimated(distribution, probes):
    matrix, x = jacobian("any", 6), torch.zeros(20_000, 6, dtype=torch.float64)
    result = Hutchinson(probes, distribution).bind(stream(), x)(lambda y: y @ matrix.T, x)
    assert float(result.variance.mean() / result.estimates.mean(dim=1).var()) == pytest.approx(1, abs=0.06)


def test_probes_of_some_rows_leave_the_streams_of_the_others_alone():
    field, _ = linear_field((3,))
    x, rows = torch.zeros(4, 3, dtype=torch.float64), torch.tensor([2, 0])
    estimators = [trace.bind(RandomStream(seeds=range(4)), x) for trace in 2 * [Hutchinson()]]
    first = estimators[0](field, x).estimates
    torch.testing.assert_close(estimators[1](field, x[rows], rows).estimates, first[rows])
    torch.testing.assert_close(estimators[1](field, x[1:2], torch.tensor([1])).estimates, first[1:2])
    fixed = Hutchinson(resample=False).bind(RandomStream(seeds=range(4)), x)
    close(fixed(field, x[rows], rows).estimates, fixed(field, x).estimates[rows])


TRACES = [
    ExactTrace(),
    ExactTrace(chunk=2),
    ExactTrace(mode="forward"),
    Hutchinson(3),
    Hutchinson(2, "gaussian", resample=False),
]


def cubic(weight):
    """The field (W x)^3, whose trace 3 sum_i (W x)_i^2 W_ii depends on x and on W."""
    return lambda x: (x.flatten(1) @ weight.T).reshape(x.shape) ** 3


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
@pytest.mark.parametrize("trace", TRACES, ids=str)
def test_differentiable_estimates_have_the_gradient_of_their_formula(trace, shape):
    """d/dW and d/dx of the value and of z^T (dv/dx) z = sum_i z_i 3 (W x)_i^2 (W z)_i, for the probes drawn."""
    x = normal(4, *shape, seed=2).requires_grad_()
    size = math.prod(shape)
    weight = linear_field(shape)[1].requires_grad_()
    value, traces, _ = trace.bind(stream(), x, differentiable=True)(cubic(weight), x)
    actual = torch.autograd.grad(value.sum() + traces.square().sum(), (weight, x))

    again = stream()
    exact, flat = isinstance(trace, ExactTrace), x.flatten(1)
    basis = torch.eye(size, dtype=torch.float64)[:, None]
    probes = list(basis) if exact else [z.flatten(1) for z in trace.draw(again, x)]
    forms = torch.stack([(z * 3 * (flat @ weight.T) ** 2 * (z @ weight.T)).sum(dim=1) for z in probes], dim=1)
    forms = forms.sum(dim=1, keepdim=True) if exact else forms
    expected = torch.autograd.grad(cubic(weight)(x).sum() + forms.square().sum(), (weight, x))
    torch.testing.assert_close(traces, forms)
    torch.testing.assert_close(value, cubic(weight)(x))
    for first, second in zip(actual, expected, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_vectorised_trace_is_the_sum_of_single_products(differentiable, chunk):
    """With normalisation, attention, and a checkpoint whose second forward pass repeats its dropout and kernels."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.GroupNorm(2, 4), torch.nn.SiLU(), torch.nn.Dropout(0.5)
    )
    head = torch.nn.Conv2d(4, 1, 3, padding=1)

    def attended(hidden):
        return scaled_dot_product_attention(hidden, hidden, hidden)

    def field(x):
        if differentiable:  # the last backward pass is the user's; it must not recompute attention with fused kernels
            return head(attended(checkpoint(layers, x, use_reentrant=False)))
        return head(checkpoint(lambda x: attended(layers(x)), x, use_reentrant=False))

    x = torch.randn(3, 1, 4, 4)
    basis = [row.reshape(1, 1, 4, 4).expand(3, 1, 4, 4) for row in torch.eye(16)]
    torch.manual_seed(1)
    value, trace, _ = ExactTrace(chunk).bind(stream(), x, differentiable)(field, x)
    torch.manual_seed(1)
    expected, forms, _ = quadratic_forms(field, x, basis, differentiable)
    sums = forms.sum(dim=1)
    torch.testing.assert_close((value, trace[:, 0]), (expected, sums), rtol=1e-5, atol=1e-5)
    if differentiable:
        actual, exact = (torch.autograd.grad(t.square().sum(), [*layers.parameters()]) for t in (trace, sums))
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trace", TRACES, ids=str)
def test_estimates_keep_no_graph_unless_asked_to(trace):
    x, weight = torch.randn(4, 3, dtype=torch.float64), linear_field((3,))[1].requires_grad_()
    for source in (x, x.clone().requires_grad_()):
        value, traces, _ = trace.bind(stream(), x)(cubic(weight), source)
        assert not value.requires_grad
        assert not traces.requires_grad
        again = trace.bind(stream(), x, differentiable=True)(cubic(weight), source)
        torch.testing.assert_close(again[:2], (value, traces))
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hutchinson(probes=0), "probes must be at least 1"),
        (lambda: Hutchinson(distribution="uniform"), "'rademacher' or 'gaussian'"),
        (lambda: ExactTrace(chunk=0), "chunk must be at least 1"),
        (lambda: ExactTrace(mode="backward"), "'reverse' or 'forward'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
