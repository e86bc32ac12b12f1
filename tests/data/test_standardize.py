"""Standardisation by NumPy's moments, with an exact inverse and log-determinant."""

import json

import numpy as np
import pytest
import torch

from scoresde.data import Standardize
from tests.conftest import seeded

SHAPES = {"vector": (4,), "series": (3, 5), "image": (2, 3, 4)}
CASES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
PER = pytest.mark.parametrize("per", ["dimension", "channel"])


def samples(shape, n=50):
    """Draw samples whose channels have means far from zero and unequal scales."""
    scale = torch.logspace(-2, 3, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    return 1e4 + scale * torch.randn(n, *shape, generator=seeded(), dtype=torch.float64)


@CASES
@PER
def test_moments_are_those_of_numpy(per, shape):
    x = samples(shape)
    arguments = Standardize(per=per).fit(list(x))
    axes = 0 if per == "dimension" else (0, *range(2, x.ndim))
    for name, function, rtol in (("mean", np.mean, 1e-13), ("std", np.std, 1e-9)):
        expected = function(x.numpy(), axis=axes, keepdims=True)[0]
        assert np.shape(arguments[name]) == expected.shape
        np.testing.assert_allclose(arguments[name], expected, rtol=rtol)
    assert Standardize(per=per).fit([(state, torch.tensor(0)) for state in x]) == arguments


@CASES
@PER
def test_inverse_and_log_det_are_exact(per, shape):
    x = samples(shape)
    transform = Standardize(**json.loads(json.dumps(Standardize(per=per).fit(list(x)))))  # as from a configuration
    x = x[:3]
    torch.testing.assert_close(transform.inverse(transform(x)), x, rtol=1e-14, atol=0)
    jacobian = torch.func.jacrev(lambda state: transform(state[None])[0])(x[0])
    expected = torch.linalg.slogdet(jacobian.reshape(x[0].numel(), -1)).logabsdet
    torch.testing.assert_close(transform.log_det(x), expected.expand(3), rtol=1e-12, atol=1e-12)
    assert transform.log_det(x.float()).dtype == torch.float64


def test_the_result_has_the_dtype_of_the_state_and_data_units_are_float64():
    transform, x = Standardize([300.0], [10.0]), torch.tensor([[290.0], [315.0]])
    assert transform(x).tolist() == [[-1], [1.5]]
    assert (transform(x).dtype, transform(x.double()).dtype) == (torch.float32, torch.float64)
    assert transform.inverse(transform(x)).dtype == torch.float64


# A coordinate in metres, a time in seconds since 1970, a pressure in pascals: mean and standard deviation.
FAR = pytest.mark.parametrize(("mean", "std"), [(5.4e6, 0.2), (1.7e9, 50.0), (101325.0, 0.02)])


@FAR
def test_values_far_from_zero_keep_their_digits(mean, std):
    """The transform of mean + std z is z to the digits of float64, and back, also from float32 states."""
    z = torch.randn(4000, 1, generator=seeded(), dtype=torch.float64)
    x, spacing = mean + std * z, mean * torch.finfo(torch.float64).eps
    transform = Standardize(**Standardize().fit(list(x)))
    y = transform(x)
    expected, rounding = (z - z.mean()) / z.std(correction=0), 20 * spacing / std  # of the mean: 12 additions in pairs
    torch.testing.assert_close(y, expected, rtol=0, atol=rounding)
    assert len(y.unique()) == len(x.unique())
    torch.testing.assert_close(transform.inverse(y.float()), x, rtol=0, atol=3e-7 * std + spacing)


@FAR
def test_a_dtype_that_cannot_tell_the_values_apart_is_refused(mean, std):
    x = mean + std * torch.randn(500, 2, generator=seeded(), dtype=torch.float64)
    transform = Standardize(**Standardize().fit(list(x)))
    message = r"dimension \[0\] must have values that float32 can tell apart; got mean .* keep the data in float64, or"
    with pytest.raises(ValueError, match=message):
        transform(x.float())
    with pytest.raises(ValueError, match=message):
        Standardize().fit(list(x.float()))


def test_values_that_float64_cannot_tell_apart_are_refused():
    x = 1e18 + 5000 * torch.randn(500, 2, generator=seeded(), dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"float64 can tell apart; .* 2.2e\+02 apart: subtract an offset from it where"
    ):
        Standardize().fit(list(x))
    with pytest.raises(ValueError, match="float64 can tell apart"):
        Standardize().fit(list(x.long()))


def test_numbers_for_all_dimensions():
    transform, x = Standardize(2.0, 4.0), torch.tensor([[6.0, -2.0]])
    assert transform(x).tolist() == [[1, -1]]
    assert transform.log_det(x).tolist() == pytest.approx([-2 * np.log(4)])
    assert Standardize([[1.0], [2.0]], [[1.0], [4.0]])(torch.ones(1, 2, 3)).tolist() == [[[0] * 3, [-0.25] * 3]]


def test_unfitted_transform_cannot_be_applied():
    transform = Standardize()
    assert not transform.fitted
    assert Standardize([0.0], [1.0]).fitted
    for use in (transform, transform.inverse, transform.log_det):
        with pytest.raises(ValueError, match=r"has no mean and std: use Standardize\(\*\*transform.fit\(training_data"):
            use(torch.zeros(2, 3))
    assert str(transform) == "Standardize(per dimension, not fitted)"


def test_text_is_short_and_differs_with_the_numbers():
    means = ([0.0] * 500 + [0.5], [0.0] * 500 + [0.25], [0.0] * 499 + [0.25, 0.5])
    texts = [str(Standardize(mean, [1.0] * 501)) for mean in means]
    assert texts[0].startswith("Standardize(mean 0 .. 0.5, std 1, ")
    assert len(set(texts)) == 3
    assert texts[0] == str(Standardize([0] * 500 + [0.5], [1] * 501))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6 / 3])
def test_constant_dimension_is_named(value):
    x = torch.randn(60, 3, generator=seeded())
    x[:, 1] = value
    with pytest.raises(ValueError, match=r"dimension \[1\] is constant in the training data \(1 of 3 are\)"):
        Standardize().fit(list(x))
    with pytest.raises(ValueError, match=r"channel \[1\] is constant"):
        Standardize(per="channel").fit(list(x[:, :, None].double()))


def test_training_data_that_is_not_finite_or_empty():
    with pytest.raises(ValueError, match="the training data has values that are not finite"):
        Standardize().fit([torch.zeros(2), torch.tensor([float("nan"), 0])])
    with pytest.raises(ValueError, match="the dataset is empty"):
        Standardize().fit([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per": "sample"}, "per must be one of dimension, channel; got 'sample'"),
        ({"mean": [0.0]}, "give both mean and std, or neither"),
        ({"mean": [0.0, 1.0], "std": [1.0]}, r"same shape.*got mean 0 .. 1 of shape \[2\], std 1 of shape \[1"),
        ({"mean": [0.0], "std": [0.0]}, r"std positive.*std 0 of shape \[1\]"),
        ({"mean": [float("inf")], "std": [1.0]}, "must be finite"),
        ({"mean": "a", "std": "b"}, "lists of numbers: "),
        ({"mean": [[1.0], [1.0, 2.0]], "std": [1.0]}, "lists of numbers: "),
    ],
)
def test_impossible_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Standardize(**arguments)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5,)])
def test_states_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"mean and std \(3,\) do not broadcast against states .* of shape \(5"):
        Standardize([0.0] * 3, [1.0] * 3)(torch.zeros(shape))
