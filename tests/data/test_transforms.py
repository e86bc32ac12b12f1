"""Each transform has an exact inverse, and the log-determinant of its Jacobian."""

import pytest
import torch

from scoresde.data import Affine, Compose, Levels, Logit, Standardize
from tests.conftest import seeded

TRANSFORMS = {
    "affine": (Affine(-1.5, 0.3), -2.0, 2.0),
    "levels": (Levels(17), 0.0, 17.0),
    "logit": (Logit(), 0.0, 1.0),
    "logit-wide": (Logit(-2.0, 3.0, margin=1e-3), -2.0, 3.0),
    "compose": (Compose([Levels(17, 0.0, 1.0), Logit(), Affine(2.0, -1.0), Standardize(0.5, 3.0)]), 0.0, 17.0),
}
CASES = pytest.mark.parametrize(("transform", "low", "high"), TRANSFORMS.values(), ids=TRANSFORMS)
SHAPES = pytest.mark.parametrize("shape", [(3,), (1, 4, 4)], ids=["vector", "image"])


def data(shape, low, high):
    """Draw five samples between low and high."""
    return low + (high - low) * torch.rand(5, *shape, generator=seeded(), dtype=torch.float64)


@CASES
@SHAPES
def test_inverse_undoes_the_transform(transform, low, high, shape):
    x = data(shape, low, high)
    y = transform(x)
    assert y.shape == x.shape
    assert not torch.allclose(y, x, atol=0.1)
    torch.testing.assert_close(transform.inverse(y), x, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(transform(transform.inverse(y)), y, rtol=1e-12, atol=1e-11)


@CASES
@SHAPES
def test_log_det_is_that_of_the_jacobian(transform, low, high, shape):
    x = data(shape, low, high)
    jacobians = [torch.func.jacrev(lambda row: transform(row[None])[0])(row).reshape(row.numel(), -1) for row in x]
    expected = torch.linalg.slogdet(torch.stack(jacobians)).logabsdet
    torch.testing.assert_close(transform.log_det(x), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(transform.log_det(x.float()), expected, rtol=1e-4, atol=1e-4)  # float64 as well


def test_compose_applies_the_first_transform_first():
    x = data((3,), -1.0, 1.0)
    torch.testing.assert_close(Compose([Affine(2.0, 0.0), Affine(1.0, 5.0)])(x), 2 * x + 5)


@pytest.mark.parametrize("levels", [2, 10, 17, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_quantise_returns_the_level_of_a_dequantised_value(levels, dtype):
    transform, x = Levels(levels), torch.arange(levels, dtype=dtype)[None]
    for u in (0.0, 1e-3, 0.5, 1 - 1e-3):
        assert torch.equal(transform.quantise(transform(x + u)), x)


def test_quantise_clips_to_the_levels_and_levels_fill_the_range():
    transform = Levels(17, -2.0, 3.0)
    assert transform.quantise(torch.tensor([[-9.0, -2.1, 3.0, 9.0]])).tolist() == [[0, 0, 16, 16]]
    assert transform(torch.tensor([[0.0, 17.0]], dtype=torch.float64)).tolist() == [[-2, 3]]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Affine, {"scale": 0.0}, "scale=0 is not invertible"),
        (Levels, {"levels": 1}, "levels >= 2.*levels=1"),
        (Levels, {"low": 1.0, "high": 1.0}, "low < high"),
        (Logit, {"low": 1.0, "high": 0.0}, "low < high"),
        (Logit, {"margin": 0.5}, "margin < 0.5.*margin=0.5"),
        (Logit, {"margin": -0.1}, "0 <= margin"),
    ],
)
def test_transforms_without_an_inverse_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_an_affine_map_far_from_zero_keeps_its_digits():
    """(x - 1.7e9) / 50 and back, from states in float32."""
    z = torch.randn(1000, 2, generator=seeded(), dtype=torch.float64)
    far, near = Affine(1 / 50, -1.7e9 / 50), Affine(1 / 50, -2.0)
    torch.testing.assert_close(far(1.7e9 + 50 * z), z, rtol=0, atol=1e-7)
    torch.testing.assert_close(far.inverse(z.float()), 1.7e9 + 50 * z, rtol=0, atol=2e-5)
    assert near.inverse(z.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("transform", "levels"), [(Levels(17), 17), (Compose([Levels(9), Logit()]), 9), (Compose([Affine()]), None)]
)
def test_the_number_of_levels_is_that_of_the_first_transform(transform, levels):
    assert transform.levels == levels
