"""The standardisation of tables and series: NumPy's moments, an exact inverse and log-determinant."""

import json

import numpy as np
import pytest
import torch

from scoresde.data import Compose, Logit, Standardize, Toy2D
from tests.conftest import seeded

SHAPES = {"vector": (4,), "series": (3, 5), "image": (2, 3, 4)}
CASES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
PER = pytest.mark.parametrize("per", ["dimension", "channel"])


def samples(shape, n=50, labelled=False):
    """Samples whose channels have means far from zero and unequal scales."""
    scale = torch.logspace(-2, 3, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    x = 1e4 + scale * torch.randn(n, *shape, generator=seeded(), dtype=torch.float64)
    return [(state, torch.tensor(0)) for state in x] if labelled else list(x)


def fitted(dataset, per):
    """As a configuration that went through a file gives it back."""
    return Standardize(**json.loads(json.dumps(Standardize(per=per).fit(dataset))))


@CASES
@PER
@pytest.mark.parametrize("labelled", [False, True])
def test_moments_are_those_of_numpy(per, shape, labelled):
    found = Standardize(per=per).fit(samples(shape, labelled=labelled))
    x = torch.stack(samples(shape)).numpy()
    axes = 0 if per == "dimension" else (0, *range(2, x.ndim))
    mean, std = (function(x, axis=axes, keepdims=True)[0] for function in (np.mean, np.std))
    assert np.shape(found["mean"]) == np.shape(found["std"]) == mean.shape
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-13)
    np.testing.assert_allclose(found["std"], std, rtol=1e-9)


@CASES
@PER
def test_standardises_what_it_was_fitted_to(per, shape):
    dataset = samples(shape)
    y = fitted(dataset, per)(torch.stack(dataset))
    flat = y.movedim(1, -1).flatten(0, -2) if per == "channel" else y.flatten(1)
    torch.testing.assert_close(flat.mean(dim=0), torch.zeros_like(flat[0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(flat.std(dim=0, correction=0), torch.ones_like(flat[0]))


@CASES
@PER
def test_inverse_and_log_det_are_exact(per, shape):
    transform, x = fitted(samples(shape), per), torch.stack(samples(shape)[:3])
    torch.testing.assert_close(transform.inverse(transform(x)), x, rtol=1e-14, atol=0)
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: transform(flat.reshape(1, *shape)).flatten(), x[0].flatten()
    )
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(transform.log_det(x), expected.expand(3), rtol=1e-12, atol=1e-12)
    single = transform(x.float())
    assert single.dtype == transform.inverse(single).dtype == torch.float32
    assert transform.log_det(x.float()).dtype == torch.float64


def test_numbers_for_all_dimensions():
    transform, x = Standardize(2.0, 4.0), torch.tensor([[6.0, -2.0]])
    assert transform(x).tolist() == [[1, -1]]
    assert transform.log_det(x).tolist() == pytest.approx([-2 * np.log(4)])
    assert Standardize([[1.0], [2.0]], [[1.0], [4.0]])(torch.ones(1, 2, 3)).tolist() == [[[0] * 3, [-0.25] * 3]]


def test_composes_with_other_transforms():
    transform = Compose([Standardize([0.5, 0.0], [2.0, 1.0]), Logit(-5.0, 5.0)])
    x = torch.stack([Toy2D(n=5)[i] for i in range(5)]).double()
    torch.testing.assert_close(transform.inverse(transform(x)), x)


def test_unfitted_is_refused_where_it_is_used():
    transform, x = Standardize(), torch.zeros(2, 3)
    assert not transform.fitted
    assert Standardize([0.0], [1.0]).fitted
    for use in (transform, transform.inverse, transform.log_det):
        with pytest.raises(ValueError, match=r"a fitted Standardize expected; .*transform.fit\(training_data\)"):
            use(x)
    assert str(transform) == "Standardize(per dimension, not fitted)"


def test_its_name_tells_numbers_apart_and_stays_short():
    one, other = (Standardize([0.0] * 500 + [last], [1.0] * 501) for last in (0.5, 0.25))
    middle = Standardize([0.0] * 499 + [0.25, 0.5], [1.0] * 501)
    assert str(one).startswith("Standardize(mean 0 .. 0.5, std 1, ")
    assert len({str(one), str(other), str(middle)}) == 3
    assert str(one) == str(Standardize([0] * 500 + [0.5], [1] * 501))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6 / 3])
def test_dimension_that_is_constant_is_named(value):
    x = torch.randn(60, 3, generator=seeded())
    x[:, 1] = value
    message = r"a dimension that varies expected; dimension \[1\] is constant in the training data \(1 of 3 are\)"
    with pytest.raises(ValueError, match=message):
        Standardize().fit(list(x))
    with pytest.raises(ValueError, match=r"channel \[1\] is constant"):
        Standardize(per="channel").fit(list(x[:, :, None].double()))


def test_training_data_that_is_not_finite_or_not_there():
    x = torch.randn(6, 3, generator=seeded())
    x[2, 0] = float("nan")
    with pytest.raises(ValueError, match="finite values expected in the training data"):
        Standardize().fit(list(x))
    with pytest.raises(ValueError, match=r"one item or more.*got 0 items"):
        Standardize().fit([])
    with pytest.raises(TypeError, match=r"items that are a tensor, or \(tensor, condition\), expected; got str"):
        Standardize().fit(["a"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per": "sample"}, "per among dimension, channel expected; got 'sample'"),
        ({"mean": [0.0]}, "mean and std together, or neither, expected"),
        (
            {"mean": [0.0, 1.0], "std": [1.0]},
            r"same shape, expected; got mean 0 .. 1 of shape \[2\], std 1 of shape \[1",
        ),
        ({"mean": [0.0], "std": [0.0]}, r"positive finite standard deviations.*std 0 of shape \[1\]"),
        ({"mean": [float("inf")], "std": [1.0]}, "finite means"),
        ({"mean": "a", "std": "b"}, "lists of numbers expected; got "),
        ({"mean": [[1.0], [1.0, 2.0]], "std": [1.0]}, "lists of numbers expected; got "),
    ],
)
def test_refuses_numbers_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Standardize(**arguments)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5,)])
def test_refuses_states_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"mean and std \(3,\) broadcast against expected; got \(5"):
        Standardize([0.0] * 3, [1.0] * 3)(torch.zeros(shape))
