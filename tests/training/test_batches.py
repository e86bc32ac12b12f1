"""Batches: every sample once an epoch, and every batch a function of the seed and the step."""

from itertools import chain, product

import pytest
import torch
from torch.utils.data import TensorDataset

from scoresde.training.batches import Shuffled, StepNoise, batches, split_condition, step_seed

SEEDS = [0, 1, 2, 20240101, 2**31 - 1]


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 3), (5, 5), (3, 1)])
def test_an_epoch_visits_every_sample_at_most_once(size, batch_size):
    per_epoch = size // batch_size
    steps = list(Shuffled(size, batch_size, seed=0, start=0, stop=4 * per_epoch))
    assert {len(batch) for batch in steps} == {batch_size}
    epochs = [list(chain(*steps[i : i + per_epoch])) for i in range(0, len(steps), per_epoch)]
    for epoch in epochs:
        assert len(set(epoch)) == per_epoch * batch_size
        assert set(epoch) <= set(range(size))
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_samples_left_out_change_from_epoch_to_epoch():
    steps = list(Shuffled(10, 9, seed=0, start=0, stop=50))
    assert {(set(range(10)) - set(batch)).pop() for batch in steps} == set(range(10))


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5, 11])
def test_batches_from_any_step_on_are_those_of_the_whole_run(start):
    whole = list(Shuffled(13, 4, seed=7, start=0, stop=12))
    resumed = Shuffled(13, 4, seed=7, start=start, stop=12)
    assert len(resumed) == 12 - start
    assert list(resumed) == whole[start:]
    assert list(resumed) == whole[start:]


def test_the_seed_decides_the_order():
    orders = {seed: tuple(chain(*Shuffled(100, 10, seed, 0, 10))) for seed in SEEDS}
    assert len(set(orders.values())) == len(SEEDS)
    assert tuple(chain(*Shuffled(100, 10, 1, 0, 10))) == orders[1]


def test_draws_differ_between_seeds_and_steps():
    pairs = list(product(SEEDS, [0, 1, 2, 1000]))
    draws = {
        float(torch.rand(1, generator=torch.Generator().manual_seed(step_seed(*pair)), dtype=torch.float64))
        for pair in pairs
    }
    assert len(draws) == len(pairs)


KINDS = ("normal", "uniform", "rademacher", "normal")


def step_draws(positions, seed=0, step=3, rows=None, dtype=torch.float32, shape=(3,)):
    """One draw after the other of some positions of a batch."""
    noise, like = StepNoise(positions, seed, step), torch.empty(len(positions), *shape, dtype=dtype)
    like = like if rows is None else like[rows]
    return [getattr(noise, kind)(like, rows) for kind in KINDS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=str)
@pytest.mark.parametrize("positions", [range(1), range(2, 5), range(5, 7), range(6, 7)], ids=str)
def test_a_position_draws_the_same_in_any_part_of_its_batch(positions, shape, dtype):
    """One after the other, and all of the elements differ; some rows of a part have theirs as well."""
    whole = step_draws(range(7), dtype=dtype, shape=shape)
    for found, expected in zip(step_draws(positions, dtype=dtype, shape=shape), whole, strict=True):
        assert torch.equal(found, expected[positions.start : positions.stop])
    rows = torch.arange(0, len(positions), 2)
    for found, expected in zip(step_draws(positions, rows=rows, dtype=dtype, shape=shape), whole, strict=True):
        assert torch.equal(found, expected[positions.start : positions.stop][rows])
    normal = torch.stack([whole[0], whole[3]])
    assert len(normal.unique()) == normal.numel()


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 4}], ids=str)
def test_another_step_or_seed_draws_something_else(other):
    draws, others = step_draws(range(7)), step_draws(range(7), **other)
    assert not any(bool((x == y).any()) for x, y in zip(draws[:2], others[:2], strict=True))
    assert not torch.equal(draws[2], others[2])


@pytest.mark.parametrize("batch_size", [0, 11])
def test_refuses_a_batch_that_cannot_be_filled(batch_size):
    with pytest.raises(ValueError, match=f"from 1 to the dataset's 10 samples expected; got {batch_size}"):
        Shuffled(10, batch_size, 0, 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_items_of_each_batch(workers):
    dataset = TensorDataset(torch.arange(10.0)[:, None] * torch.ones(2), torch.arange(10))
    loader = batches(dataset, 4, seed=3, start=1, stop=6, workers=workers)
    expected = list(Shuffled(10, 4, 3, 1, 6))
    assert [labels.tolist() for _, labels in loader] == expected
    assert [x[:, 1].tolist() for x, _ in loader] == expected


def test_split_condition():
    x, label = torch.zeros(4, 2), torch.arange(4)
    assert split_condition(x, "cpu") == (x, None)
    for pair in ((x, label), [x, label], (x, {"label": label})):
        state, cond = split_condition(pair, "cpu")
        assert state is x
        assert (cond["label"] if isinstance(cond, dict) else cond) is label
    assert split_condition((x, label), "meta")[1].device.type == "meta"
    assert split_condition((x, {"label": label}), "meta")[1]["label"].device.type == "meta"


@pytest.mark.parametrize("batch", [{"x": torch.zeros(2)}, "x", [torch.zeros(2)] * 3], ids=["dict", "str", "triple"])
def test_refuses_items_that_are_no_states(batch):
    with pytest.raises(TypeError, match=f"expected; got {type(batch).__name__}"):
        split_condition(batch, "cpu")


@pytest.mark.parametrize("cond", [("cat", "dog"), [torch.ones(2)] * 2, {"name": ["cat", "dog"]}], ids=str)
def test_refuses_conditions_that_no_network_takes(cond):
    with pytest.raises(TypeError, match="a condition that is a tensor, or a dict of tensors, expected"):
        split_condition([torch.zeros(2, 3), cond], "cpu")
