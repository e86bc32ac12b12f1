"""Every operator against its own matrix: adjoint, pseudo-inverse and singular values."""

import math
from types import SimpleNamespace

import pytest
import torch

from scoresde import inverse
from scoresde.inverse import Blur, Colour, Grey, Inpainting, Linear, Nonlinear, as_operator
from tests.conftest import close, f64, normal, within
from tests.inverse.cases import KERNEL, MASK, OPERATORS, matrix_of

CASES = [pytest.param(*case, id=name) for name, case in OPERATORS.items()]
KNOWN = [pytest.param(*case, id=name) for name, case in OPERATORS.items() if case[0].has_spectrum]


@pytest.mark.parametrize(("operator", "shape"), CASES)
def test_the_adjoint_is_the_transpose(operator, shape):
    x = normal(5, *shape, seed=1)
    y = operator(x)
    z = normal(*y.shape, seed=2)
    back = operator.adjoint(z)
    assert back.shape == x.shape
    close((y * z).flatten(1).sum(dim=1), (x * back).flatten(1).sum(dim=1), rtol=1e-10, atol=1e-12)
    close(back.flatten(1), z.flatten(1) @ matrix_of(operator, shape), rtol=1e-10, atol=1e-12)
    assert operator(x.float()).dtype == operator.adjoint(z.float()).dtype == torch.float32


@pytest.mark.parametrize(("operator", "shape"), KNOWN)
def test_singular_values_are_those_of_the_matrix(operator, shape):
    matrix = matrix_of(operator, shape)
    values = operator.singular_values(shape)
    assert values.shape == torch.Size(shape)
    expected = torch.zeros(matrix.shape[1], dtype=torch.float64)
    singular = torch.linalg.svdvals(matrix)
    expected[: len(singular)] = singular
    close(values.flatten().sort(descending=True).values, expected, rtol=1e-10, atol=1e-12)
    x = normal(4, *shape, seed=1)
    coordinates = operator.to_spectrum(x)
    close(coordinates.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-10)
    close(operator.from_spectrum(coordinates), x, rtol=1e-10, atol=1e-12)
    squared = operator.to_spectrum(operator.adjoint(operator(x)))
    close(squared, values.square() * coordinates, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("operator", "shape"),
    [*KNOWN, *(pytest.param(*OPERATORS[k], id=k) for k in ("bicubic", "bicubic of 3", "own filter"))],
)
def test_the_pseudo_inverse_is_that_of_the_matrix(operator, shape):
    y = operator(normal(4, *shape, seed=1))
    y = y + normal(*y.shape, seed=2)  # outside of the range of A, where that is not everything
    expected = y.flatten(1) @ torch.linalg.pinv(matrix_of(operator, shape)).mT
    solution = operator.pseudo_inverse(y)
    close(solution.flatten(1), expected, rtol=1e-8, atol=1e-10)
    again = operator(operator.pseudo_inverse(operator(solution)))
    close(again, operator(solution), rtol=1e-8, atol=1e-10)


def test_a_convolution_has_its_kernel_in_the_middle_and_turned():
    delta = torch.zeros(1, 5, 7, dtype=torch.float64)
    delta[0, 2, 3] = 1
    close(Blur(KERNEL)(delta)[0, 1:4, 2:5], KERNEL.double(), atol=1e-12)


def test_downsampled_images_of_a_smooth_ramp_stay_in_place():
    """A filter of mean 1 about the centre of each block: a linear image keeps its values at the centres."""
    ramp = torch.arange(24, dtype=torch.float64).expand(1, 24, 24)
    centres = torch.arange(12, dtype=torch.float64) * 2 + 0.5
    for filter in ("box", "bicubic"):
        close(inverse.Downsampling(2, filter)(ramp)[0, 0, 3:9], centres[3:9], rtol=1e-10)


def test_the_colour_space_is_the_published_one():
    """The matrix in score_sde's controllable_generation.py, rounded to float32 there."""
    published = torch.tensor(
        [
            [5.7735014e-01, -8.1649649e-01, 4.7008697e-08],
            [5.7735026e-01, 4.0824834e-01, 7.0710671e-01],
            [5.7735026e-01, 4.0824822e-01, -7.0710683e-01],
        ]
    ).double()
    x = normal(2, 3, 2, 2)
    close(Colour()(x), torch.einsum("bihw,ij->bjhw", x, published), rtol=0, atol=1e-6)
    close(Colour()(x)[:, :1], 3**0.5 * Grey()(x), rtol=1e-12)


def test_the_noise_of_measurements_and_its_density():
    std = f64(0.5, 1.5)
    operator = Inpainting([True, False, True], noise_std=std)
    x = normal(1, 3).expand(20_000, 3)
    y = operator.measure(x, seeds=range(20_000))
    within(y, x[0, [0, 2]])
    within((y - y.mean(dim=0)).square(), std.square())
    density = torch.distributions.Normal(x[:5, [0, 2]], std).log_prob(y[:5]).sum(dim=1)
    close(operator.log_likelihood(y[:5], x[:5]), density, rtol=1e-12)
    close(operator.measure(x[3:4], seeds=[3])[0], y[3])


