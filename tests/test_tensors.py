"""Broadcasting and float64 sums."""

import pytest
import torch

from scoresde.tensors import broadcast, listed, sum_dims


@pytest.mark.parametrize("shape", [(2, 2), (4, 3), (2, 1, 4, 4)])
def test_broadcast_scales_samples_not_columns(shape):
    x = torch.ones(shape)
    values = torch.arange(1.0, shape[0] + 1, dtype=torch.float64)
    scaled = broadcast(values, x) * x
    assert scaled.dtype == x.dtype
    for i in range(shape[0]):
        assert (scaled[i] == i + 1).all()
    assert (broadcast(torch.tensor(3.0), x) * x == 3).all()


@pytest.mark.parametrize("values", [torch.ones(3), torch.ones(2, 1)])
def test_broadcast_refuses_other_shapes(values):
    with pytest.raises(ValueError, match="expected one value per sample"):
        broadcast(values, torch.ones(2, 3))


def test_sums_are_in_float64():
    x = torch.full((1, 1000), 0.1)
    assert sum_dims(x).dtype == torch.float64
    assert float(sum_dims(x)) == pytest.approx(1000 * float(torch.tensor(0.1)), rel=1e-12)


def test_a_long_list_is_shortened_in_messages():
    assert listed([1.0, 0.25]) == "[1, 0.25]"
    assert listed(torch.arange(8)) == "[0, 1, 2, 3, 4, 5, 6, 7]"
    assert listed(torch.arange(1000) / 999) == "[0, 0.001001, 0.002002, ..., 0.997998, 0.998999, 1] (1000 numbers)"
