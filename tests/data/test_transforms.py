"""Each transform has an exact inverse, and the log-determinant of its Jacobian."""

import math

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
        (Affine, {"scale": math.nan}, "scale must be a finite number; got nan"),
        (Affine, {"scale": math.inf}, "scale must be a finite number; got inf"),
        (Affine, {"shift": -math.inf}, "shift must be a finite number; got -inf"),
        (Levels, {"levels": 1}, "levels >= 2.*levels=1"),
        (Levels, {"levels": 2.5}, "levels must be an integer; got 2.5"),
        (Levels, {"high": math.inf}, "high must be a finite number; got inf"),
        (Logit, {"low": math.nan}, "low must be a finite number; got nan"),
        (Logit, {"low": -math.inf}, "low must be a finite number; got -inf"),
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


def test_float32_states_far_from_zero_are_float64():
    """Neighbouring float32 numbers near 1e8 are 8 apart, and two of a million levels share one in [-1, 1]."""
    x = torch.tensor([[0.13, -2.5]])
    torch.testing.assert_close(Affine(1.0, 1e8)(x), 1e8 + x.double(), rtol=0, atol=1e-8)
    y, far = torch.tensor([[0.3, -0.7]]), Logit(1e8, 1e8 + 1, margin=0.0)
    torch.testing.assert_close(far.inverse(y), 1e8 + torch.sigmoid(y.double()), rtol=0, atol=3e-8)
    many, levels = Levels(1_000_000), torch.arange(999_990, 1_000_000, dtype=torch.float32)[None]
    assert torch.equal(many.quantise(many(levels)), levels.double())
    for near in (Affine(1.0, 2.0), Logit(), Levels(256), Levels(65_536, 0.0, 1.0)):
        assert near.inverse(near(x.abs() / 3)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-0.06, 1.06, 1e9])
@pytest.mark.parametrize("use", ["__call__", "log_det"])
def test_logit_refuses_values_where_it_is_not_defined(use, value, dtype):
    """With margin 0.05, p = 0.05 + 0.9 x is in [0, 1] for x from -0.05/0.9 to 0.95/0.9."""
    x = torch.tensor([[0.5, value, 0.2]], dtype=dtype)
    with pytest.raises(
        ValueError, match=r"x must lie in \(-0\.0555556, 1\.05556\), .*, 1 of 3 values outside: set low"
    ):
        getattr(Compose([Affine(0.5), Affine(2.0), Logit()]), use)(x)


def test_the_logit_of_all_states_that_its_inverse_returns():
    """States beyond the margin included; the ends of the interval are infinite, and NaN stays NaN."""
    y = torch.linspace(-12, 12, 101, dtype=torch.float64)[None]
    for transform in (Logit(), Logit(-3.0, 5.0, 0.2), Logit(margin=0.0)):
        torch.testing.assert_close(transform(transform.inverse(y)), y, rtol=1e-9, atol=1e-9)
    ends = Logit(2.0, 4.0, margin=0.0)(torch.tensor([[2.0, 3.0, 4.0, math.nan]]))
    assert ends[0, :3].tolist() == [-math.inf, 0, math.inf]
    assert bool(ends[0, 3].isnan())


@pytest.mark.parametrize(
    ("transform", "levels"),
    [
        (Levels(17), 17),
        (Compose([Levels(9), Logit()]), 9),
        (Compose([Affine()]), None),
        (Compose([]), None),
        (Compose([Affine(), Levels(16)]), 16),
        (Compose([Affine(0.5), Affine(0.5), Levels(8)]), 32),
        (Compose([Compose([Affine(1 / 3), Levels(5)]), Affine(2.0)]), 15),
        (Compose([Affine(1.0, -100.0), Levels(16)]), None),  # levels 100 .. 115
        (Compose([Affine(-1.0), Levels(16)]), None),
        (Compose([Affine(0.3), Levels(16)]), None),
        (Compose([Standardize(0.0, 1.0), Levels(16)]), None),
    ],
)
def test_the_number_of_levels_is_that_of_the_data(transform, levels):
    """The data that the transforms before `Levels` take to [0, levels)."""
    assert transform.levels == levels
