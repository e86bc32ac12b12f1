"""Broadcasting, float64 sums and streams of draws."""

import pytest
import torch
from torch import Tensor

from scoresde.tensors import Noise, broadcast, sum_dims


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
def test_broadcast_refuses_what_is_not_one_value_per_sample(values):
    with pytest.raises(ValueError, match="one value per sample"):
        broadcast(values, torch.ones(2, 3))


def test_sums_are_in_float64():
    x = torch.full((1, 1000), 0.1)
    assert sum_dims(x).dtype == torch.float64
    assert float(sum_dims(x)) == pytest.approx(1000 * float(torch.tensor(0.1)), rel=1e-12)


@pytest.mark.parametrize("kind", ["normal", "uniform", "rademacher"])
def test_a_seed_gives_the_same_stream_in_any_batch(kind):
    def draws(seeds):
        stream = Noise((len(seeds), 2, 3), seeds=seeds)
        return torch.stack([getattr(stream, kind)() for _ in range(3)], dim=1)

    batch = draws([5, 6, 7])
    for i, seed in enumerate((5, 6, 7)):
        assert torch.equal(draws([seed])[0], batch[i])
    assert not torch.equal(batch[0], batch[1])
    assert not torch.equal(batch[0, 0], batch[0, 1])


def test_moments_of_the_draws():
    stream = Noise((100_000, 1), torch.Generator().manual_seed(0))
    normal, uniform, signs = stream.normal(), stream.uniform(), stream.rademacher()
    assert float(normal.mean()) == pytest.approx(0, abs=0.02)
    assert float(normal.std()) == pytest.approx(1, abs=0.02)
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert float(signs.mean()) == pytest.approx(0, abs=0.02)


def test_randomness_comes_from_one_place():
    with pytest.raises(ValueError, match="both were given"):
        Noise((2, 3), torch.Generator(), [0, 1])
    with pytest.raises(ValueError, match="one seed per sample"):
        Noise((2, 3), seeds=[0, 1, 2])


@pytest.mark.parametrize("event", [(16,), (1, 8, 8), (3, 4, 4), (5,), (1024,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_ahead_are_those_of_one_after_the_other(event, dtype):
    """Every sample's stream gives what its generator gives, one draw at a time, whatever is asked for in between."""
    noise = Noise((3, *event), seeds=[4, 5, 6], dtype=dtype)
    streams = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]

    def expected(fill, rows=(0, 1, 2)):
        return torch.stack([fill(torch.empty(event, dtype=dtype), generator=streams[row]) for row in rows])

    for _ in range(40):  # beyond a block, and not to the end of one
        assert torch.equal(noise.normal(), expected(Tensor.normal_))
    assert torch.equal(noise.normal(torch.tensor([2])), expected(Tensor.normal_, (2,)))
    assert torch.equal(noise.normal(), expected(Tensor.normal_))
    assert torch.equal(noise.uniform(), expected(Tensor.uniform_))
    assert torch.equal(noise.normal(), expected(Tensor.normal_))