def test_nonlinear_functions_have_a_density_but_no_adjoint():
    operator = Nonlinear(lambda x: x.square().sum(dim=1, keepdim=True), 0.5)
    x = normal(3, 2)
    expected = torch.distributions.Normal(x.square().sum(dim=1), 0.5).log_prob(f64(1.0))
    close(operator.log_likelihood(torch.ones(1, 1), x), expected)
    with pytest.raises(TypeError, match="no adjoint: use DPS"):
        operator.adjoint(x)


def test_objects_with_a_and_its_adjoint_are_operators():
    physics = SimpleNamespace(
        A=lambda x: x[:, :2],
        A_adjoint=lambda y: torch.cat((y, 0 * y[:, :1]), dim=1),
        noise_model=SimpleNamespace(sigma=0.3),
    )
    operator, x = as_operator(physics), normal(2, 3)
    assert float(operator.noise_std) == 0.3
    close(operator(x), x[:, :2])
    close(operator.adjoint(x[:, :2]), torch.cat((x[:, :2], torch.zeros(2, 1, dtype=torch.float64)), dim=1))
    with pytest.raises(TypeError, match="singular values of PhysicsOperator are not known"):
        operator.pseudo_inverse(x[:, :2])


X = torch.zeros(2, 4, 4)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Inpainting(MASK, noise_std=-1.0), ValueError, r"noise_std must be finite and at least 0; got \[-1\]"),
        (lambda: Inpainting(MASK, noise_std=math.nan), ValueError, "noise_std must be finite"),
        (lambda: Inpainting(0.5 * MASK), ValueError, "mask must have the entries 0 and 1; got .*mask > 0.5"),
        (lambda: Inpainting(0 * MASK), ValueError, r"mask must be true somewhere.*got \(4, 4\) of zeros"),
        (lambda: Inpainting("box"), TypeError, "mask must be a tensor of bools; got str"),
        (
            lambda: Inpainting(MASK)(X[:, :2]),
            ValueError,
            r"states must be \(B, 4, 4\) or \(B, C, 4, 4\); got \(2, 2, 4\)",
        ),
        (lambda: Inpainting(MASK).adjoint(X), ValueError, r"measurements must be \(B, 7\)"),
        (lambda: inverse.Fourier(MASK[0]), ValueError, r"mask must be \(H, W\); got \(4,\)"),
        (lambda: inverse.Downsampling(0), ValueError, "factor must be"),
        (lambda: inverse.Downsampling(2, "lanczos"), ValueError, "filter must be one of box, bicubic"),
        (lambda: inverse.Downsampling(3)(X), ValueError, r"height and width must be multiples of 3; got \(2, 4, 4\)"),
        (lambda: inverse.Downsampling(2)(X[:, 0]), ValueError, r"states must be images \(B, H, W\)"),
        (lambda: inverse.Downsampling(2, "bicubic").singular_values((4, 4)), TypeError, "Downsampling are not known"),
        (lambda: Blur(torch.ones(3)), ValueError, r"kernel must be a matrix of finite numbers; got shape \(3,\)"),
        (lambda: Grey()(X), ValueError, r"states must be \(B, 3\), .*got \(2, 4, 4\)"),
        (lambda: Grey(weights=torch.ones(2, 2)), ValueError, r"one number for each channel; got shape \(2, 2\)"),
        (lambda: Linear(lambda x: x), TypeError, "adjoint must be the function A"),
        (lambda: Linear(torch.eye(2), lambda y: y), TypeError, "adjoint must be left out with a matrix"),
        (lambda: Linear(torch.eye(4), shape=(3,)), ValueError, r"shape must have 4 numbers in all; got \(3,\)"),
        (lambda: Linear(torch.eye(3))(X), ValueError, r"states must be \(B, 3\); got \(2, 4, 4\)"),
        (
            lambda: Blur(KERNEL) @ Grey(0.1),
            ValueError,
            "inner operator of a composition must have noise_std 0; got 0.1",
        ),
        (lambda: Blur(KERNEL) @ 3, TypeError, "an operator must be one of scoresde.inverse.*got 3"),
        (lambda: as_operator(Grey), TypeError, "got the class Grey: call it"),
        (lambda: Nonlinear(lambda x: x.sum((1, 2)))(X), ValueError, r"must return measurements \(B, \*m\); got \(2,\)"),
        (lambda: Nonlinear(3), TypeError, "forward must be callable; got 3"),
        (
            lambda: Grey().log_likelihood(X, torch.zeros(1, 3, 4, 4)),
            ValueError,
            r"y must be one measurement \(1, 4, 4\)",
        ),
        (
            lambda: Grey().log_likelihood(X[:1, None], torch.zeros(1, 3, 4, 4)),
            ValueError,
            "needs noise_std > 0; got Grey",
        ),
    ],
)
def test_bad_arguments_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
